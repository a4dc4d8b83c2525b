"""Converts a checkpoint into the store, where it is a model with a name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from qwen2_converters.about import licence
from qwen2_converters.making import OnProgress, Options, Progress, Wanted, make
from qwen2_converters.target import Target
from qwen2_local.errors import UsageError
from qwen2_local.formats.checkpoint import Checkpoint
from qwen2_local.manifest import Manifest, list_files, now
from qwen2_local.store import GUIDE, Store


def install(
    source: Path,
    target: Target,
    store: Store,
    name: str,
    *,
    origin: str = "",
    revision: str = "",
    progress: OnProgress | None = None,
    options: Options | None = None,
) -> Manifest:
    """Converts the checkpoint in `source` to the model `name` of `store`. It is listed when it is whole, and not before.

    origin, revision: where the checkpoint is from, a hub id and its commit; by default its path.
    Raises as `convert` does, and UsageError for a name that is impossible, taken, or being made by another process.
    """
    return install_all(source, [(target, name)], store, origin=origin, revision=revision, progress=progress, options=options)[0]


def install_all(
    source: Path,
    models: Sequence[tuple[Target, str]],
    store: Store,
    *,
    origin: str = "",
    revision: str = "",
    progress: OnProgress | None = None,
    options: Options | None = None,
) -> list[Manifest]:
    """As `install`, to several models, each with its target and name, out of one read of the weights."""
    for _, name in models:
        if name.partition(":")[0] == GUIDE:
            raise UsageError(f"{name} is the built-in model's name.", hint="Choose another.")
    if len({name for _, name in models}) < len(models):
        raise UsageError("Two targets would get one name.", hint="Name each target once.")
    options = options or Options()
    options = replace(options, name=options.name or origin.rpartition("/")[2])
    made_of = origin or str(source.resolve())
    if options.lora:  # no longer the source's weights: `verify` compares with a source that is a path
        made_of += f" + {options.lora.resolve()}"
    with ExitStack() as stack:
        wanted = []
        for target, name in models:
            folder = stack.enter_context(store.reserve(name))
            file = f"{name.replace(':', '-')}.gguf" if target.format == "gguf" else ""
            sealed = _seal(target, name, made_of, revision, progress or (lambda _: None))
            wanted.append(Wanted(target, folder, file, False, _refuse_taken(store, name), seal=sealed))
        make(source, wanted, options, progress or (lambda _: None))
    return [manifest for _, name in models if (manifest := store.get(name).manifest)]


def _refuse_taken(store: Store, name: str) -> Callable[[], None]:
    def refuse() -> None:
        if any(one.name == name for one in store.list()):
            hint = f"Delete it with `qwen2-local rm {name}` first, or choose another name."
            raise UsageError(f"There exists a model called {name}.", hint=hint)

    return refuse


def _seal(target: Target, name: str, source: str, revision: str, report: OnProgress) -> Callable[[Checkpoint, Path], None]:
    def seal(checkpoint: Checkpoint, folder: Path) -> None:
        Store.unseal(folder)
        made = Manifest(
            name=name,
            source=source,
            revision=revision,
            files=list_files(folder, lambda done, total: report(Progress("hashing", done, total))),
            format=target.format,
            architecture=checkpoint.config.model_type,
            quantization=_quantization(target),
            licence=licence(checkpoint).get("general.license", ""),
            context=checkpoint.config.context,
            created=now(),
        )
        Store.seal(folder, made)

    return seal


def _quantization(target: Target) -> str:
    """For lists: "Q4_K_M", "4-bit", "3/6-bit" of a mixed recipe."""
    bits = [str(bits) for bits in (target.bits, target.more_bits) if bits]
    return f"{'/'.join(bits)}-bit" if bits else target.weights.upper()

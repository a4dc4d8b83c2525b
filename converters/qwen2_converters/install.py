"""Converts a checkpoint into the store, where it is a model with a name."""

from __future__ import annotations

from pathlib import Path

from qwen2_converters.convert import OnProgress, Progress, prepare, write
from qwen2_converters.keys import licence
from qwen2_converters.target import Target
from qwen2_local.errors import UsageError
from qwen2_local.manifest import Manifest, list_files, now
from qwen2_local.store import GUIDE, Store


def install(
    source: Path, target: Target, store: Store, name: str, *, origin: str = "", revision: str = "", progress: OnProgress | None = None
) -> Manifest:
    """Converts the checkpoint in `source` to the model `name` of `store`. It is listed when it is whole, and not before.

    origin, revision: where the checkpoint is from, a hub id and its commit; by default its path.
    Raises as `convert` does, and UsageError for a name that is impossible, taken, or being made by another process.
    """
    if name.partition(":")[0] == GUIDE:
        raise UsageError(f"{name} is the built-in model's name.", hint="Choose another.")
    if any(one.name == name for one in store.list()):
        raise UsageError(f"There exists a model called {name}.", hint=f"Delete it with `qwen2-local rm {name}` first, or choose another name.")
    with store.add(name) as draft:
        report = progress or (lambda _: None)
        checkpoint, plan = prepare(source, target, store.folder, report)
        output = draft.folder / f"{name.replace(':', '-')}.gguf" if target.format == "gguf" else draft.folder
        write(checkpoint, plan, output, progress=report, name=origin.rpartition("/")[2])
        report(Progress("publishing", plan.nbytes, plan.nbytes))
        draft.manifest = Manifest(
            name=name,
            source=origin or str(source.resolve()),
            revision=revision,
            files=list_files(draft.folder),
            format=target.format,
            architecture=checkpoint.config.model_type,
            quantization=f"{target.bits}-bit" if target.bits else target.weights.upper(),
            licence=licence(checkpoint).get("general.license", ""),
            context=checkpoint.config.context,
            created=now(),
        )
    return draft.manifest

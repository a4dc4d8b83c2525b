"""From a name to an installed model: look, choose, say what it means, fetch, check, convert, publish.

plan = prepare("7b")                       # asks the hub; fetches and writes nothing
for manifest in carry_out(plan): ...       # whole, or resumed by the next call
pull("0.5b")                               # both
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from qwen2_converters import again
from qwen2_converters.fetching import Fetching, shards_folder
from qwen2_converters.gather import gather
from qwen2_converters.hub import local, sources
from qwen2_converters.hub.asked import understand
from qwen2_converters.hub.choose import choose, siblings
from qwen2_converters.hub.preflight import converted_bytes, fits, shape_of
from qwen2_converters.hub.repository import SourceName
from qwen2_converters.hub.speed import Stopwatch
from qwen2_converters.making import Options, Progress, Wanted, make
from qwen2_converters.pull_plan import Model, PullPlan, plan_pull
from qwen2_converters.pull_step import OnProgress, Step
from qwen2_converters.remote import RemoteFile
from qwen2_converters.target import Target
from qwen2_local import files, fit
from qwen2_local.errors import BadFile, UsageError
from qwen2_local.formats.check_gguf import open_gguf
from qwen2_local.formats.checkpoint import Checkpoint, open_checkpoint
from qwen2_local.manifest import Manifest, list_files, now
from qwen2_local.store import Store


def pull(name: str, *, accept_licence: bool = False, progress: OnProgress | None = None, **options: Any) -> tuple[Manifest, ...]:
    """Fetches and installs the model `name`, and gives what is installed then. options: as for `prepare`.

    Raises what `prepare` and `carry_out` raise, and UsageError for a licence that has to be accepted.
    """
    plan = prepare(name, **options)
    if plan.licence_to_accept and not accept_licence:
        raise UsageError(f"{plan.title} has the licence {plan.licence.name}.", hint=f"Read {plan.licence.url}, then pass accept_licence=True.")
    return carry_out(plan, progress=progress)


def prepare(
    name: str,
    *,
    targets: Sequence[Target] = (),
    original: bool = False,
    revision: str = "",
    source: SourceName | Literal[""] = "",
    install_as: str = "",
    discard_source: bool = False,
    backend: str = "llama.cpp",
    store: Store | None = None,
    memory: fit.Memory | None = None,
) -> PullPlan:
    """What pulling `name` means; fetches listings and a few headers only, and writes nothing.

    name: of the catalog ("7b:q8_0"), a hub's id, an address, or a path. targets: convert the original to these. original: keep the original.
    source: the hub to ask; by default Hugging Face. install_as: a name for it. discard_source: delete each shard of the original as soon as
    nothing needs it any more. backend: what it is to run on, "llama.cpp" or "mlx".

    Raises UnknownModel, UsageError, FetchFailed, Offline, BadFile, UnsupportedModel, DoesNotFit for a disk that is too small.
    """
    store, memory = store or Store(), memory or fit.machine_memory()
    asked = understand(name)
    if revision and asked.kind != "repository":
        raise UsageError("--revision is for repositories of a hub.", hint="Leave it out.")
    asked = replace(asked, revision=revision or asked.revision, source=source or asked.source)
    if asked.kind == "path":
        repositories = [local.look(Path(asked.where))]
    elif asked.kind == "address":
        repositories = [sources.look_at_address(asked.where)]
    else:
        repositories = sources.look_at_all(asked.source or "huggingface", siblings(asked, backend, targets, original=original), asked.revision)
    choice = choose(
        asked, repositories, backend=backend, targets=targets, original=original, size_of=converted_bytes,
        fits=lambda way: fits(way, shape_of(way.repository, asked.model), memory),
    )  # fmt: skip
    name = str(Path(asked.where).absolute()) if asked.kind == "path" else name
    order = again.Order(name, tuple(map(str, targets)), original, revision, source, install_as, discard_source)
    return plan_pull(asked, choice, store, memory, order)


def carry_out(plan: PullPlan, *, progress: OnProgress | None = None) -> tuple[Manifest, ...]:
    """Does what `plan` says, and gives the manifests of its models. Stopped or killed at any point, the same call goes on where it was.

    Raises FetchFailed, Offline, BadFile and UnsupportedModel for what came, DoesNotFit, Cancelled, UsageError while another process makes it.
    """
    if plan.current:
        again.tidy(plan.store, plan.draft, [model.name for model in plan.models])
        return tuple(_manifest(plan.store, model.name) for model in plan.models)
    report = progress or (lambda _: None)
    files.require_free(plan.store.folder, plan.disk)
    kept = next((model for model in plan.models if model.target is None), None)
    to_make = [model for model in plan.models if model.target is not None and model.state != "current"]
    with plan.store.resume(plan.draft, replace=True) as draft:
        names = [model.name for model in plan.models]
        again.remember(draft.folder.parent, plan.order, plan.title, names, plan.way.fetched + plan.way.written)
        if kept is not None and kept.state == "current":
            source = plan.store.get(kept.name).folder
        elif kept is None and plan.way.repository.is_local:
            source = Path(plan.way.repository.id)
        else:
            source = draft.folder
        missing = gather(plan, source, report, late=bool(to_make)) if source == draft.folder else []
        _check(plan, source, report)
        if to_make:
            _convert(plan, to_make, source, missing, report)
        if kept is not None and kept.state != "current":
            listed = [file.name for file in plan.way.files]
            for stray in source.iterdir():
                if stray.name not in listed:
                    _discard(stray)
            report(Step("publishing", kept.name, 0, 0))
            draft.manifest = _describe(plan, kept, source, report)
    return tuple(_manifest(plan.store, model.name) for model in plan.models)


# Steps of carrying out


def _check(plan: PullPlan, folder: Path, report: OnProgress) -> None:
    """Raises BadFile or UnsupportedModel unless what was fetched is a model that we run; what is no good is deleted, so that it is fetched anew."""
    report(Step("checking", plan.title, 0, 0))
    try:
        if plan.way.format == "gguf":
            open_gguf(folder / plan.way.files[0].name)
        else:
            open_checkpoint(folder)
    except BadFile as error:
        if folder == plan.store.unfinished(plan.draft):
            shutil.rmtree(folder, ignore_errors=True)
        raise type(error)(error.what.replace(f"{folder}/", f"{plan.way.repository.id}: "), hint=error.hint) from error


def _convert(plan: PullPlan, models: Sequence[Model], source: Path, missing: Sequence[RemoteFile], report: OnProgress) -> None:
    """Makes and installs `models` of the checkpoint in `source`, out of one read, while the shards that are `missing` come."""
    names = ", ".join(model.name for model in models)
    repository = plan.way.repository
    with ExitStack() as stack:
        wanted = []
        for model in models:
            assert model.target is not None
            folder = stack.enter_context(plan.store.reserve(model.name))
            file = f"{model.name.replace(':', '-')}.gguf" if model.target.format == "gguf" else ""
            seal = partial(_seal, plan, model, report)
            wanted.append(Wanted(model.target, folder, file, False, lambda: None, overwrite=True, seal=seal))
        identity = plan.source_hash or f"{repository.id} {repository.revision}"
        bounded = plan.discard_source and repository.kind == "original"
        keep = any(model.target is None for model in plan.models)
        fetching = Fetching(missing, source, shards_folder(source), identity, keep=keep, discard=plan.discard_source, bounded=bounded)
        stack.enter_context(fetching)
        watch = Stopwatch()
        stack.callback(watch.remember)

        def tell() -> None:
            watch.at(fetching.done)
            report(Step("fetching", repository.id, fetching.done, fetching.total))

        fetching.tell = tell

        def advance(step: Progress) -> None:
            if fetching.done < fetching.total:
                tell()
            report(Step(step.phase, names, step.done, step.total))

        # Of what is on this computer, its place and time tell more.
        make(source, wanted, Options(name=plan.title, url=repository.url, arrivals=None if repository.is_local else fetching), advance)
        if keep:
            fetching.finish()


def _seal(plan: PullPlan, model: Model, report: OnProgress, _: Checkpoint, folder: Path) -> None:
    Store.unseal(folder)
    Store.seal(folder, _describe(plan, model, folder, report))


def _describe(plan: PullPlan, model: Model, folder: Path, report: OnProgress) -> Manifest:
    """The manifest of what lies in `folder`."""
    repository = plan.way.repository
    known = {file.name: file.sha256 for file in plan.way.files if file.sha256} if model.target is None else {}
    listed = list_files(folder, lambda done, total: report(Step("hashing", model.name, done, total)), known=known)
    kind = plan.way.format if model.target is None else model.target.format
    if kind == "gguf":
        gguf = open_gguf(min(folder.glob("*.gguf")))
        architecture, quantization, context = gguf.architecture, gguf.quantization, gguf.context
    else:
        config = open_checkpoint(folder).config
        bits = config.quantization
        architecture, context = config.model_type, config.context
        quantization = (
            f"{bits.bits}-bit" if bits else str(config.packed) if config.packed else {"bfloat16": "bf16", "float16": "f16"}.get(config.dtype, "f32")
        )
    return Manifest(
        name=model.name, source=repository.id, revision=repository.revision, files=listed, format=kind, architecture=architecture,
        quantization=quantization, licence=plan.licence.id, context=context, created=now(), source_hash=plan.source_hash,
    )  # fmt: skip


def _manifest(store: Store, name: str) -> Manifest:
    manifest = store.get(name).manifest
    assert manifest is not None
    return manifest


def _discard(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)

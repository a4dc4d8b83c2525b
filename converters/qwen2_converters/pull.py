"""From a name to an installed model: look, choose, say what it means, fetch, check, convert, publish.

plan = prepare("7b")                       # asks the hub; fetches and writes nothing
for manifest in carry_out(plan): ...       # whole, or resumed by the next call
pull("0.5b")                               # both
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from qwen2_converters import remote
from qwen2_converters.download import download, read_range
from qwen2_converters.fetching import AHEAD, Fetching, is_stub, make_stub
from qwen2_converters.hub import local, sources
from qwen2_converters.hub.asked import Asked, understand
from qwen2_converters.hub.choose import ORIGINAL, Choice, Way, choose, siblings
from qwen2_converters.hub.preflight import Licence, Shape, check_keys, converted_bytes, disk_needed, fits, licence_of, memory_at, shape_of
from qwen2_converters.hub.repository import HubFile, Repository, SourceName, level_of, source_hash
from qwen2_converters.hub.speed import Stopwatch, last_speed
from qwen2_converters.making import Options, Progress, Wanted, make
from qwen2_converters.remote import RemoteFile
from qwen2_converters.target import Target
from qwen2_local import files, fit
from qwen2_local.errors import BadFile, UsageError
from qwen2_local.files import refuse_clashes
from qwen2_local.formats.check_gguf import open_gguf
from qwen2_local.formats.checkpoint import Checkpoint, open_checkpoint
from qwen2_local.formats.gguf import salvage_gguf
from qwen2_local.manifest import Manifest, ManifestFile, now
from qwen2_local.store import GUIDE, Store

_PEEK = 1 << 20
_COPY = 1 << 22
_ENDINGS = re.compile(r"(-(gguf|mlx|awq|gptq|int[48]|[2-8]bit|bf16|fp?16|i1))+$")

OnProgress = Callable[["Step"], None]


@dataclass(frozen=True, slots=True)
class Step:
    """How far a pull is, in bytes. name: the file, or the model that is converted; done, total: of the phase."""

    phase: Literal["fetching", "verifying", "checking", "converting", "publishing"]
    name: str
    done: int
    total: int
    file_done: int = 0
    file_total: int = 0


@dataclass(frozen=True, slots=True)
class Model:
    """A model that will be installed. target: what the fetched files are converted to; None where they are taken as they are.

    state: "current" is there and made of the same; "changed" is there, of other files than the hub has now.
    """

    name: str
    target: Target | None
    state: Literal["new", "changed", "current"]


@dataclass(frozen=True, slots=True)
class PullPlan:
    """What a pull will do. fetch: bytes still to come over the network. here: bytes of the files that are on this computer already.

    speed: bytes a second of the last pull, 0 if there was none. disk: bytes to have free. draft: the name under which the store keeps what is
    unfinished. discard_source: each shard of the original is deleted once it is converted.
    """

    title: str
    way: Way
    runner_up: Way | None
    models: tuple[Model, ...]
    shape: Shape
    licence: Licence
    fetch: int
    here: int
    disk: int
    disk_free: int
    memory: fit.Memory
    store: Store
    draft: str
    speed: int = 0
    discard_source: bool = False

    @property
    def current(self) -> bool:
        """Is all of it installed already?"""
        return all(model.state == "current" for model in self.models)

    @property
    def changed(self) -> bool:
        """Would an installed model be replaced?"""
        return any(model.state == "changed" for model in self.models)

    @property
    def fits(self) -> bool:
        """Does what comes of it leave this machine some room?"""
        return fits(self.way, self.shape, self.memory)

    @property
    def licence_to_accept(self) -> bool:
        """Must a person accept the licence first? Who has the model has done so."""
        return self.licence.to_accept and all(model.state == "new" for model in self.models)

    @property
    def source_hash(self) -> str:
        """Of all files that the models are made from."""
        return source_hash(self.way.files)

    def memory_at(self, context: int) -> int:
        """Bytes of memory at a context of so many tokens."""
        return memory_at(self.way, self.shape, context)

    def kept(self) -> int:
        """Bytes of unfinished work that are on the disk."""
        return sum(map(self.store.kept, {self.draft, *(model.name for model in self.models)}))


def pull(name: str, *, accept_licence: bool = False, progress: OnProgress | None = None, **options: object) -> tuple[Manifest, ...]:
    """Fetches and installs the model `name`, and gives what is installed then. options: as for `prepare`.

    Raises what `prepare` and `carry_out` raise, and UsageError for a licence that has to be accepted.
    """
    plan = prepare(name, **options)  # type: ignore[arg-type]
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
    return _plan(asked, choice, store, memory, install_as, discard_source)


def carry_out(plan: PullPlan, *, progress: OnProgress | None = None) -> tuple[Manifest, ...]:
    """Does what `plan` says, and gives the manifests of its models. Stopped or killed at any point, the same call goes on where it was.

    Raises FetchFailed, Offline, BadFile and UnsupportedModel for what came, DoesNotFit, Cancelled, UsageError while another process makes it.
    """
    if plan.current:
        return tuple(_manifest(plan.store, model.name) for model in plan.models)
    report = progress or (lambda _: None)
    files.require_free(plan.store.folder, plan.disk)
    kept = next((model for model in plan.models if model.target is None), None)
    to_make = [model for model in plan.models if model.target is not None and model.state != "current"]
    with plan.store.resume(plan.draft, replace=True) as draft:
        if kept is not None and kept.state == "current":
            source = plan.store.get(kept.name).folder
        elif kept is None and plan.way.repository.is_local:
            source = Path(plan.way.repository.id)
        else:
            source = draft.folder
        missing = _gather(plan, source, report, late=bool(to_make)) if source == draft.folder else []
        _check(plan, source, report)
        if to_make:
            _convert(plan, to_make, source, missing, report)
        if kept is not None and kept.state != "current":
            listed = [file.name for file in plan.way.files]
            for stray in source.iterdir():
                if stray.name not in listed:
                    _discard(stray)
            report(Step("publishing", kept.name, 0, 0))
            draft.manifest = _describe(plan, kept, source, listed)
    return tuple(_manifest(plan.store, model.name) for model in plan.models)


# Planning


def _plan(asked: Asked, choice: Choice, store: Store, memory: fit.Memory, install_as: str, discard: bool) -> PullPlan:
    way, repository = choice.best, choice.best.repository
    refuse_clashes((file.name for file in way.files), repository.id)
    keys = _peek(way) if way.format == "gguf" and asked.model is None and not repository.config else None
    if keys is not None:
        check_keys(keys, repository.id)
    base = asked.model.name if asked.model else _slug(repository.id)
    models = tuple(_model(store, way, base, install_as.lower(), target) for target in ([None] if way.label else []) + list(way.targets))
    draft = models[0].name if models[0].target is None else f"{base}:{ORIGINAL}"
    todo = [model for model in models if model.state != "current"]
    missing = [file for file in way.files if next(_places(repository, file, store, draft), None) is None]
    if missing and repository.cached:
        sources.remote(repository, missing[0])  # raises Offline
    fetch = sum(file.size - min(file.size, _begun(store.unfinished(draft), file)) for file in missing)
    discard = discard and bool(way.targets) and not way.label and not repository.is_local
    shards = sorted((file.size for file in way.files if file.name.endswith(".safetensors")), reverse=True)
    # A packed matrix may lie in several shards: then they are needed together.
    held = sum(shards[: AHEAD + 1]) if discard and repository.kind == "original" else fetch
    copied = way.fetched if repository.is_local and not way.targets else 0
    # What an earlier run has written lies on the disk already.
    written = sum(max(0, converted_bytes(repository, model.target) - store.kept(model.name)) for model in todo if model.target is not None)
    disk = disk_needed(min(held, fetch) + copied, written) if todo else 0
    title = asked.model.title if asked.model else repository.id.rstrip("/").rpartition("/")[2]
    return PullPlan(
        title=title, way=way, runner_up=choice.runner_up, models=models, shape=shape_of(repository, asked.model, keys),
        licence=licence_of(repository, asked.model), fetch=fetch if todo else 0, here=way.fetched - sum(file.size for file in missing),
        disk=disk, disk_free=files.free_bytes(store.folder), memory=memory, store=store, draft=draft,
        speed=last_speed(), discard_source=discard,
    )  # fmt: skip


def _model(store: Store, way: Way, base: str, install_as: str, target: Target | None) -> Model:
    label = way.label if target is None else target.label
    name = f"{base}:{label}"
    if install_as:
        name = install_as if len(way.labels) == 1 or ":" in install_as else f"{install_as}:{label}"
        if len(way.labels) > 1 and ":" in install_as:
            raise UsageError(f"{install_as} cannot name {len(way.labels)} models.", hint="Give --name without a colon.")
    if name.partition(":")[0] == GUIDE:
        raise UsageError(f"{name} is the built-in model's name.", hint="Choose another with --name.")
    store.place(name)  # raises UsageError for what is no name
    installed = next((one for one in store.list() if one.name == name), None)
    if installed is None:
        return Model(name, target, "new")
    manifest = installed.manifest
    if manifest is None:
        raise UsageError(f"{name} is installed, but cannot be used: {installed.note}.", hint=f"`qwen2-local rm {name}` first.")
    if manifest.source.lower() != way.repository.id.lower():
        hint = f"Give this one another name with --name, or `qwen2-local rm {name}` first."
        raise UsageError(f"{name} is installed already, from {manifest.source}.", hint=hint)
    known = source_hash(way.files)
    same = manifest.source_hash == known if known and manifest.source_hash else manifest.revision == way.repository.revision
    with suppress(BadFile):
        store.get(name)
        return Model(name, target, "current" if same else "changed")
    return Model(name, target, "changed")


def _slug(id: str) -> str:
    """A name for a model that is not of the catalog: the repository's or file's, without what says its format."""
    stem = id.rstrip("/").rpartition("/")[2].partition("?")[0].lower()
    stem = re.sub(r"(-\d{5}-of-\d{5})?\.gguf$", "", stem)
    level = level_of(stem)
    stem = _ENDINGS.sub("", stem[: stem.rindex(level)].rstrip("-._") if level and level in stem else stem)
    return re.sub(r"[^a-z0-9._-]+", "-", stem).strip("-._")[:60] or "model"


def _peek(way: Way) -> Mapping[str, object]:
    """The first keys of a GGUF that is on a server, or here. They tell the architecture and the shape; the vocabulary comes after them."""
    first = way.files[0]
    here = sources.file_here(way.repository, first)
    if here is not None:
        return salvage_gguf(here)[0].keys
    head = read_range(sources.remote(way.repository, first), 0, min(_PEEK, first.size))
    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        file.write(head)
        file.flush()
        try:
            return salvage_gguf(Path(file.name))[0].keys
        except BadFile as error:
            raise type(error)(error.what.replace(file.name, first.path), hint=error.hint) from error


# Files that are here already


def _places(repository: Repository, file: HubFile, store: Store, draft: str) -> Iterator[Path]:
    """Where the bytes of `file` may be already, by size; they are still to be hashed."""
    folders = [one.folder for one in store.list() if one.manifest and one.manifest.source.lower() == repository.id.lower()]
    for place in (store.unfinished(draft) / file.name, sources.file_here(repository, file), *(folder / file.name for folder in folders)):
        if place is not None and place.is_file() and place.stat().st_size == file.size and not is_stub(place):
            yield place


def _begun(folder: Path, file: HubFile) -> int:
    """Bytes on the disk of a half-fetched file."""
    parts = (folder / f"{file.name}.part", _beside(folder) / file.name / f"{file.name}.part", _beside(folder) / file.name / file.name)
    return sum(part.stat().st_blocks * 512 for part in parts if part.is_file())


def _beside(folder: Path) -> Path:
    """Where shards are fetched to while others are converted."""
    return folder.with_name("shards")


def _gather(plan: PullPlan, folder: Path, report: OnProgress, *, late: bool) -> list[RemoteFile]:
    """Brings the files of the way into `folder`, verified: from this computer where they are here, else over the network.

    late: shards that are not here are left as stubs, to be fetched while they are converted; gives those.
    """
    repository, total, done = plan.way.repository, plan.way.fetched, 0
    first: list[RemoteFile] = []
    later: list[RemoteFile] = []
    for file in plan.way.files:
        advance = partial(_verified, report, file, done, total)
        if repository.is_local:
            _link(repository, file, folder, advance)
        elif not _take(plan, file, folder, advance):
            (later if late and file.name.endswith(".safetensors") else first).append(sources.remote(repository, file))
        done += file.size
    if first:
        watch = Stopwatch()

        def advance_all(at: remote.Progress) -> None:
            if at.phase == "fetching":
                watch.at(at.done)
            report(Step(at.phase, at.file, at.done, at.total, at.file_done, at.file_total))

        try:
            download(first, folder, progress=advance_all)
        finally:
            watch.remember()
    for shard in later:
        stub = folder / shard.name
        if not (stub.is_file() and stub.stat().st_size == shard.size and is_stub(stub)):
            report(Step("checking", shard.name, 0, 0))
            make_stub(shard, stub)
    return later


def _verified(report: OnProgress, file: HubFile, done: int, total: int, count: int) -> None:
    report(Step("verifying", file.name, done + count, total, count, file.size))


def _link(repository: Repository, file: HubFile, folder: Path, advance: Callable[[int], None]) -> None:
    """Brings a file of a local model into `folder`."""
    place = sources.file_here(repository, file)
    assert place is not None
    (folder / file.name).unlink(missing_ok=True)
    link_or_copy(place.resolve(), folder / file.name, advance)


def _take(plan: PullPlan, file: HubFile, folder: Path, advance: Callable[[int], None]) -> bool:
    """Has `file` in `folder`, if it was there, or is in the Hugging Face cache or an installed model, and is right."""
    path = folder / file.name
    if not (file.sha256 or file.blob):
        return False
    for place in _places(plan.way.repository, file, plan.store, plan.draft):
        if _is(place, file, advance):
            if place != path:
                path.unlink(missing_ok=True)
                link_or_copy(place.resolve(), path, advance)
            return True
    return False


def _is(place: Path, file: HubFile, advance: Callable[[int], None]) -> bool:
    digest = hashlib.sha256() if file.sha256 else hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
    count = 0
    with place.open("rb") as opened:
        while chunk := opened.read(_COPY):
            digest.update(chunk)
            count += len(chunk)
            advance(count)
    return count == file.size and digest.hexdigest() == (file.sha256 or file.blob)


def link_or_copy(source: Path, path: Path, advance: Callable[[int], None]) -> None:
    """Makes `path` the same as the file `source`: a hard link where the file system allows it, else a copy. Raises DoesNotFit, OSError."""
    with suppress(OSError):
        os.link(source, path)
        return
    temporary = path.with_name(f"{path.name}.copy")
    with files.disk_errors(path, source.stat().st_size), source.open("rb") as origin, temporary.open("wb") as copy:
        count = 0
        while chunk := origin.read(_COPY):
            copy.write(chunk)
            count += len(chunk)
            advance(count)
    temporary.replace(path)


# Checking, converting, publishing


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
            seal = partial(_seal, plan, model)
            wanted.append(Wanted(model.target, folder, file, False, lambda: None, overwrite=True, seal=seal))
        identity = plan.source_hash or f"{repository.id} {repository.revision}"
        bounded = plan.discard_source and repository.kind == "original"
        keep = any(model.target is None for model in plan.models)
        fetching = Fetching(missing, source, _beside(source), identity, keep=keep, discard=plan.discard_source, bounded=bounded)
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
        make(source, wanted, Options(name=plan.title, arrivals=None if repository.is_local else fetching), advance)
        if keep:
            fetching.finish()


def _seal(plan: PullPlan, model: Model, _: Checkpoint, folder: Path) -> None:
    Store.unseal(folder)
    Store.seal(folder, _describe(plan, model, folder, [path.name for path in folder.iterdir() if path.is_file()]))


def _describe(plan: PullPlan, model: Model, folder: Path, names: Sequence[str]) -> Manifest:
    """The manifest of the files `names` in `folder`."""
    repository = plan.way.repository
    known = {file.name: file.sha256 for file in plan.way.files if file.sha256} if model.target is None else {}
    listed = tuple(ManifestFile(name, (folder / name).stat().st_size, known.get(name) or files.sha256(folder / name)) for name in sorted(names))
    kind = plan.way.format if model.target is None else model.target.format
    if kind == "gguf":
        gguf = open_gguf(min(folder / name for name in names if name.endswith(".gguf")))
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

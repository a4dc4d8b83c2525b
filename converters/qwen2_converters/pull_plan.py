"""What a pull will do: fetch, convert and install, in bytes of network, disk and memory, before anything of it is done."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qwen2_converters.again import Order
from qwen2_converters.download import read_range
from qwen2_converters.fetching import AHEAD
from qwen2_converters.here import begun, places
from qwen2_converters.hub import sources
from qwen2_converters.hub.asked import Asked
from qwen2_converters.hub.choose import ORIGINAL, Choice, Way
from qwen2_converters.hub.preflight import Licence, Shape, check_keys, converted_bytes, disk_needed, fits, licence_of, memory_at, shape_of
from qwen2_converters.hub.repository import level_of, source_hash
from qwen2_converters.hub.speed import last_speed
from qwen2_converters.target import Target
from qwen2_local import files, fit
from qwen2_local.errors import BadFile, UsageError
from qwen2_local.files import refuse_clashes
from qwen2_local.formats.gguf import salvage_gguf
from qwen2_local.store import GUIDE, Store

_PEEK = 1 << 20
_ENDINGS = re.compile(r"(-(gguf|mlx|awq|gptq|int[48]|[2-8]bit|bf16|fp?16|i1))+$")


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
    unfinished. discard_source: each shard of the original is deleted once it is converted. order: what was asked for, to go on with.
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
    order: Order
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


def plan_pull(asked: Asked, choice: Choice, store: Store, memory: fit.Memory, order: Order) -> PullPlan:
    """What taking the best way of `choice` means here. Raises as `pull.prepare` does."""
    way, repository = choice.best, choice.best.repository
    refuse_clashes((file.name for file in way.files), repository.id)
    keys = _peek(way) if way.format == "gguf" and asked.model is None and not repository.config else None
    if keys is not None:
        check_keys(keys, repository.id)
    base = asked.model.name if asked.model else _slug(repository.id)
    models = tuple(_model(store, way, base, order.install_as.lower(), target) for target in ([None] if way.label else []) + list(way.targets))
    draft = models[0].name if models[0].target is None else f"{base}:{ORIGINAL}"
    todo = [model for model in models if model.state != "current"]
    missing = [file for file in way.files if next(places(repository, file, store, draft), None) is None]
    if missing and repository.cached:
        sources.remote(repository, missing[0])  # raises Offline
    fetch = sum(file.size - min(file.size, begun(store.unfinished(draft), file)) for file in missing)
    discard = order.discard_source and bool(way.targets) and not way.label and not repository.is_local
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
        order=order, speed=last_speed(), discard_source=discard,
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

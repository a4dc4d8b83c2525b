"""What models there are on this computer, what Qwen2 there are in the world, and what this machine has for them. Reads headers and folders only."""

from __future__ import annotations

from dataclasses import dataclass

from qwen2_local import advice, files, fit, kvcache, paths, store
from qwen2_local.advice import Advice
from qwen2_local.sanitize import clean_line


@dataclass(frozen=True, slots=True)
class Installed:
    """An installed model, or the guide. form: its format and quantization; why it cannot be used, where size is None."""

    name: str
    form: str
    size: int | None
    context: int

    @property
    def built_in(self) -> bool:
        """Is it the guide?"""
        return self.name == store.GUIDE


@dataclass(frozen=True, slots=True)
class Inventory:
    """All of it. disk_free: bytes where models are kept."""

    installed: tuple[Installed, ...]
    advices: tuple[Advice, ...]
    memory: fit.Memory
    disk_free: int

    def levels_of(self, name: str) -> tuple[str, ...]:
        """The quantizations in which the model `name` of the catalog is installed."""
        return tuple(one.name.partition(":")[2] for one in self.installed if one.name.partition(":")[0] == name)


def take() -> Inventory:
    """Look at everything, for some milliseconds: in a thread."""
    from qwen2_local.cli.models import listed

    installed = []
    for one in listed():
        size, context = one["bytes"], one["context"]
        installed.append(
            Installed(
                clean_line(str(one["name"])), clean_line(str(one["format"])), size if isinstance(size, int) else None,
                context if isinstance(context, int) else 0,
            )
        )  # fmt: skip
    installed.sort(key=lambda one: (not one.built_in, one.name))
    memory, disk = fit.machine_memory(), files.free_bytes(paths.models())
    return Inventory(tuple(installed), tuple(advice.advise(memory, disk)), memory, disk)


def details(name: str) -> dict[str, str]:
    """What `qwen2-local show` says of a model. Raises UnknownModel, BadFile, UnsupportedModel."""
    from qwen2_local.cli.models import known, shown

    return {clean_line(key): shown(value) for key, value in known(store.resolve(name)).items()}


def kept_texts(name: str) -> int:
    """Bytes that the KV cache holds of texts that the model has read."""
    return sum(one.bytes for one in kvcache.Disk(paths.kv()).stored() if one.model == name)


def remove(name: str) -> None:
    """Delete an installed model, and what it keeps of texts, as `qwen2-local rm` does. Raises UnknownModel, UsageError, OSError."""
    store.Store().remove(name)
    kvcache.Disk(paths.kv()).clear(name)

"""What a stopped pull needs to go on: its order, kept beside what it has brought so far, and freed with it.

models/.qwen2-partial-7b@q4_k_m/pull.json     written before the first byte comes
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from qwen2_local import files
from qwen2_local.errors import UsageError
from qwen2_local.store import Store

_FILE = "pull.json"
_MOST = 1 << 16


@dataclass(frozen=True, slots=True)
class Order:
    """What was asked for: the arguments of `pull.prepare` as text. A path is absolute."""

    name: str
    targets: tuple[str, ...] = ()
    original: bool = False
    revision: str = ""
    source: str = ""
    install_as: str = ""
    discard_source: bool = False


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A pull that was begun. draft: where the store keeps it. models: what it will install. total: bytes fetched and written in the end.

    kept: bytes of it on the disk.
    """

    order: Order
    title: str
    draft: str
    models: tuple[str, ...]
    total: int
    kept: int


def remember(folder: Path, order: Order, title: str, models: Sequence[str], total: int) -> None:
    """Keeps the order in `folder`, where the store keeps the pull's unfinished work."""
    kept = {"order": asdict(order), "title": title, "models": list(models), "total": total}
    files.write_atomic(folder / _FILE, json.dumps(kept))


def unfinished(store: Store) -> list[Unfinished]:
    """All pulls that were begun and may go on, also those that are under way. What is damaged is left out; never raises for what lies there."""
    found = []
    for draft in store.drafts():
        with suppress(OSError, ValueError, TypeError, KeyError, RecursionError, UsageError):
            found.append(_read(store, draft))
    return found


def free(store: Store, pull: Unfinished) -> None:
    """Deletes what is kept of it. Raises UsageError while somebody works on it, and where the store cannot be written."""
    for name in {pull.draft, *pull.models}:
        if store.kept(name):
            store.forget(name)


def tidy(store: Store, draft: str, models: Sequence[str]) -> None:
    """Deletes what a pull that was killed at its very end has left: its models are installed. Leaves alone what another pull needs, or works on."""
    try:
        needed = not set(_read(store, draft).models) <= set(models)
    except (OSError, ValueError, TypeError, KeyError, RecursionError, UsageError):
        needed = False  # the order comes first and goes with the rest: this was being deleted
    for name in {*models} if needed else {draft, *models}:
        if store.unfinished(name).parent.is_dir():
            with suppress(UsageError):
                store.forget(name)


def _read(store: Store, draft: str) -> Unfinished:
    path = store.unfinished(draft).with_name(_FILE)
    with path.open("rb") as file:
        kept = json.loads(file.read(_MOST))
    asked = kept["order"]
    order = Order(**{**asked, "targets": tuple(map(str, asked["targets"]))})
    models = tuple(map(str, kept["models"]))
    for text in (order.name, order.revision, order.source, order.install_as, kept["title"]):
        if not isinstance(text, str) or text.startswith("-"):
            raise ValueError(f"{path} is damaged")
    total = int(kept["total"])
    return Unfinished(order, kept["title"], draft, models, total, sum(map(store.kept, {draft, *models})))

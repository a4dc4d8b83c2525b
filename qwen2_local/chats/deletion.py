"""Chats go with what models have computed of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

from qwen2_local import kvcache
from qwen2_local.chats.store import ChatStore
from qwen2_local.errors import UnknownChat

UNDO_S = 600.0
"""How long a chat stays in the trash, where another process may still take it out again."""


def delete(store: ChatStore, chats: Sequence[int], *, disk: kvcache.Disk, forget: Callable[[Sequence[str]], None] | None = None) -> None:
    """Deletes chats for good, and the KV that no other chat has. forget: deletes KV chunks; by default, those on `disk`.

    If a chat broke off with its process, nobody wrote down what KV it had: then all goes that is not known to be another chat's. That
    costs time, as what is missing is computed again, but no text.
    """

    def remove(names: Sequence[str]) -> None:
        for name in names:
            disk.remove(name)

    def forget_all(names: Sequence[str]) -> None:
        if broke_off:
            kept = store.chunk_names(but=chats)
            remove([name for name in disk.names() if name not in kept])
        (forget or remove)(names)

    broke_off = store.kept and store.broke_off(chats)
    store.delete(chats, forget=forget_all)


def purge(
    store: ChatStore, *, disk: kvcache.Disk, forget: Callable[[Sequence[str]], None] | None = None, for_s: float = UNDO_S, chats: Sequence[int] = ()
) -> None:
    """Deletes for good, as `delete` does, the chats that have been in the trash for so many seconds, and `chats` of the trash at once."""
    trashed = set(store.trashed())
    going = [chat for chat in dict.fromkeys((*store.trashed(for_s=for_s), *chats)) if chat in trashed]
    if going:
        with suppress(UnknownChat):  # another process was faster
            delete(store, going, disk=disk, forget=forget)

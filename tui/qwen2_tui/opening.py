"""What the app begins with: which model, loaded how, and which chat."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from typing import Any

from qwen2_local.chats import ChatStore
from qwen2_local.errors import Qwen2LocalError
from qwen2_tui.model import DEFAULT, LoadWish
from qwen2_tui.settings import ModelSettings

_FIELDS = {one.name for one in fields(LoadWish)}


@dataclass(frozen=True, slots=True)
class Opening:
    """What a person asked for on the command line; see `run`."""

    model: str | None = None
    chat: int | None = None
    continue_last: bool = False
    temporary: bool = False
    loads: Mapping[str, Any] = field(default_factory=dict)


def wish_of(opening: Opening, settings: ModelSettings, name: str) -> LoadWish:
    """How to load the model `name`: as the command line says; where it is silent, as the settings do."""
    wish = LoadWish(name, settings.backend, settings.context, settings.kv_bits or 16, settings.draft)
    return replace(wish, **{key: value for key, value in opening.loads.items() if key in _FIELDS and value is not None})


def first_model(opening: Opening, settings: ModelSettings, store: ChatStore) -> str:
    """The model that the app begins with: that of the command line; of the chat that goes on; of the settings; of the last chat; the guide.

    Looks at the disk, so it is for a thread.
    """
    return opening.model or _of_chat(opening, store) or settings.model or _last_used(store) or DEFAULT


def _of_chat(opening: Opening, store: ChatStore) -> str:
    with suppress(Qwen2LocalError):
        if opening.chat is not None:
            return store.summary(opening.chat).model
        if opening.continue_last:
            return _newest(store)
    return ""


def _last_used(store: ChatStore) -> str:
    """The model of the last chat, if it is still there."""
    from qwen2_local.store import resolve

    with suppress(Qwen2LocalError):
        name = _newest(store)
        if name:
            resolve(name)
        return name
    return ""


def _newest(store: ChatStore) -> str:
    newest = max(store.summaries(), key=lambda one: (one.used, one.id), default=None)
    return newest.model if newest is not None else ""

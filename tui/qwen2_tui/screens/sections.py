"""What stands in the sections of the settings screen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from textual.widget import Widget
from textual.widgets import Static

from qwen2_local.sanitize import clean_line
from qwen2_tui.fields import CHAT, LOOK, MODEL, Field
from qwen2_tui.settings import ChatSettings
from qwen2_tui.theme import OURS
from qwen2_tui.widgets.fieldrow import FieldRow
from qwen2_tui.widgets.keylist import KeyList
from qwen2_tui.widgets.presets import Presets

if TYPE_CHECKING:
    from qwen2_tui.app import QwenApp

SECTIONS = {"chat": "this chat", "new": "every new chat", "model": "model", "presets": "presets", "look": "look", "keys": "keys"}
_WORDS = {
    "chat": "How replies are asked for in this chat. An empty value is the model's own.",
    "new": "What every new chat begins with, and every chat has that has nothing else.",
    "model": "Which model, and how it is loaded. When one of these changes, the model is loaded anew.",
    "presets": "Settings of a chat under a name. Enter shows what can be done with one.",
    "look": "How the app looks.",
    "keys": "Enter asks for other keys, which hold at once. A dot marks those that are not the usual ones.",
}


def contents(app: QwenApp, name: str) -> Iterator[Widget]:
    """What is in the section `name`."""
    yield Static(_WORDS[name], classes="words", markup=False)
    match name:
        case "chat":
            yield from _chat_rows(app, app.chat_screen.chat_settings, base=app.settings.chat)
        case "new":
            yield from _chat_rows(app, app.settings.chat, base=None)
        case "model":
            for one in MODEL:
                names = ("guide", *_installed()) if one.name in ("model", "draft") else ()
                note = f"Installed: {', '.join(names)}." if one.name == "model" else ""
                yield FieldRow(one, getattr(app.settings.model, one.name), note=note, suggestions=names)
        case "presets":
            yield Presets()
        case "look":
            for one in LOOK:
                themes = [*OURS, *sorted(set(app.available_themes) - set(OURS.values()))] if one.name == "theme" else ()
                yield FieldRow(one, getattr(app.settings, one.name), choices=themes)
        case "keys":
            yield KeyList()


def _chat_rows(app: QwenApp, chat: ChatSettings, *, base: ChatSettings | None) -> Iterator[FieldRow]:
    """base: what every new chat has, where this is one chat."""
    fixed = base is not None and not app.chat_screen.session.conversation.empty
    for one in CHAT:
        value, note = getattr(chat, one.name), ""
        if one.name == "system" and fixed:
            first = app.chat_screen.session.conversation.messages[0]
            value = first.text if first.role == "system" else None
            note = "A chat keeps the one that it began with; the next one may have another."
        elif base is not None and getattr(base, one.name) not in (None, False):
            note = f"Every new chat: {clean_line(one.show(getattr(base, one.name)))[:60]}."
        yield FieldRow(one, value, unset=_unset(app, one), note=note, fixed=one.name == "system" and fixed)


def _unset(app: QwenApp, one: Field) -> str:
    """What holds where nothing is given, with the loaded model's own value."""
    model = app.host.model
    own = None
    if model is not None and one.unset == "the model's own":
        own = model.default_system if one.name == "system" else getattr(model.sampling, one.name)
    return one.unset if own is None else f"{one.unset}: {clean_line(one.show(own))}"


def _installed() -> Sequence[str]:
    from qwen2_local.store import Store

    return [clean_line(one.name) for one in Store().list()]

"""The command palette: everything that can be done, by name."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from textual.app import SystemCommand
from textual.screen import Screen

from qwen2_tui.theme import OURS

if TYPE_CHECKING:
    from qwen2_tui.app import QwenApp


def commands(app: QwenApp, screen: Screen[Any]) -> Iterable[SystemCommand]:
    """Those of the open screen and of the chat, then the app's own."""
    for shown in dict.fromkeys((screen, app.chat_screen)):
        if hasattr(shown, "commands"):
            yield from shown.commands()
    from qwen2_tui import arrange

    yield from arrange.commands(app)
    for id, title, words, act in (
        ("app.new", "New chat", "", app.action_new),
        ("app.temporary", "New temporary chat", "leaves nothing on the disk", app.action_temporary),
        ("app.search", "Search chats", "titles and texts", app.action_search),
        ("app.sidebar", "Show or hide chats", "", app.action_sidebar),
        ("app.undo", "Undo the deletion of chats", "", app.action_undo),
        ("app.models", "Models", "fetch, switch, verify, remove", app.action_models),
        ("app.settings", "Settings", "this chat, every new chat, the model, the look", app.action_settings),
        ("app.help", "Help", "all keys", app.action_help),
    ):
        yield SystemCommand(title, " · ".join(filter(None, (app.key_of(id), words))), act)
    yield SystemCommand("Presets", "settings of a chat under a name", partial(app.open_settings, "presets"))
    yield SystemCommand("Keys", "change what keys do", partial(app.open_settings, "keys"))
    yield SystemCommand("Compare two models", "one prompt, side by side", app.open_compare)
    if app.host.state.phase in ("ready", "failed"):
        yield SystemCommand("Restart the model", "load it again", partial(app.host.restart, safe=False))
        yield SystemCommand("Restart the model in safe mode", "slower, without special matrix code", partial(app.host.restart, safe=True))
    for short, full in OURS.items():
        yield SystemCommand(f"Theme: {short}", "calm colours", partial(setattr, app, "theme", full))
    yield SystemCommand("Theme: choose", "from all that there are", app.action_change_theme)
    yield SystemCommand("Quit", f"{app.key_of('app.quit')} · nothing is lost", app.action_quit)

"""All keys, to be changed."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, cast

from textual import on
from textual.content import Content
from textual.keys import Keys, _character_to_key
from textual.widgets import OptionList
from textual.widgets.option_list import Option

from qwen2_local.sanitize import clean_line
from qwen2_tui.keys import BY_ID, PLACES, TABLE, clashes, shown
from qwen2_tui.widgets.dialogs import Ask

if TYPE_CHECKING:
    from qwen2_tui.app import QwenApp

_MODIFIERS = {"ctrl", "shift", "alt", "super", "hyper", "meta"}
_NAMES = {key.value for key in Keys if not re.search("[+<>]", key.value)}
_PEOPLES = {"esc": "escape", "page up": "pageup", "page down": "pagedown", "return": "enter", "del": "delete", "ins": "insert"}


class KeyList(OptionList):
    """A row for each; enter asks for other keys, which hold at once."""

    DEFAULT_CSS = "KeyList { height: 1fr; border: none; padding: 0; background: $background; &:focus { border: none; } }"

    def __init__(self) -> None:
        super().__init__(markup=False)

    def on_mount(self) -> None:
        """Fills it."""
        self.show()

    def show(self) -> None:
        """What the keys are now."""
        wanted = cast("QwenApp", self.app).settings.keys
        options: list[Option] = []
        for place, title in PLACES.items():
            rows = [key for key in TABLE if key.where == place]
            if rows:
                options.append(Option(Content.styled(title, "bold"), disabled=True))
            for key in rows:
                mark = "•" if key.id in wanted else " "
                options.append(Option(Content(f" {mark} {clean_line(shown(wanted.get(key.id) or key.keys)):<24} {key.help or key.words}"), id=key.id))
        highlighted = self.highlighted
        self.clear_options()
        self.add_options(options)
        self.highlighted = highlighted

    @on(OptionList.OptionSelected)
    def _selected(self, event: OptionList.OptionSelected) -> None:
        event.stop()
        id = str(event.option_id)
        app = cast("QwenApp", self.app)
        key = BY_ID[id]
        words = f"Several with commas between them; nothing for {key.shown}. In the file it is called {id}."
        asked = Ask(f"Keys: {key.help or key.words}", shown(app.settings.keys.get(id) or key.keys), words=words, check=partial(self._problem, id))
        app.push_screen(asked, partial(self._answered, id))

    def _problem(self, id: str, typed: str) -> str:
        keys, problem = read_keys(typed)
        if problem or not keys:
            return problem
        bound = {key.id: cast("QwenApp", self.app).settings.keys.get(key.id) or key.keys for key in TABLE} | {id: keys}
        taken = next(((one, other, key) for one, other, key in clashes(bound) if id in (one, other)), None)
        if taken is None:
            return ""
        other = BY_ID[taken[1] if taken[0] == id else taken[0]]
        return f"{shown(taken[2])} is {other.help or other.words} already."

    def _answered(self, id: str, typed: str | None) -> None:
        if typed is None:
            return
        app = cast("QwenApp", self.app)
        keys, _ = read_keys(typed)
        wanted = {one: value for one, value in app.settings.keys.items() if one != id}
        if keys and keys != BY_ID[id].keys:
            wanted[id] = keys
        app.change_settings(replace(app.settings, keys=wanted))


def read_keys(typed: str) -> tuple[str, str]:
    """Keys that a person types, as Textual names them ("" for the usual ones); and what is wrong with them, in a sentence."""
    names = []
    for one in typed.split(","):
        name, problem = _read_key(one.strip())
        if problem and typed.strip():
            return "", problem
        names.append(name)
    return ("", "") if not typed.strip() else (",".join(names), "")


def _read_key(typed: str) -> tuple[str, str]:
    *modifiers, name = typed.lower().split("+") if len(typed) > 1 else [typed]
    name = _PEOPLES.get(name, name)
    if len(name) == 1 and name.isprintable():
        name = _character_to_key(name if modifiers else typed)
    elif name not in _NAMES:
        return "", f'There is no key "{clean_line(typed)[:30]}". Examples: ctrl+s, f9, page up, é.'
    if not set(modifiers) <= _MODIFIERS:
        return "", f"Before the + there may be {', '.join(sorted(_MODIFIERS))}."
    return "+".join([*modifiers, name]), ""

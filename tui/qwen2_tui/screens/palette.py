"""The command palette: everything that can be done, found by a few letters.

Textual's own takes its keys only once it is drawn, and on a busy machine loses what was typed before; and enter runs its first command, asked
for or not. Here all keys come to one place from the first on, and enter does what was searched for or chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from rich.cells import cell_len
from textual import events, on
from textual.app import ComposeResult, SystemCommand
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.fuzzy import Matcher
from textual.screen import ModalScreen
from textual.style import Style
from textual.widgets import OptionList, Static
from textual.widgets.option_list import Option

from qwen2_local.sanitize import clean_line

_MOVES = {"up": "cursor_up", "down": "cursor_down", "pageup": "page_up", "pagedown": "page_down", "home": "first", "end": "last"}
_MOST_TYPED = 100
_TITLE = 30
_QUIET = "$foreground 60%"
_FOUND = Style(bold=True, underline=True)


class Found(OptionList, can_focus=False):
    """What was found; the keys come through the screen."""


class PaletteScreen(ModalScreen[None]):
    """Finds one of `commands`, and does it."""

    DEFAULT_CSS = """
    PaletteScreen {
        align-horizontal: center;
        #palette { width: 80; max-width: 100%; height: auto; max-height: 100%; margin-top: 2; background: $surface; border: round $primary; }
        #typed { height: 1; padding: 0 1; }
        #found {
            height: auto; max-height: 18; border: none; padding: 0; background: $surface; margin-top: 1;
            scrollbar-size-vertical: 1; text-wrap: nowrap; text-overflow: ellipsis;
        }
        #found > .option-list--option { padding: 0 1; }
        #found > .option-list--option-highlighted { background: $primary 30%; color: $foreground; }
    }
    """
    AUTO_FOCUS = ""
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "dismiss", "close")]

    def __init__(self, commands: Sequence[SystemCommand]) -> None:
        super().__init__()
        self._commands = commands
        self._found: Sequence[SystemCommand] = commands
        self._typed = ""

    def compose(self) -> ComposeResult:
        """What is typed, and what is found."""
        with Vertical(id="palette"):
            yield Static(id="typed", markup=False)
            yield Found(id="found", compact=True)

    def on_mount(self) -> None:
        """All of them, at first."""
        self._search("")

    def on_key(self, event: events.Key) -> None:
        """Everything that is typed, in its order."""
        if event.key == "enter":
            self._do(self.query_one(Found).highlighted)
        elif event.key in _MOVES:
            getattr(self.query_one(Found), f"action_{_MOVES[event.key]}")()
        elif event.key == "backspace":
            self._search(self._typed[:-1])
        elif event.key in ("ctrl+u", "ctrl+w"):
            self._search("")
        elif event.is_printable and event.character:
            self._search(self._typed + event.character)
        else:
            return
        event.stop()

    def on_paste(self, event: events.Paste) -> None:
        """As if it had been typed."""
        event.stop()
        self._search(self._typed + event.text)

    @on(OptionList.OptionSelected)
    def _clicked(self, event: OptionList.OptionSelected) -> None:
        event.stop()
        self._do(event.option_index)

    def _search(self, typed: str) -> None:
        self._typed = clean_line(typed)[:_MOST_TYPED]
        matcher = Matcher(self._typed, match_style=_FOUND) if self._typed else None
        self._found = self._commands
        if matcher is not None:
            scored = [(matcher.match(one.title), -one.title.casefold().find(self._typed.casefold()), one) for one in self._commands]
            self._found = [one for score, _, one in sorted(scored, key=lambda rated: rated[:2], reverse=True) if score > 0]
        typed_line = Content.assemble(self._typed, ("▌", "$primary"), ("" if self._typed else " a few letters of what you want", _QUIET))
        self.query_one("#typed", Static).update(typed_line)
        found = self.query_one(Found)
        found.set_options([Option(self._line(matcher, one)) for one in self._found])
        # Enter does what was searched for, or chosen with the arrows: never what happens to come first.
        found.highlighted = 0 if self._typed and self._found else None
        if not self._found:
            found.set_options([Option(Content.styled("No command is called so.", _QUIET), disabled=True)])

    def _line(self, matcher: Matcher | None, one: SystemCommand) -> Content:
        title = clean_line(one.title)
        gap = " " * max(2, _TITLE - cell_len(title))
        return Content.assemble(matcher.highlight(title) if matcher else title, (gap + clean_line(one.help), _QUIET))

    def _do(self, place: int | None) -> None:
        if place is not None and place < len(self._found):
            command = self._found[place]
            self.dismiss()
            self.app.call_later(command.callback)

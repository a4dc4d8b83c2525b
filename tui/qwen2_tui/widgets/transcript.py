"""The conversation: role lines, Markdown, code, tables; only the lines that are seen are rendered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from rich.segment import Segment
from textual.binding import BindingType
from textual.geometry import Size
from textual.message import Message
from textual.reactive import reactive
from textual.scroll_view import ScrollView
from textual.strip import Strip

from qwen2_local.chats import State
from qwen2_local.sanitize import clean
from qwen2_local.types import Role
from qwen2_tui.keys import bind

Name = Literal["edit", "regenerate", "continue", "copy", "tokens", "prompt", "previous", "next", "write"]


@dataclass(frozen=True, slots=True)
class Turn:
    """A message as it is shown. number, count: which alternative of how many. footer: a quiet line under it."""

    key: int
    role: Role
    name: str
    text: str
    state: State = "whole"
    number: int = 1
    count: int = 1
    footer: str = ""


class Transcript(ScrollView, can_focus=True):
    """The conversation."""

    BINDINGS: ClassVar[list[BindingType]] = [
        bind("turn.up", "up"),
        bind("turn.down", "down"),
        bind("turn.page_up", "page_up"),
        bind("turn.page_down", "page_down"),
        bind("turn.first", "scroll_home"),
        bind("turn.last", "scroll_end"),
        bind("turn.edit", "act('edit')", show=True),
        bind("turn.regenerate", "act('regenerate')", show=True),
        bind("turn.continue", "act('continue')", show=True),
        bind("turn.copy", "act('copy')", show=True),
        bind("turn.code_next", "code(1)"),
        bind("turn.code_previous", "code(-1)"),
        bind("turn.tokens", "act('tokens')"),
        bind("turn.prompt", "act('prompt')"),
        bind("turn.previous", "act('previous')"),
        bind("turn.next", "act('next')"),
        bind("turn.write", "act('write')"),
    ]

    class Action(Message):
        """A key was pressed on the selected turn. index: which turn."""

        def __init__(self, name: Name, index: int) -> None:
            self.name, self.index = name, index
            super().__init__()

    selected: reactive[int | None] = reactive(None)
    code: reactive[int | None] = reactive(None)

    def __init__(self, *, id: str | None = None, classes: str | None = None) -> None:
        super().__init__(id=id, classes=classes)
        self._turns: list[Turn] = []
        self._lines: list[str] = []

    @property
    def turns(self) -> tuple[Turn, ...]:
        """What is shown; the text of a growing turn is what came of it."""
        return tuple(self._turns)

    def show(self, turns: Sequence[Turn], *, end: bool = True) -> None:
        """A whole conversation in place of what was there; at its end, or at its start."""
        self._turns = list(turns)
        self._changed(end=end)

    def append(self, turn: Turn) -> None:
        """One more turn at the end."""
        self._turns.append(turn)
        self._changed()

    def replace(self, index: int, turn: Turn) -> None:
        """Another turn in place of the one at `index`."""
        self._turns[index] = turn
        self._changed()

    def truncate(self, count: int) -> None:
        """Only the first `count` turns stay."""
        del self._turns[count:]
        self._changed()

    def begin_stream(self, turn: Turn) -> None:
        """One more turn at the end, which `feed` lets grow. Its text, if any, is what the reply begins with."""
        self.append(turn)

    def feed(self, text: str) -> None:
        """What came of the last turn."""
        last = self._turns[-1]
        self.replace(len(self._turns) - 1, Turn(last.key, last.role, last.name, last.text + text, last.state, last.number, last.count, last.footer))

    def end_stream(self, turn: Turn) -> None:
        """The last turn is whole: this is it."""
        self.replace(len(self._turns) - 1, turn)

    def selected_code(self) -> str | None:
        """The text of the focused code block."""
        return None

    def action_up(self) -> None:
        """Select the turn above."""
        if self._turns:
            self.selected = max(0, (len(self._turns) if self.selected is None else self.selected) - 1)

    def action_down(self) -> None:
        """Select the turn below."""
        if self._turns:
            self.selected = min(len(self._turns) - 1, (-1 if self.selected is None else self.selected) + 1)

    def action_act(self, name: Name) -> None:
        """Tell the screen that something is wanted of the selected turn."""
        if self.selected is not None:
            self.post_message(self.Action(name, self.selected))

    def action_code(self, step: int) -> None:
        """Focus the next or previous code block."""

    def on_resize(self) -> None:
        """Wrap again."""
        self._changed(end=False)

    def _changed(self, end: bool = True) -> None:
        if self.selected is not None and self.selected >= len(self._turns):
            self.selected = None
        width = max(self.size.width - 2, 10)
        self._lines = []
        for turn in self._turns:
            self._lines += ["", clean(turn.name)]
            for line in clean(turn.text).split("\n"):
                self._lines += [line[at : at + width] for at in range(0, len(line), width)] or [""]
        self.virtual_size = Size(self.size.width, len(self._lines))
        self.refresh()
        if end:
            self.scroll_end(animate=False, immediate=True)

    def render_line(self, y: int) -> Strip:
        """One visible line."""
        y += self.scroll_offset.y
        text = self._lines[y] if y < len(self._lines) else ""
        return Strip([Segment(text)])

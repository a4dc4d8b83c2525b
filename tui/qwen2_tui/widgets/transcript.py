"""The conversation: turns that stream, are selected with keys and mouse, and acted upon."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

from textual import events
from textual.binding import BindingType
from textual.message import Message
from textual.reactive import reactive

from qwen2_local.sanitize import clean
from qwen2_tui.keys import bind
from qwen2_tui.widgets.flow import Flow, Place, Turn
from qwen2_tui.widgets.window import Window

__all__ = ["Transcript", "Turn"]

Name = Literal["edit", "regenerate", "continue", "copy", "tokens", "prompt", "previous", "next", "write"]


class Transcript(Window, can_focus=True):
    """The conversation. Only what is seen of it is rendered, and while a reply streams, only what of it is still open."""

    BINDINGS: ClassVar[list[BindingType]] = [
        bind("turn.up", "turn(-1)"),
        bind("turn.down", "turn(1)"),
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
        bind("turn.tokens", "act('tokens')", show=True),
        bind("turn.prompt", "act('prompt')", show=True),
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
    """The turn that keys are about; marked while the conversation has the focus."""
    code: reactive[int | None] = reactive(None)
    """The focused code block of the selected turn."""

    def __init__(self, *, id: str | None = None, classes: str | None = None) -> None:
        super().__init__(id=id, classes=classes)
        self._fed: str | None = None  # the text of the turn that grows

    # What is shown

    @property
    def turns(self) -> tuple[Turn, ...]:
        """What is shown; the text of a growing turn is what came of it."""
        turns = self.flow.turns
        return turns if self._fed is None else (*turns[:-1], replace(turns[-1], text=self._fed))

    @property
    def at_end(self) -> bool:
        """The end is in sight, and stays so."""
        return self.follow

    def show(self, turns: Sequence[Turn], *, end: bool = True) -> None:
        """A whole conversation in place of what was there; at its end, or at its start."""
        self.flow = Flow(turns, self.text_width)
        self._fed = None
        self.place_at(0, end=end)
        self._select_last(only_if=self.has_focus)
        self.changed(unsettled=True)

    def append(self, turn: Turn) -> None:
        """One more turn at the end. Who wrote it sees it."""
        self.flow.append(turn)
        self.follow = self.follow or turn.role == "user"
        self.changed(came=True)

    def replace(self, index: int, turn: Turn) -> None:
        """Another turn in place of the one at `index`."""
        self.flow.replace(index, turn)
        self.changed(unsettled=True)

    def truncate(self, count: int) -> None:
        """Only the first `count` turns stay."""
        self.flow.truncate(count)
        self._fed = None
        if self.selected is not None and self.selected >= count:
            self._select_last()
        self.changed(unsettled=True)

    def begin_stream(self, turn: Turn) -> None:
        """One more turn at the end, which `feed` lets grow. Its text, if any, is what the reply begins with."""
        self.flow.append(turn)
        self.flow.grow()
        self._fed = clean(turn.text)
        self.changed(came=True)

    def feed(self, text: str) -> None:
        """What came of the last turn."""
        text = clean(text)
        if text and self._fed is not None:
            self._fed += text
            self.flow.feed(text)
            self.changed(came=True)

    def end_stream(self, turn: Turn) -> None:
        """The last turn is whole: this is it."""
        self.flow.end(turn, self._fed or "")
        self._fed = None
        self.changed()

    def selected_code(self) -> str | None:
        """The text of the focused code block, as it was written."""
        codes = self._codes()
        if self.selected is None or self.code is None or self.code >= len(codes):
            return None
        return self.flow[self.selected].document.code(self.code)

    # What the window asks

    def marked(self) -> int | None:
        """The selected turn, while keys go here."""
        return self.selected if self.has_focus else None

    def focused(self) -> tuple[Place, Place] | None:
        """Where the focused code block is."""
        if self.code is None or self.selected is None or not self.has_focus or self.code >= len(codes := self._codes()):
            return None
        first, last = codes[self.code]
        return Place(self.selected, first, 0), Place(self.selected, last, 1 << 20)

    def growing(self) -> bool:
        """Whether a reply streams."""
        return self._fed is not None

    # Selecting

    def _codes(self) -> Sequence[tuple[int, int]]:
        """The code blocks of the selected turn."""
        if self.selected is None or self.selected >= len(self.flow):
            return ()
        return self.flow[self.selected].document.codes()

    def watch_selected(self) -> None:
        """The mark moves."""
        self.code = None
        if self.selected is not None and self.is_mounted:
            self.reveal(self.selected)
        self.repaint()
        self.refresh_bindings()

    def watch_code(self) -> None:
        """The focus moves to another code block."""
        if self.selected is not None and self.code is not None:
            self.reveal(self.selected, self._codes()[self.code])
        self.repaint()

    def on_focus(self) -> None:
        """Keys are about a turn: the last, unless another was selected."""
        if self.selected is None:
            self._select_last()
        self.repaint()

    def on_blur(self) -> None:
        """No turn is marked."""
        self.repaint()

    def _select_last(self, *, only_if: bool = True) -> None:
        """Whatever was selected is gone. Nothing is scrolled."""
        self.set_reactive(Transcript.selected, len(self.flow) - 1 if only_if and len(self.flow) else None)
        self.set_reactive(Transcript.code, None)
        if self.is_mounted:
            self.refresh_bindings()

    def action_turn(self, step: int) -> None:
        """Select the turn above or below."""
        if len(self.flow):
            here = self.selected if self.selected is not None else len(self.flow) if step < 0 else -1
            self.code = None
            self.selected = min(max(here + step, 0), len(self.flow) - 1)

    def action_act(self, name: Name) -> None:
        """Tell the screen that something is wanted of the selected turn."""
        if self.selected is not None:
            self.post_message(self.Action(name, self.selected))

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Which keys mean something on the selected turn."""
        if action != "act" or parameters == ("write",):
            return True
        if self.selected is None or self.selected >= len(self.flow):
            return False
        turn = self.flow[self.selected].turn
        match parameters[0]:
            case "previous" | "next":
                return turn.count > 1
            case "continue" | "tokens":
                return turn.role == "assistant"
            case "regenerate":  # of a question as well: it may have no reply yet
                return turn.role != "system"
        return True

    def action_code(self, step: int) -> None:
        """Focus the next or previous code block: from the focused one, or from what is seen."""
        if not len(self.flow):
            return
        here = self._here(step)
        turn = here.turn
        while 0 <= turn < len(self.flow):
            numbered = list(enumerate(Place(turn, first, 0) for first, _ in self.flow[turn].document.codes()))
            for number, place in numbered if step > 0 else reversed(numbered):
                if place > here if step > 0 else place < here:
                    self.selected, self.code = turn, number
                    return
            turn += step

    def _here(self, step: int) -> Place:
        """Where to look for code from: the focused block, or the edge of the window."""
        if (focused := self.focused()) is not None:
            return focused[0]
        y = self.scroll_offset.y
        top, bottom = self.flow.place(y), self.flow.place(min(y + self.size.height, self.flow.height) - 1)
        return top._replace(line=-1) if step > 0 else bottom

    def on_click(self, event: events.Click) -> None:
        """Selects the turn under the pointer, and the code block; or goes to the end."""
        if self.text_selection is not None or not len(self.flow):
            return
        if self.unseen and event.y == self.size.height - 1:
            self.action_scroll_end()
            return
        place = self.flow.place(self.scroll_offset.y + event.y)
        self.code = None
        self.selected = place.turn
        for number, (first, last) in enumerate(self._codes()):
            if first <= place.block <= last:
                self.code = number

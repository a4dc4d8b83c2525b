"""A setting to change: its name, its value, and a line that explains it or says what is wrong with what was typed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from textual import events, on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.reactive import reactive
from textual.suggester import SuggestFromList
from textual.widget import Widget
from textual.widgets import Input, Static, TextArea

from qwen2_local.sanitize import clean, clean_line
from qwen2_tui.fields import Field, Value
from qwen2_tui.widgets.dialogs import Line
from qwen2_tui.widgets.inturn import in_turn


class Pick(Static, can_focus=True):
    """One of a few values: left and right walk through them, so does a click."""

    ALLOW_SELECT = False
    DEFAULT_CSS = """
    Pick { height: 1; width: 1fr; &:focus { background: $boost; text-style: bold; } }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left", "walk(-1)", show=False),
        Binding("right,space,enter", "walk(1)", show=False),
    ]
    place: reactive[int] = reactive(0, init=False)

    @dataclass
    class Changed(Message):
        """Another value was picked."""

        pick: Pick

    def __init__(self, labels: Sequence[str], place: int) -> None:
        super().__init__(markup=False)
        self._labels = [clean_line(label) for label in labels]
        self.set_reactive(Pick.place, place)

    def on_mount(self) -> None:
        """Shows what is picked."""
        self._say()

    def watch_place(self) -> None:
        """Says so."""
        self._say()
        self.post_message(self.Changed(self))

    def _say(self) -> None:
        self.update(f"‹ {self._labels[self.place]} ›", layout=False)

    def action_walk(self, by: int) -> None:
        """To the next value, or the one before."""
        self.place = (self.place + by) % len(self._labels)

    def on_click(self, event: events.Click) -> None:
        """On its left end, the one before."""
        self.action_walk(-1 if event.x < 2 else 1)


class Prose(TextArea):
    """Several lines; up in the first and down in the last lead out of it."""

    async def on_key(self, event: events.Key) -> None:
        """No letter overtakes a key that was pressed before it."""
        await in_turn(self, event)

    def action_cursor_up(self, select: bool = False) -> None:
        """A line up."""
        if self.cursor_at_first_line and not select:
            self.screen.focus_previous()
        else:
            super().action_cursor_up(select)

    def action_cursor_down(self, select: bool = False) -> None:
        """A line down."""
        if self.cursor_at_last_line and not select:
            self.screen.focus_next()
        else:
            super().action_cursor_down(select)


class FieldRow(Widget):
    """A field with its value, to be changed. What is typed is checked at every key.

    unset: what holds where nothing is given; note: said behind the explanation; choices: of a line that can only be one of these.
    """

    DEFAULT_CSS = """
    FieldRow {
        layout: grid; grid-size: 2; grid-columns: 20 1fr; grid-rows: auto; height: auto; margin-bottom: 1;
        .name { color: $foreground; }
        .note { column-span: 2; color: $text-muted; height: auto; padding-left: 2; }
        &.-edited .name { color: $text-accent; text-style: bold; }
        &.-wrong .note { color: $text-error; }
        Line { background: $surface; &:focus { background: $boost; } }
        TextArea { height: auto; max-height: 8; border: none; padding: 0; background: $surface; &:focus { background: $boost; border: none; } }
    }
    """

    @dataclass
    class Changed(Message):
        """Its value, or what is wrong with it, is another now."""

        row: FieldRow

    def __init__(
        self,
        field: Field,
        value: Value | None,
        *,
        unset: str = "",
        note: str = "",
        choices: Sequence[str] = (),
        suggestions: Sequence[str] = (),
        fixed: bool = False,
    ) -> None:
        super().__init__(disabled=fixed)
        self.field = field
        self.value = self.original = value
        self.problem = self._said = ""
        self._unset, self._note, self._suggestions = clean_line(unset or field.unset), note, suggestions
        self._values: list[Value | None] = list(choices)
        if field.kind == "flag":
            self._values = [False, True]
        elif field.kind == "choice":
            self._values = [None, *(one for one in field.choices if str(one) != field.unset)]
        if self._values and value not in self._values:
            self._values.append(value)

    @property
    def edited(self) -> bool:
        """Is it other than it was, or would it be?"""
        return self.value != self.original or bool(self.problem)

    def compose(self) -> ComposeResult:
        """Name, value, explanation."""
        yield Static(self.field.title, classes="name", markup=False)
        if self._values:
            yield Pick([self._label(value) for value in self._values], self._values.index(self.value))
        elif self.field.kind == "text":
            yield Prose(self.field.show(self.value), compact=True, placeholder=self._unset, show_line_numbers=False)
        else:
            line = Line(self.field.show(self.value), placeholder=self._unset)
            line.suggester = SuggestFromList(self._suggestions) if self._suggestions else None
            line.select_on_focus = False
            yield line
        yield Static(classes="note", markup=False)

    def on_mount(self) -> None:
        """Says what it is."""
        self._say()

    def _label(self, value: Value | None) -> str:
        return self._unset if value is None else {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)

    def focus(self, scroll_visible: bool = True) -> FieldRow:
        """To where its value is typed."""
        self.query_one("Line, TextArea, Pick").focus(scroll_visible)
        return self

    def put(self, value: Value | None) -> None:
        """As if a person had given it this value."""
        text = self.field.show(value)
        if self._values:
            self.query_one(Pick).place = self._values.index(value)
            return
        if self.field.kind == "text":
            self.query_one(TextArea).text = text
        else:
            self.query_one(Line).value = text
        self._read(text)

    def settle(self, value: Value | None) -> None:
        """This is its value now; what a person has typed and not saved stays."""
        if value != self.original:
            untouched, self.original = not self.edited, value
            if untouched and (not self._values or value in self._values):
                self.put(value)
        self._say()

    @on(Input.Changed)
    def _typed(self, event: Input.Changed) -> None:
        event.stop()
        self._read(event.value)

    @on(TextArea.Changed)
    def _written(self, event: TextArea.Changed) -> None:
        event.stop()
        self._read(clean(event.text_area.text))

    @on(Pick.Changed)
    def _picked(self, event: Pick.Changed) -> None:
        event.stop()
        self.value = self._values[event.pick.place]
        self._say()

    def _read(self, text: str) -> None:
        # A value that was shown shorter than it is stays what it is.
        if text == self.field.show(self.original):
            self.value, self.problem = self.original, ""
        else:
            value, self.problem = self.field.parse(text)
            self.value = self.value if self.problem else value
        self._say()

    def _say(self) -> None:
        self.set_class(self.edited, "-edited")
        self.set_class(bool(self.problem), "-wrong")
        words = clean(self.problem or " ".join(part for part in (self.field.words, self._note) if part))
        if words != self._said:
            self._said = words
            self.query_one(".note", Static).update(words)
        self.post_message(self.Changed(self))

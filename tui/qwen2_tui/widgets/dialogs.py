"""Small questions above a screen: for a line, for a yes, for one of several. Escape always leaves with None, and changes nothing.

name = await self.app.push_screen_wait(Ask("Rename the chat", value=title))     # in a worker; or push_screen(..., callback)

Texts are cleaned here, and never read as markup.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from textual import events, on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Button, Input, OptionList, Static
from textual.widgets.option_list import Option

from qwen2_local.sanitize import clean, clean_line
from qwen2_tui.widgets.inturn import in_turn

_FRAME = """
    align: center middle;
    #dialog {
        width: 64; max-width: 100%; height: auto; max-height: 100%; padding: 0 1;
        border: round $primary; background: $surface; border-title-color: $foreground; border-title-style: bold;
    }
    .words { color: $text-muted; }
    #buttons { height: 1; margin-top: 1; align-horizontal: right; }
    #buttons Button { margin-left: 2; min-width: 0; }
"""


class Line(Input):
    """One line to type in. What is pasted or proposed cannot reach the terminal's controls."""

    def __init__(self, value: str = "", *, placeholder: str = "", id: str | None = None, compact: bool = True) -> None:
        super().__init__(clean_line(value), placeholder, id=id, compact=compact)

    async def on_key(self, event: events.Key) -> None:
        """No letter overtakes a key that was pressed before it."""
        await in_turn(self, event)

    def insert_text_at_cursor(self, text: str) -> None:
        """What is typed or pasted, in one line."""
        super().insert_text_at_cursor(clean_line(text))


class Ask(ModalScreen[str | None]):
    """Asks for a line of text; the answer has no space around it.

    check: what is wrong with a text, in a sentence, or ""; asked at every key, and while it has something to say, enter does nothing.
    """

    DEFAULT_CSS = f"""
    Ask {{ {_FRAME}
        #line {{ margin: 1 0; background: $boost; }}
        #problem {{ color: $text-error; display: none; }}
        #proposal {{ color: $text-accent; display: none; }}
        #problem.-said, #proposal.-said {{ display: block; }}
    }}
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss", "cancel"),
        Binding("tab", "take", "take the proposal", priority=True),
    ]

    def __init__(self, title: str, value: str = "", *, words: str = "", placeholder: str = "", check: Callable[[str], str] = lambda text: "") -> None:
        super().__init__()
        self._title, self._value, self._words, self._placeholder, self._check = title, value, words, placeholder, check
        self._proposal = ""

    def compose(self) -> ComposeResult:
        """Words, the line, and what there is to say of it."""
        with VerticalScroll(id="dialog", can_focus=False) as dialog:
            dialog.border_title = Content(clean_line(self._title))  # never markup
            if self._words:
                yield Static(clean(self._words), classes="words", markup=False)
            yield Line(self._value, placeholder=self._placeholder, id="line")
            yield Static(id="problem", markup=False)
            yield Static(id="proposal", markup=False)
            with Horizontal(id="buttons"):
                yield Button("ok · enter", id="ok", variant="primary", compact=True)
                yield Button("cancel · esc", id="cancel", compact=True)

    def propose(self, text: str) -> None:
        """Shows a text beside the line; only a person (tab, or a click) puts it into the line."""
        self._proposal = clean_line(text).strip()
        proposal = self.query_one("#proposal", Static)
        proposal.update(f"{self._proposal}  · tab takes it" if self._proposal else "")
        proposal.set_class(bool(self._proposal), "-said")

    @on(Input.Changed, "#line")
    def _look(self, event: Input.Changed) -> None:
        problem = self._check(event.value.strip())
        said = self.query_one("#problem", Static)
        said.update(clean(problem))
        # An empty line is no mistake yet; enter says what is missing.
        said.set_class(bool(problem and event.value), "-said")

    @on(Input.Submitted, "#line")
    @on(Button.Pressed, "#ok")
    def _answer(self) -> None:
        text = self.query_one("#line", Line).value.strip()
        problem = self._check(text)
        if problem:
            self.query_one("#problem", Static).update(clean(problem))
            self.query_one("#problem").add_class("-said")
        else:
            self.dismiss(text)

    @on(Button.Pressed, "#cancel")
    def _leave(self) -> None:
        self.dismiss(None)

    @on(events.Click, "#proposal")
    def _clicked(self) -> None:
        self.action_take()

    def action_take(self) -> None:
        """The proposal into the line; without one, on to the next field."""
        if not self._proposal:
            self.focus_next()
            return
        line = self.query_one("#line", Line)
        line.value = self._proposal
        line.cursor_position = len(line.value)
        line.focus()
        self.propose("")


class Confirm(ModalScreen[bool]):
    """Asks for a yes or a no; escape is a no. grave: what cannot be undone: then no is what enter says at first."""

    DEFAULT_CSS = f"Confirm {{ {_FRAME} }}"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,n", "answer(False)", "no"),
        Binding("y", "answer(True)", "yes"),
        Binding("left,up", "app.focus_previous", show=False),
        Binding("right,down", "app.focus_next", show=False),
    ]

    def __init__(self, title: str, words: str = "", *, yes: str = "yes", no: str = "no", grave: bool = False) -> None:
        super().__init__()
        self._title, self._words, self._yes, self._no, self._grave = title, words, yes, no, grave

    def compose(self) -> ComposeResult:
        """Words and two buttons."""
        with VerticalScroll(id="dialog", can_focus=False) as dialog:
            dialog.border_title = Content(clean_line(self._title))  # never markup
            if self._words:
                yield Static(clean(self._words), classes="words", markup=False)
            with Horizontal(id="buttons"):
                yield Button(Content(f"{clean_line(self._yes)} · y"), id="yes", variant="error" if self._grave else "primary", compact=True)
                yield Button(Content(f"{clean_line(self._no)} · n"), id="no", compact=True)

    def on_mount(self) -> None:
        """Enter does what does no harm."""
        self.query_one("#no" if self._grave else "#yes").focus()

    @on(Button.Pressed)
    def _pressed(self, event: Button.Pressed) -> None:
        self.action_answer(event.button.id == "yes")

    def action_answer(self, answer: bool) -> None:
        """Leaves with it."""
        self.dismiss(answer)


@dataclass(frozen=True, slots=True)
class Choice:
    """One of several. key: what `Choose` answers; note: a line on it; enabled: can it be chosen?"""

    key: str
    label: str
    note: str = ""
    enabled: bool = True


class Choose(ModalScreen[str | None]):
    """Asks for one of several; answers its key. A digit chooses at once."""

    DEFAULT_CSS = f"""
    Choose {{ {_FRAME}
        OptionList {{ height: auto; max-height: 16; padding: 0; margin-top: 1; background: $surface; }}
        OptionList, OptionList:focus {{ border: none; }}
    }}
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss", "cancel"),
        *(Binding(str(number), f"pick({number - 1})", show=False) for number in range(1, 10)),
    ]

    def __init__(self, title: str, choices: Sequence[Choice], *, words: str = "", chosen: str | None = None) -> None:
        super().__init__()
        self._title, self._choices, self._words, self._chosen = title, tuple(choices), words, chosen

    def compose(self) -> ComposeResult:
        """Words and the choices."""
        with VerticalScroll(id="dialog", can_focus=False) as dialog:
            dialog.border_title = Content(clean_line(self._title))  # never markup
            if self._words:
                yield Static(clean(self._words), classes="words", markup=False)
            yield OptionList(*(Option(self._row(number), disabled=not one.enabled) for number, one in enumerate(self._choices, 1)), markup=False)

    def on_mount(self) -> None:
        """The one chosen before, or the first."""
        options = self.query_one(OptionList)
        options.highlighted = next((place for place, one in enumerate(self._choices) if one.key == self._chosen), options.highlighted)

    def _row(self, number: int, /) -> Content:
        one = self._choices[number - 1]
        head = Content(f"{number if number < 10 else ' '} {clean_line(one.label)}")
        return head + Content.styled(f"\n  {clean_line(one.note)}", "dim") if one.note else head

    @on(OptionList.OptionSelected)
    def _selected(self, event: OptionList.OptionSelected) -> None:
        self.dismiss(self._choices[event.option_index].key)

    def action_pick(self, place: int) -> None:
        """The choice at `place`, if there is one."""
        if place < len(self._choices) and self._choices[place].enabled:
            self.dismiss(self._choices[place].key)

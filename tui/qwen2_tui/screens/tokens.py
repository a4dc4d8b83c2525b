"""A reply token by token, coloured by how likely each was; with what else could have come, and the way to go on from there."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from rich.style import Style
from rich.text import Text
from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.screen import ModalScreen
from textual.widgets import Footer, OptionList, Static
from textual.widgets.option_list import Option

from qwen2_local.errors import Qwen2LocalError
from qwen2_local.sanitize import clean
from qwen2_tui import keys
from qwen2_tui.scoring import STEPS, Alternative, Scored, alternatives, percent, scored, step, tokens_of, visible
from qwen2_tui.widgets.tokenflow import Flow

if TYPE_CHECKING:
    from qwen2_local.chat import Chat
    from qwen2_tui.model import Model


class Alternatives(OptionList):
    """What else could have come."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("enter", "select", "go on from here")]


class TokensScreen(ModalScreen[str | None]):
    """Of one reply. Ends with the text from which it is to go on, or None."""

    DEFAULT_CSS = """
    TokensScreen { background: $background; layout: vertical; }
    TokensScreen #title { height: 1; padding: 0 1; background: $panel; text-style: bold; }
    TokensScreen #words, TokensScreen #legend { height: auto; padding: 0 1; color: $text-muted; }
    TokensScreen #both { height: 1fr; margin-top: 1; }
    TokensScreen Flow { padding: 0 1; width: 1fr; }
    TokensScreen #side { width: 34; height: 100%; border-left: solid $panel; padding: 0 1; }
    TokensScreen.-narrow #both { layout: vertical; }
    TokensScreen.-narrow #side { width: 100%; height: 9; border-left: none; border-top: solid $panel; }
    TokensScreen #token { height: auto; }
    TokensScreen #alternatives { height: 1fr; border: none; padding: 0; background: $background; display: none; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q", "close", "close", show=True),
        keys.bind("tokens.left", "move(-1)"),
        keys.bind("tokens.right", "move(1)"),
        keys.bind("tokens.up", "line(-1)"),
        keys.bind("tokens.down", "line(1)"),
        keys.bind("tokens.first", "first"),
        keys.bind("tokens.last", "last"),
        keys.bind("tokens.unlikely", "unlikely", show=True),
        keys.bind("tokens.branch", "alternatives", show=True),
    ]
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (90, "-wide")]  # noqa: RUF012

    def __init__(self, model: Model, chat: Chat, turn: int) -> None:
        """turn: the number of a reply of `chat`."""
        super().__init__()
        self._model, self._chat, self._turn = model, chat, turn
        self._scored: Scored | None = None
        self._found: dict[int, tuple[Alternative, ...]] = {}

    def compose(self) -> ComposeResult:
        """Words, the tokens, and beside them the selected one with its alternatives."""
        yield Static("tokens and probabilities", id="title", markup=False)
        yield Static("reading the reply …", id="words", markup=False)
        yield Static(id="legend")
        with Horizontal(id="both"):
            yield Flow(id="flow")
            with Vertical(id="side"):
                yield Static(id="token")
                yield Alternatives(id="alternatives", compact=True)
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        """First the tokens, then how likely they were: both in a thread."""
        styles = self._styles()
        parts = [(f" {name} ", styles[name]) for _, name in STEPS]
        self.query_one("#legend", Static).update(Text.assemble(*(part for one in parts for part in (one, " "))))
        flow = self.query_one(Flow)
        self.watch(flow, "selected", lambda: self._show_token())
        flow.focus()
        self._read()

    def _styles(self) -> dict[str, Style]:
        """By colour, and by form: there are terminals without colours."""
        colours = self.app.theme_variables
        styles = {
            "": Style(),
            "sure": Style(),
            "likely": Style(color=colours["success"]),
            "open": Style(color=colours["accent"]),
            "doubtful": Style(color=colours["warning"], underline=True),
            "unlikely": Style(color=colours["error"], underline=True, bold=True),
        }
        mark = Style(bgcolor=colours["panel"], italic=True)
        return {**styles, **{f"{name} mark": style + mark for name, style in styles.items()}}

    @work(thread=True, group="read")
    def _read(self) -> None:
        try:
            tokens = tokens_of(self._model, self._chat, self._turn)
            self.app.call_later(self._show, tokens)
            if tokens.ids:
                self.app.call_later(self._show, scored(self._model, tokens))
        except Qwen2LocalError as error:
            words = clean(str(error))
            self.app.call_later(lambda: self._say(words))

    def _say(self, words: str) -> None:
        if self.is_attached:
            self.query_one("#words", Static).update(words)

    def _show(self, tokens: Scored) -> None:
        if not self.is_attached:
            return
        self._scored = tokens
        flow = self.query_one(Flow)
        flow.show(tokens.pieces, self._styles())
        self._say(tokens.words if tokens.ids else "The reply has no tokens.")
        if flow.selected is None and tokens.ids:
            flow.selected = 0
        self._show_token()

    def _show_token(self) -> None:
        selected, tokens = self.query_one(Flow).selected, self._scored
        if tokens is None or selected is None:
            return
        text = Text(f"{clean(visible(tokens.texts[selected]))}\n", "bold", overflow="ellipsis", no_wrap=True)
        text.append(f"token {selected + 1:,} of {len(tokens.ids):,} · id {tokens.ids[selected]:,}\n", "not bold")
        if tokens.probabilities:
            probability = tokens.probabilities[selected]
            text.append(f"{percent(probability)}", self._styles()[step(probability)])
        self.query_one("#token", Static).update(text)
        self._show_alternatives()

    def _show_alternatives(self) -> None:
        selected = self.query_one(Flow).selected
        found = self._found.get(-1 if selected is None else selected, ())
        options = self.query_one("#alternatives", OptionList)
        options.display = bool(found)
        options.set_options([Option(f"{percent(one.probability):>8}  {one.label}", disabled=one.text is None) for one in found])
        if not found and options.has_focus:
            self.query_one(Flow).focus()

    def action_move(self, by: int) -> None:
        """To the token before or behind."""
        flow = self.query_one(Flow)
        if flow.selected is not None and self._scored is not None:
            flow.selected = max(0, min(flow.selected + by, len(self._scored.ids) - 1))
            flow.focus()

    def action_line(self, by: int) -> None:
        """To the line above or below."""
        self.query_one(Flow).move_lines(by)

    def action_first(self) -> None:
        """To the first token."""
        self.action_move(-(2**31))

    def action_last(self) -> None:
        """To the last token."""
        self.action_move(2**31)

    def action_unlikely(self) -> None:
        """To the next token below 50 %, around the end."""
        flow, tokens = self.query_one(Flow), self._scored
        if tokens is None or flow.selected is None:
            return
        count = len(tokens.probabilities)
        places = (place % count for place in range(flow.selected + 1, flow.selected + 1 + count))
        flow.selected = next((place for place in places if tokens.probabilities[place] < 0.5), flow.selected)

    def action_close(self) -> None:
        """From the alternatives back to the tokens; else back to the chat."""
        if self.query_one("#alternatives").has_focus:
            self.query_one(Flow).focus()
        else:
            self.dismiss(None)

    def action_alternatives(self) -> None:
        """What else the model might have written here: it is asked once for each token."""
        selected, tokens = self.query_one(Flow).selected, self._scored
        if selected is None or tokens is None:
            return
        if selected in self._found:
            self._choose(selected)
        else:
            self._ask(tokens, selected)

    @work(thread=True, group="ask", exclusive=True)
    def _ask(self, tokens: Scored, place: int) -> None:
        try:
            found = alternatives(self._model, tokens, place)
        except Qwen2LocalError as error:
            words = clean(str(error))
            self.app.call_later(lambda: self._say(words))
            return
        self.app.call_later(self._answered, place, found)

    def _answered(self, place: int, found: tuple[Alternative, ...]) -> None:
        if self.is_attached:
            self._found[place] = found
            if self.query_one(Flow).selected == place:
                self._choose(place)

    def _choose(self, place: int) -> None:
        self._show_alternatives()
        if self._found[place]:
            options = self.query_one("#alternatives", OptionList)
            options.focus()
            options.action_first()

    @on(OptionList.OptionSelected)
    def _chosen(self, event: OptionList.OptionSelected) -> None:
        event.stop()
        selected = self.query_one(Flow).selected
        if selected is not None:
            self.dismiss(self._found[selected][event.option_index].text)

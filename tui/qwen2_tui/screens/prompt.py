"""The prompt as the model reads it: every token, control tokens marked, and what of it the KV cache has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rich.style import Style
from rich.text import Text
from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.screen import ModalScreen
from textual.widgets import Footer, Static

from qwen2_local.errors import Qwen2LocalError
from qwen2_local.sanitize import clean
from qwen2_tui import keys
from qwen2_tui.scoring import texts_of
from qwen2_tui.widgets.tokenflow import Flow, Piece

if TYPE_CHECKING:
    from qwen2_local.chat import Chat
    from qwen2_tui.model import Model


@dataclass(frozen=True, slots=True)
class Prompt:
    """Counts are tokens. known: whose KV is there now; then: that were there when the reply was written, None if it was not.

    marks: how many are control tokens.
    """

    pieces: tuple[Piece, ...]
    known: int
    then: int | None
    marks: int

    @property
    def words(self) -> str:
        """What is to be said of it, in a line."""
        total = len(self.pieces)
        words = f"{total:,} tokens, {self.marks:,} of them control tokens · KV cache: {self.known:,} now"
        return words if self.then is None else f"{words}, {self.then:,} when this reply was begun"


class PromptScreen(ModalScreen[None]):
    """For a turn of a chat: what its reply was, or would be, computed from."""

    DEFAULT_CSS = """
    PromptScreen { background: $background; layout: vertical; }
    PromptScreen #title { height: 1; padding: 0 1; background: $panel; text-style: bold; }
    PromptScreen #counts { height: auto; padding: 0 1; color: $text-muted; }
    PromptScreen #legend { height: auto; padding: 0 1; margin-bottom: 1; color: $text-muted; }
    PromptScreen Flow { padding: 0 1; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,p,q", "dismiss", "close"),
        keys.bind("prompt.copy", "copy", show=True),
    ]

    def __init__(self, model: Model, chat: Chat, turn: int) -> None:
        """turn: the number of a message of `chat`."""
        super().__init__()
        self._model, self._chat, self._turn = model, chat, turn
        self._text = ""

    def compose(self) -> ComposeResult:
        """Title, counts, the tokens."""
        yield Static("the raw prompt", id="title", markup=False)
        yield Static("counting …", id="counts", markup=False)
        yield Static(id="legend")
        yield Flow(id="flow")
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        """Long prompts take a moment, so they are read in a thread."""
        styles = self._styles()
        legend = Text.assemble((" <|mark|> ", styles["mark"]), " control token   ", (" text ", styles["new"]), " not in the KV cache: to be computed")
        self.query_one("#legend", Static).update(legend)
        self._read()

    def _styles(self) -> dict[str, Style]:
        colours = self.app.theme_variables
        mark = Style(color=colours["accent"], reverse=True)
        new = Style(bgcolor=colours["primary-muted"])
        return {"": Style(), "new": new, "mark": mark, "new mark": mark}

    @work(thread=True)
    def _read(self) -> None:
        try:
            prompt = prompt_of(self._model, self._chat, self._turn)
        except Qwen2LocalError as error:
            words = clean(str(error))
            self.app.call_later(self._say, words)
            return
        self.app.call_later(self._show, prompt)

    def _say(self, words: str) -> None:
        if self.is_attached:  # it may have been closed meanwhile
            self.query_one("#counts", Static).update(words)

    def _show(self, prompt: Prompt) -> None:
        if not self.is_attached:
            return
        self._text = "".join(piece.text for piece in prompt.pieces)
        self._say(prompt.words)
        self.query_one(Flow).show(prompt.pieces, self._styles())

    def action_copy(self) -> None:
        """The prompt as text, marks by their names."""
        self.app.copy_to_clipboard(clean(self._text))


def prompt_of(model: Model, chat: Chat, turn: int) -> Prompt:
    """Asks the model what it knows, so it is for a thread. Raises as `Chat.prompt` and the model do."""
    ids = chat.prompt(turn)
    known = model.known(ids)
    message = chat.messages[turn]
    marks = set(model.tokenizer.special.values())
    pieces = tuple(
        Piece(text, " ".join(filter(None, ("new" if place >= known else "", "mark" if token in marks else ""))), token in marks)
        for place, (token, text) in enumerate(zip(ids, texts_of(model.tokenizer, ids), strict=True))
    )
    # Of a reply that went on from a given beginning, that beginning may have been cached as well.
    then = min(message.usage.cached_tokens, len(pieces)) if message.usage else None
    return Prompt(pieces, known, then, sum(piece.mark for piece in pieces))

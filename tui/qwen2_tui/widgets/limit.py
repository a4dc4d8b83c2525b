"""A bar above the message that says what is the matter, with choices: the context is full, the model crashed, a reply broke off.

The choices have keys of their own (f5 to f8), so that they work while one writes; a click works as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from textual import on
from textual.app import ComposeResult
from textual.containers import ItemGrid, Vertical
from textual.content import Content
from textual.message import Message
from textual.widgets import Button, Static

from qwen2_local.sanitize import clean, clean_line
from qwen2_tui import keys
from qwen2_tui.conversation import Measure

LEAST_REPLY = 512
"""Tokens that should be left for a reply; less in a small context, see `fits`."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What a person can do about it. key: what the screen is told."""

    key: str
    label: str


@dataclass(frozen=True, slots=True)
class Offer:
    """What is the matter. kind: of which sort, so that a newer one of the same sort takes its place. grave: something failed."""

    kind: str
    words: str
    choices: tuple[Choice, ...] = ()
    grave: bool = False


def of_context(measure: Measure, *, turns: int, shortened: bool, bounded: bool) -> Offer | None:
    """The warning before a message would not fit, or leave too little for its reply; None while all is well.

    turns: of the conversation. shortened: old turns may be left out already. bounded: the context was limited by a setting.
    """
    if measure.left >= min(LEAST_REPLY, measure.most // 4):
        return None
    if measure.left <= 0:
        words = f"This does not fit: {measure.used:,} tokens, and the context holds {measure.most:,}, reply included."
    else:
        words = f"Only {measure.left:,} tokens are left for the reply ({measure.used:,} of {measure.most:,} are used)."
    choices = []
    if turns > 1 and not shortened:
        choices.append(Choice("shorten", "leave out the oldest"))
    if turns > 1:
        choices.append(Choice("summarise", "go on from a summary"))
        choices.append(Choice("new", "new chat"))
    if bounded:
        choices.append(Choice("larger", "larger context"))
    if not choices:
        words += " Write less, or attach less."
    return Offer("context", words, tuple(choices))


class OfferBar(Vertical):
    """Shows one offer, or nothing."""

    DEFAULT_CSS = """
    OfferBar {
        height: auto; display: none; padding: 0 1; border-left: outer $warning; background: $panel;
        &.-shown { display: block; }
        &.-grave { border-left: outer $error; }
        #words { height: auto; }
        ItemGrid { height: auto; grid-gutter: 0 1; }
        Button { min-width: 0; width: auto; height: 1; padding: 0 1; }
    }
    """

    class Chosen(Message):
        """A choice was made. kind, key: of the offer and of the choice."""

        def __init__(self, kind: str, key: str) -> None:
            self.kind, self.key = kind, key
            super().__init__()

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.offer: Offer | None = None

    def compose(self) -> ComposeResult:
        """Words, and as many buttons as there may be choices."""
        yield Static(id="words", markup=False)
        with ItemGrid(min_column_width=26):
            for number in range(1, 5):
                button = Button("", id=f"choice-{number}", compact=True)
                button.can_focus = False
                yield button

    def show(self, offer: Offer | None) -> None:
        """Shows `offer`; None: nothing is the matter."""
        if offer == self.offer:
            return
        self.offer = offer
        self.set_class(offer is not None, "-shown")
        self.set_class(offer is not None and offer.grave, "-grave")
        choices: Sequence[Choice] = offer.choices if offer is not None else ()
        self.query_one("#words", Static).update(clean(offer.words) if offer is not None else "")
        self.query_one(ItemGrid).display = bool(choices)
        for number in range(1, 5):
            button = self.query_one(f"#choice-{number}", Button)
            button.display = number <= len(choices)
            if number <= len(choices):
                button.label = Content(f"{self._key(number)} {clean_line(choices[number - 1].label)}")

    def hide(self, *kinds: str) -> None:
        """Takes an offer of these sorts away; with none given, any."""
        if self.offer is not None and (not kinds or self.offer.kind in kinds):
            self.show(None)

    def choose(self, number: int) -> bool:
        """Makes the choice `number`, counted from 1. Is there one?"""
        offer = self.offer
        if offer is None or number > len(offer.choices):
            return False
        self.post_message(self.Chosen(offer.kind, offer.choices[number - 1].key))
        return True

    def _key(self, number: int) -> str:
        wanted = getattr(self.app, "key_of", None)
        return str(wanted(f"offer.{number}")) if wanted is not None else keys.BY_ID[f"offer.{number}"].shown

    @on(Button.Pressed)
    def _pressed(self, event: Button.Pressed) -> None:
        event.stop()
        self.choose(int((event.button.id or "0")[-1]))

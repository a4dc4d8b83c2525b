"""One of two that are compared: who it is, what it says, and the numbers under it."""

from __future__ import annotations

from textual.app import ComposeResult
from textual.containers import Vertical
from textual.content import Content
from textual.message import Message
from textual.widgets import Button, Static

from qwen2_local.errors import Qwen2LocalError
from qwen2_local.sanitize import clean, clean_line
from qwen2_tui.contest import Contender, Result
from qwen2_tui.live import LiveReply
from qwen2_tui.widgets.transcript import Transcript, Turn


class Side(Vertical):
    """A column, or a row where there is no room for two columns."""

    DEFAULT_CSS = """
    Side { width: 1fr; height: 1fr;
        Button { width: 100%; min-width: 0; background: $panel; color: $foreground; text-align: left; content-align: left middle; }
        Button:focus { background: $primary 30%; text-style: bold; }
        Transcript { height: 1fr; }
        .numbers { height: auto; max-height: 3; padding: 0 1; color: $text-muted; }
    }
    """

    class Wanted(Message):
        """Another model is wanted here. place: 0 or 1."""

        def __init__(self, place: int) -> None:
            super().__init__()
            self.place = place

    def __init__(self, place: int) -> None:
        super().__init__(id=f"side{place}")
        self.place = place
        self.contender: Contender | None = None
        self.live: LiveReply | None = None
        self._turn = Turn(0, "assistant", "", "")

    def compose(self) -> ComposeResult:
        """From top to bottom."""
        yield Button("", compact=True)
        yield Transcript()
        yield Static("", classes="numbers", markup=False)

    def name_it(self, contender: Contender) -> None:
        """Who it is."""
        self.contender = contender
        settings = f"  {contender.settings}" if contender.settings else ""
        self.query_one(Button).label = Content(clean_line(f" {contender.name}{settings} ▾"))
        self.clear()

    def clear(self) -> None:
        """Nothing is said yet."""
        self.live = None
        self.query_one(Transcript).show([])
        self.say("")

    def say(self, words: str) -> None:
        """In the place of the numbers."""
        self.query_one(".numbers", Static).update(clean(words))

    def begin(self, live: LiveReply) -> None:
        """Its reply is on its way."""
        self.live = live
        self._turn = Turn(self._turn.key + 1, "assistant", "reply", "")
        transcript = self.query_one(Transcript)
        transcript.show([])
        transcript.begin_stream(self._turn)

    def draw(self, result: Result) -> None:
        """What came since, and the numbers."""
        if self.live is not None:
            text = self.live.take()
            if text:
                self.query_one(Transcript).feed(text)
            self.say(result.words)

    def end(self, result: Result) -> None:
        """It is over: the last of it, or what went wrong."""
        live = self.live
        if live is None:
            return
        self.draw(result)
        transcript = self.query_one(Transcript)
        text = transcript.turns[-1].text if transcript.turns else ""
        transcript.end_stream(Turn(self._turn.key, "assistant", self._turn.name, text))
        if isinstance(live.error, Qwen2LocalError):
            self.say(f"{live.error}")
        elif live.error is not None:
            self.say(f"{type(live.error).__name__}: {live.error}")

    def on_button_pressed(self, event: Button.Pressed) -> None:
        """Another one is wanted."""
        event.stop()
        self.post_message(self.Wanted(self.place))

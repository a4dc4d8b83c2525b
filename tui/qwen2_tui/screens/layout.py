"""What the chat screen is made of, and where it is."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, cast

from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical
from textual.screen import Screen
from textual.widgets import Footer, Static

from qwen2_tui.conversation import Conversation
from qwen2_tui.session import Session
from qwen2_tui.widgets.composer import Composer
from qwen2_tui.widgets.limit import OfferBar
from qwen2_tui.widgets.sidebar import Sidebar
from qwen2_tui.widgets.statusline import StatusLine
from qwen2_tui.widgets.topline import TopLine
from qwen2_tui.widgets.transcript import Transcript
from qwen2_tui.widgets.welcome import Welcome

if TYPE_CHECKING:
    from qwen2_tui.app import QwenApp


class ChatLayout(Screen[None]):
    """Widgets, and nothing that they do. session: the conversation that is shown."""

    # Not CSS: of the app's first screen, Textual does not read that.
    DEFAULT_CSS = """
    ChatLayout {
        #body { height: 1fr; }
        #main { width: 1fr; }
        #transcript { height: 1fr; }
        #notes { height: auto; max-height: 4; padding: 0 2; color: $text-muted; display: none; }
    }
    """

    def compose(self) -> ComposeResult:
        """From the top to the bottom."""
        self.session = Session(Conversation(self.qwen.store))
        yield TopLine()
        with Horizontal(id="body"):
            yield Sidebar(self.qwen.store, shown=self.qwen.settings.sidebar, id="sidebar")
            with Vertical(id="main"):
                yield Welcome(id="welcome")
                yield Transcript(id="transcript")
                yield OfferBar(id="offers")
                yield Static(id="notes", markup=False)
                yield Composer(id="composer")
        yield StatusLine(id="status")
        yield Footer(show_command_palette=False)

    @property
    def qwen(self) -> QwenApp:
        """The app, by its own type."""
        return cast("QwenApp", self.app)

    @cached_property
    def sidebar(self) -> Sidebar:
        """The list of chats."""
        return self.query_one("#sidebar", Sidebar)

    @cached_property
    def transcript(self) -> Transcript:
        """The conversation."""
        return self.query_one("#transcript", Transcript)

    @cached_property
    def offers(self) -> OfferBar:
        """What is the matter, with choices."""
        return self.query_one("#offers", OfferBar)

    @cached_property
    def notes(self) -> Static:
        """A line above the message."""
        return self.query_one("#notes", Static)

    @cached_property
    def composer(self) -> Composer:
        """The message."""
        return self.query_one("#composer", Composer)

    @cached_property
    def status(self) -> StatusLine:
        """The numbers."""
        return self.query_one("#status", StatusLine)

    def show_turns(self) -> None:
        """The conversation, or the welcome where there is none."""
        empty = self.session.conversation.empty and not self.session.running
        self.query_one("#welcome", Welcome).display = empty
        self.transcript.display = not empty

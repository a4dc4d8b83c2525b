"""What is shown where a terminal is too small for anything else."""

from __future__ import annotations

from textual import events
from textual.app import ComposeResult
from textual.screen import ModalScreen
from textual.widgets import Static

WIDTH, HEIGHT = 60, 20
"""The least that the app needs, in cells."""


class SmallScreen(ModalScreen[None]):
    """A friendly line. A reply goes on behind it; the app takes it away when there is room."""

    DEFAULT_CSS = """
    SmallScreen { align: center middle; background: $background; }
    SmallScreen Static { width: 100%; height: auto; text-align: center; padding: 0 1; }
    """

    def compose(self) -> ComposeResult:
        """The line."""
        yield Static(id="words", markup=False)

    def on_mount(self) -> None:
        """Say how small it is."""
        self._say()

    def on_resize(self, event: events.Resize) -> None:
        """Say it again."""
        self._say()

    def _say(self) -> None:
        size = self.app.size
        words = f"A little more room, please: {WIDTH}x{HEIGHT}. This is {size.width}x{size.height}. Nothing is lost meanwhile."
        self.query_one("#words", Static).update(words)

"""A place for the chat screen until it is there."""

from __future__ import annotations

from collections.abc import Iterable

from textual.app import ComposeResult, SystemCommand
from textual.screen import Screen
from textual.widgets import Footer, Static

from qwen2_tui.widgets.topline import TopLine


class ChatScreen(Screen[None]):
    """Nothing yet."""

    def compose(self) -> ComposeResult:
        yield TopLine()
        yield Static("chat")
        yield Footer()

    def new_chat(self, temporary: bool = False) -> None: ...
    def open_chat(self, number: int) -> None: ...
    def search(self) -> None: ...
    def toggle_sidebar(self) -> None: ...
    def undo(self) -> None: ...
    def back(self) -> None: ...
    def leave(self) -> None: ...
    def stop(self) -> bool:
        return False
    def commands(self) -> Iterable[SystemCommand]:
        return ()

"""What works everywhere: the global keys, the screens that they open, and the clipboard."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

from textual.app import App, SystemCommand
from textual.binding import BindingType
from textual.screen import ModalScreen, Screen
from textual.widgets import Input, TextArea

from qwen2_local.sanitize import clean
from qwen2_tui import keys
from qwen2_tui.screens.chat import ChatScreen
from qwen2_tui.screens.small import HEIGHT, WIDTH, SmallScreen

_AGAIN_S = 3.0
_HIDDEN_BY_MODALS = {"command_palette", "new", "temporary", "search", "sidebar", "models", "settings", "help", "undo"}


class Everywhere(App[None]):
    """The app as its keys see it: the chat, and what is opened over it."""

    BINDINGS: ClassVar[list[BindingType]] = [
        keys.bind("app.palette", "command_palette", priority=True),
        keys.bind("app.help", "help", priority=True),
        keys.bind("app.new", "new", priority=True),
        keys.bind("app.temporary", "temporary", priority=True),
        keys.bind("app.search", "search", priority=True),
        keys.bind("app.sidebar", "sidebar", priority=True),
        keys.bind("app.models", "models", priority=True),
        keys.bind("app.settings", "settings", priority=True),
        keys.bind("app.undo", "undo"),
        keys.bind("app.interrupt", "interrupt", priority=True),
        keys.bind("app.back", "back"),
        keys.bind("app.quit", "quit", priority=True),
    ]

    def __init__(self) -> None:
        super().__init__()
        self.chat_screen = ChatScreen()
        self._interrupted = 0.0

    def tell(self, text: str, *, problem: bool = False) -> None:
        """A sentence for the person, beside what is going on."""
        self.notify(clean(text), severity="warning" if problem else "information", markup=False, timeout=8 if problem else 4)

    # Screens

    def get_default_screen(self) -> Screen[Any]:
        """The chat: everything else is opened from there."""
        return self.chat_screen

    def open_models(self) -> None:
        """The models: sizes, installed ones, fetches."""
        from qwen2_tui.screens.models import ModelsScreen

        self._open(ModelsScreen)

    def open_settings(self, section: str = "chat") -> None:
        """The settings, at one of their sections."""
        from qwen2_tui.screens.settings import SettingsScreen

        if not isinstance(self.screen, SettingsScreen):
            self.push_screen(SettingsScreen(section))

    def open_compare(self) -> None:
        """Two models beside each other."""
        from qwen2_tui.screens.compare import CompareScreen

        self._open(CompareScreen)

    def open_help(self) -> None:
        """The keys, and where the documentation lies."""
        from qwen2_tui.screens.help import HelpScreen

        self._open(HelpScreen)

    def action_command_palette(self) -> None:
        """All commands, by name."""
        self.open_palette(list(self.get_system_commands(self.screen)))

    def open_palette(self, commands: Sequence[SystemCommand]) -> None:
        """To find one of these, and do it."""
        from qwen2_tui.screens.palette import PaletteScreen

        self.push_screen(PaletteScreen(commands))

    def action_change_theme(self) -> None:
        """To choose one of all the themes that there are."""
        self.open_palette([SystemCommand(name, "", partial(setattr, self, "theme", name)) for name in sorted(self.available_themes)])

    def show_chat(self) -> ChatScreen:
        """Close what is open over the chat."""
        while len(self.screen_stack) > 1 and self.screen is not self.chat_screen:
            self.pop_screen()
        return self.chat_screen

    def _open(self, kind: Callable[[], Screen[Any]]) -> None:
        if not isinstance(self.screen, kind):  # type: ignore[arg-type]
            self.push_screen(kind())

    def on_resize(self) -> None:
        """Too small is said, instead of shown."""
        self.call_later(self._fit)

    def _fit(self) -> None:
        if self.size.width < WIDTH or self.size.height < HEIGHT:
            self._open(SmallScreen)
        elif isinstance(self.screen, SmallScreen):
            self.pop_screen()

    # Keys

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Below a dialog nothing changes."""
        return not (action in _HIDDEN_BY_MODALS and isinstance(self.screen, ModalScreen))

    def action_new(self) -> None:
        """A new chat."""
        self.show_chat().new_chat()

    def action_temporary(self) -> None:
        """A new chat that leaves nothing."""
        self.show_chat().new_chat(temporary=True)

    def action_search(self) -> None:
        """To the search of the list of chats."""
        self.show_chat().search()

    def action_sidebar(self) -> None:
        """Show or hide the list of chats."""
        self.show_chat().toggle_sidebar()

    def action_undo(self) -> None:
        """Bring back the chats that were deleted last."""
        self.show_chat().undo()

    def action_models(self) -> None:
        """Open the models."""
        self.open_models()

    def action_settings(self) -> None:
        """Open the settings."""
        self.open_settings()

    def action_help(self) -> None:
        """Open the help."""
        self.open_help()

    async def action_back(self) -> None:
        """Close what is open, or let the chat go back a step."""
        if self.screen is self.chat_screen:
            self.chat_screen.back()
        elif len(self.screen_stack) > 1:
            self.pop_screen()

    def action_interrupt(self) -> None:
        """Copy what is selected; else stop what is under way, on the open screen or in the chat; else quit at the second time."""
        selected = self._selected()
        if selected:
            self.copy_to_clipboard(selected)
            self.screen.clear_selection()
        elif any(screen.stop() for screen in dict.fromkeys((self.screen, self.chat_screen)) if hasattr(screen, "stop")):
            self._interrupted = 0.0
        elif time.monotonic() - self._interrupted < _AGAIN_S:
            self.quit_soon()
        else:
            self._interrupted = time.monotonic()
            self.tell("Press ctrl+c again to quit.")

    def _selected(self) -> str | None:
        focused = self.focused
        if isinstance(focused, (TextArea, Input)) and focused.selected_text:
            return focused.selected_text
        return self.screen.get_selected_text()

    def copy_to_clipboard(self, text: str) -> None:
        """To the terminal's clipboard (OSC 52), and to this machine's own where there is one; says what was done."""
        text = clean(text)
        super().copy_to_clipboard(text)
        from qwen2_tui.clipboard import copied

        threading.Thread(target=lambda: self.call_later(self.tell, copied(text)), name="qwen2-local copies", daemon=True).start()

    def quit_soon(self) -> None:
        """Quit, from wherever."""
        self.run_worker(self.action_quit(), name="quit")

"""The app's first line: the program, the model with its quantization and backend, how it is, and where all commands are."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, cast

from rich.cells import cell_len, set_cell_size
from rich.text import Text
from textual.widgets import Static

if TYPE_CHECKING:
    from qwen2_tui.app import QwenApp
    from qwen2_tui.host import HostState

_SIGNS = {"empty": "○", "loading": "◌", "ready": "●", "failed": "✕"}


class TopLine(Static):
    """One line, the same on every screen."""

    DEFAULT_CSS = """
    TopLine { dock: top; height: 1; padding: 0 1; background: $panel; color: $text-muted; }
    """
    _COLOURS: ClassVar = {"empty": "foreground", "loading": "warning", "ready": "success", "failed": "error"}

    def on_mount(self) -> None:
        """Follow the app's model."""
        self.watch(self.app, "host_state", self._changed)
        self.watch(self.app, "theme", self._changed, init=False)

    def on_resize(self) -> None:
        """What does not fit is left out, the least important first."""
        self._changed()

    def _changed(self, *_: object) -> None:
        app = cast("QwenApp", self.app)
        self.update(line(app.host_state, app.about_model(), app.key_of("app.palette"), self.size.width, app.theme_variables))


def line(state: HostState, about: tuple[str, ...], palette: str, width: int, colours: dict[str, str]) -> Text:
    """about: the model's name, quantization and backend. palette: the key of the commands. width: in cells."""
    right = f"{_SIGNS[state.phase]} {_words(state)}"
    commands = f"    {palette} commands"
    left = [f"qwen2-local   {' · '.join(about[: len(about) - less])}" for less in range(len(about))] or ["qwen2-local"]
    for tail in (commands, ""):
        for shown in (*left, about[0] if about else ""):
            if cell_len(shown) + cell_len(right) + cell_len(tail) + 2 <= width:
                return _text(shown, right, tail, width, colours[TopLine._COLOURS[state.phase]])
    return _text("", set_cell_size(right, max(width, 0)).rstrip(), "", width, colours[TopLine._COLOURS[state.phase]])


def _text(left: str, right: str, tail: str, width: int, colour: str) -> Text:
    text = Text(left, no_wrap=True)
    if left.startswith("qwen2-local"):
        text.stylize("bold", 0, len("qwen2-local"))
    text.append(" " * (width - cell_len(left) - cell_len(right) - cell_len(tail)))
    text.append(right, colour)
    text.append(tail)
    return text


def _words(state: HostState) -> str:
    if state.phase == "ready":
        return "ready in safe mode" if state.wish.safe else "ready"
    if state.phase == "failed":
        return "the model crashed" if state.crashed else "no model"
    return state.words or "one moment"

"""F1: every key, as it is set now, and where more is written."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, cast

from rich.cells import cell_len
from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Static

import qwen2_local
from qwen2_local import paths
from qwen2_local.sanitize import clean, clean_line
from qwen2_tui import logfile
from qwen2_tui.keys import PLACES, TABLE, Where

if TYPE_CHECKING:
    from qwen2_tui.app import QwenApp

_FIRST = (
    "Type a question and press {write.send}. {app.back} stops the reply and keeps what came. {app.palette} finds every command by its name.",
    "tab goes from the message to the conversation and on to the chats; in the conversation, the keys below work on the selected turn.",
    "@ and a path in a message attaches a text file.",
)


class HelpScreen(ModalScreen[None]):
    """Made from the table of keys, so it cannot say what is not so."""

    DEFAULT_CSS = """
    HelpScreen { align: center middle; }
    HelpScreen #help {
        width: 92; max-width: 100%; height: 100%; padding: 0 2; border: round $primary; background: $surface; scrollbar-size-vertical: 1;
        border-title-style: bold; border-title-color: $foreground; border-subtitle-color: $text-muted;
    }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,f1,q", "dismiss", "close"),
        Binding("down,j", "move('scroll_down')", show=False),
        Binding("up,k", "move('scroll_up')", show=False),
        Binding("pagedown,space", "move('scroll_page_down')", show=False),
        Binding("pageup", "move('scroll_page_up')", show=False),
        Binding("home,g", "move('scroll_home')", show=False),
        Binding("end,G", "move('scroll_end')", show=False),
    ]

    def compose(self) -> ComposeResult:
        """One long page, to scroll."""
        with VerticalScroll(id="help", can_focus=False) as page:
            page.border_title, page.border_subtitle = "help", "esc closes"
            yield Static(id="page")

    def on_resize(self) -> None:
        """Words are broken for the width that there is."""
        app = cast("QwenApp", self.app)
        width = max(20, min(92, self.size.width) - 7)
        self.query_one("#page", Static).update(page(app.key_of, width, app.theme_variables["primary"]))

    def action_move(self, how: str) -> None:
        """Scroll, at once."""
        getattr(self.query_one("#help"), how)(animate=False)


def page(key_of: Callable[[str], str], width: int, colour: str) -> Text:
    """The help in lines of at most `width` cells. key_of: the keys of a row of the table. colour: of headings."""
    text = Text()
    for line in _FIRST:
        for key in TABLE:
            line = line.replace(f"{{{key.id}}}", key_of(key.id))
        _paragraph(text, line, width)
    for place in PLACES:
        rows = [(key_of(key.id), key.help or key.words) for key in TABLE if key.where == place]
        if rows:
            _section(text, place, rows, width, colour)
    text.append("\nMore\n", f"bold {colour}")
    for line in more():
        _paragraph(text, line, width)
    return text


def more() -> Iterable[str]:
    """Where more is to be found, all of it on this machine."""
    docs = Path(qwen2_local.__file__).parents[1] / "docs"
    if (docs / "architecture.md").is_file():
        yield f"The documentation lies in {clean(str(docs))}: app.md is about this screen, cli.md about the commands."
    else:
        yield "The documentation comes with the source code, in the folder docs: app.md is about this screen, cli.md about the commands."
    yield "`qwen2-local --help` lists the commands, `qwen2-local doctor` looks at this machine. The guide, which is always there, answers questions."
    yield f"Keys and all settings: {clean_line(str(paths.home() / 'settings.toml'))}, section [keys]. The log: {clean_line(str(logfile.path()))}."


def _section(text: Text, place: Where, rows: list[tuple[str, str]], width: int, colour: str) -> None:
    text.append(f"\n{PLACES[place]}\n", f"bold {colour}")
    column = min(max(cell_len(keys) for keys, _ in rows), width * 2 // 5)
    for keys, words in rows:
        if cell_len(keys) > column:
            text.append(f"  {keys}\n", "bold")
            keys = ""
        first = True
        for line in _wrapped(words, width - column - 4):
            text.append(f"  {keys if first else '':<{column}}", "bold")
            text.append(f"  {line}\n")
            first = False


def _paragraph(text: Text, words: str, width: int) -> None:
    for line in _wrapped(words, width):
        text.append(f"{line}\n")


def _wrapped(words: str, width: int) -> list[str]:
    from textwrap import wrap

    return wrap(words, max(width, 10), break_on_hyphens=False) or [""]

"""All that is known of a model, in a box to scroll."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Static

from qwen2_local.sanitize import clean_line


class DetailsScreen(ModalScreen[None]):
    """Names and values, one a line."""

    DEFAULT_CSS = """
    DetailsScreen { align: center middle;
        #details {
            width: 88; max-width: 100%; height: auto; max-height: 100%; padding: 0 1;
            border: round $primary; background: $surface; border-title-color: $foreground; border-title-style: bold;
        }
    }
    """
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,i,q", "dismiss", "close")]

    def __init__(self, title: str, facts: Mapping[str, str]) -> None:
        super().__init__()
        self._title, self._facts = title, facts

    def compose(self) -> ComposeResult:
        """One line for each."""
        with VerticalScroll(id="details") as box:
            box.border_title, box.border_subtitle = Content(clean_line(self._title)).markup, "esc closes"
            width = max(map(len, self._facts), default=0) + 2
            yield Static(
                Content("\n").join(Content.assemble((name.ljust(width), "$text-muted"), clean_line(value)) for name, value in self._facts.items())
            )

"""Tokens as running text: each a piece with a style of its own, broken at the width as a terminal would, only the seen lines drawn.

For raw views, so no word is moved: a line ends where the text or the width does. A newline is seen as ↵.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.geometry import Region, Size
from textual.message import Message
from textual.reactive import reactive
from textual.scroll_view import ScrollView
from textual.strip import Strip

from qwen2_local.sanitize import clean


@dataclass(frozen=True, slots=True)
class Piece:
    """A token's text, and the name of the style it is shown in. mark: a control token, shown by its name."""

    text: str
    style: str = ""
    mark: bool = False


@dataclass(frozen=True, slots=True)
class Run:
    """A part of a line: cells from `column` on, of the piece number `piece`."""

    column: int
    text: str
    piece: int


def laid(pieces: Sequence[Piece], width: int) -> list[list[Run]]:
    """The lines of `pieces` at so many cells. A piece may lie in several, and one without text in none."""
    width = max(width, 2)
    lines: list[list[Run]] = [[]]
    column = 0
    for number, piece in enumerate(pieces):
        for rank, part in enumerate(clean(piece.text).expandtabs(4).split("\n")):
            if rank:
                if column >= width:
                    lines.append([])
                    column = 0
                lines[-1].append(Run(column, "↵", number))
                lines.append([])
                column = 0
            while part:
                room = width - column
                head, part = _cut(part, room)
                if head:
                    lines[-1].append(Run(column, head, number))
                    column += cell_len(head)
                if part:
                    lines.append([])
                    column = 0
    return lines


def _cut(text: str, room: int) -> tuple[str, str]:
    """What fits into so many cells, and the rest."""
    if len(text) <= room and cell_len(text) <= room:
        return text, ""
    used = 0
    for place, letter in enumerate(text):
        used += cell_len(letter)
        if used > room:
            return text[:place], text[place:]
    return text, ""


class Flow(ScrollView, can_focus=True):
    """Shows pieces; one of them may be selected."""

    DEFAULT_CSS = """
    Flow { height: 1fr; scrollbar-size-vertical: 1; background: $background; }
    """

    selected: reactive[int | None] = reactive(None)

    class Selected(Message):
        """A piece was clicked, or moved to."""

        def __init__(self, piece: int) -> None:
            super().__init__()
            self.piece = piece

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._pieces: Sequence[Piece] = ()
        self._styles: dict[str, Style] = {}
        self._lines: list[list[Run]] = [[]]
        self._where: list[tuple[int, int]] = []
        self._width = 0

    @property
    def pieces(self) -> Sequence[Piece]:
        """What is shown."""
        return self._pieces

    def show(self, pieces: Sequence[Piece], styles: dict[str, Style]) -> None:
        """Other pieces; styles by the names that they use."""
        same = [piece.text for piece in pieces] == [piece.text for piece in self._pieces]
        self._pieces, self._styles = pieces, styles
        if same and self._width:
            self.refresh()
        else:
            self._lay()

    def on_resize(self) -> None:
        """Other widths break elsewhere."""
        if self.size.width != self._width:
            self._lay()

    def _lay(self) -> None:
        self._width = self.size.width
        if not self._width:
            return
        self._lines = laid(self._pieces, self._width)
        places: dict[int, tuple[int, int]] = {}
        for row, line in enumerate(self._lines):
            for run in line:
                places.setdefault(run.piece, (row, run.column))
        last = (0, 0)
        self._where = [last := places.get(number, last) for number in range(len(self._pieces))]
        self.virtual_size = Size(self._width, len(self._lines))
        self.refresh()
        self._reveal()

    def watch_selected(self) -> None:
        """It is always seen."""
        self.refresh()
        self._reveal()

    def _reveal(self) -> None:
        if self.selected is not None and self.selected < len(self._where):
            self.scroll_to_region(Region(0, self._where[self.selected][0], 1, 1), animate=False, immediate=True)

    def move_lines(self, by: int) -> None:
        """Select what lies so many lines below the selected piece."""
        if self.selected is None or not self._where:
            return
        row, column = self._where[self.selected]
        row = max(0, min(row + by, len(self._lines) - 1))
        while 0 < row < len(self._lines) - 1 and not self._lines[row]:
            row += 1 if by > 0 else -1
        if self._lines[row]:
            self.selected = self._at(row, column)

    def _at(self, row: int, column: int) -> int:
        line = self._lines[row]
        return line[max(0, bisect_right([run.column for run in line], column) - 1)].piece

    def on_click(self, event: events.Click) -> None:
        """Select what was clicked."""
        row, column = event.y + self.scroll_offset.y, event.x
        if self.selected is not None and row < len(self._lines) and self._lines[row]:
            self.selected = self._at(row, column)
            self.post_message(self.Selected(self.selected))

    def render_line(self, y: int) -> Strip:
        """One line that is seen."""
        base = self.rich_style
        row = y + self.scroll_offset.y
        if row >= len(self._lines):
            return Strip.blank(self.size.width, base)
        segments = []
        for run in self._lines[row]:
            piece = self._pieces[run.piece]
            style = base + self._styles.get(piece.style, Style.null())
            if run.piece == self.selected:
                style += Style(reverse=True)
            segments.append(Segment(run.text, style))
        return Strip(segments).adjust_cell_length(self.size.width, base)

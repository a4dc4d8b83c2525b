"""A line of the conversation to a strip of the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len, set_cell_size
from rich.segment import Segment
from rich.style import Style
from textual.strip import Strip

from qwen2_tui.markdown.ink import Kind, ink
from qwen2_tui.markdown.render import Line
from qwen2_tui.widgets.palette import Palette

MARGIN = 2  # columns left of the text: the mark of the selected turn is there
HINT = " ↓ more below · end "
_EDGE = ink(Kind.EDGE)


@dataclass(frozen=True, slots=True)
class Look:
    """How a line is drawn, apart from what it says. marked: of the selected turn; focused: of the focused code; cursor: where text comes."""

    palette: Palette
    width: int
    marked: bool = False
    focused: bool = False
    cursor: bool = False


def drawn(line: Line, look: Look, span: tuple[int, int] | None) -> Strip:
    """The line, exactly as wide as wanted. span: characters that are selected, -1 for the end. What was drawn last serves again."""
    if span is not None:
        return _draw(line, look, span)
    if not isinstance(line.drawn, _Drawn) or line.drawn.look != look:
        line.drawn = _Drawn(look, _draw(line, look, None))
    return line.drawn.strip


@dataclass(frozen=True, slots=True)
class _Drawn:
    look: Look
    strip: Strip


def _draw(line: Line, look: Look, span: tuple[int, int] | None) -> Strip:
    palette, width = look.palette, look.width
    segments: list[Segment] = []
    cells = MARGIN
    for text, colour in line.runs:
        if look.focused and colour == _EDGE:
            segments.append(Segment("▌", palette.named("focused")))
        else:
            segments.append(Segment(text, palette[colour]))
        cells += cell_len(text)
    if span is not None:
        segments = _selected(segments, max(span[0], line.start), span[1], palette.selection)
    if look.cursor and cells + 2 <= width:
        segments.append(Segment("▌", palette.named("marked")))
        cells += 1
    if cells < width:
        segments.append(Segment(" " * (width - cells), palette.blank))
    margin = Segment("▌ ", palette.named("marked")) if look.marked else Segment("  ", palette.blank)
    return Strip([margin, *segments], max(cells, width)).crop(0, width)


def hinted(strip: Strip, palette: Palette) -> Strip:
    """The strip with the hint that there is more below."""
    width = strip.cell_length
    hint = set_cell_size(HINT, min(len(HINT), width))
    return Strip([*strip.crop(0, width - len(hint)), Segment(hint, palette.named("hint"))], width)


def _selected(segments: Sequence[Segment], start: int, end: int, style: Style) -> list[Segment]:
    """The segments, with the characters from `start` to before `end` (-1: all from there) in the style of what is selected."""
    made: list[Segment] = []
    at = 0
    for text, base, _ in segments:
        left = min(max(start - at, 0), len(text))
        right = len(text) if end < 0 else min(max(end - at, left), len(text))
        parts = ((text[:left], base), (text[left:right], base + style if base else style), (text[right:], base))
        made += [Segment(part, look) for part, look in parts if part]
        at += len(text)
    return made

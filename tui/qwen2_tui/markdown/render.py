"""A block to lines of a width."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import takewhile

from rich.cells import cell_len

from qwen2_tui.markdown.blocks import Block, Frame
from qwen2_tui.markdown.ink import BOLD, Kind, Run, ink
from qwen2_tui.markdown.inline import closed, runs
from qwen2_tui.markdown.table import layout
from qwen2_tui.markdown.wrap import chop, wrap

MEASURE = 100  # cells: longer lines of prose tire the eye
WIDE = 140  # cells of code and tables
_BAR: Run = ("▎ ", ink(Kind.LINE))


@dataclass(slots=True)
class Line:
    """A line as it is drawn. start: how many characters at its start are not text (the bars of quotes, the margin of code).

    joint: what stands between its text and that of the next line where both are copied. drawn: room for what the widget made of it.
    """

    runs: list[Run]
    start: int = 0
    joint: str = "\n"
    drawn: object = field(default=None, compare=False)

    @property
    def text(self) -> str:
        """Its characters, margins and all."""
        return "".join([text for text, _ in self.runs])


def render(block: Block, width: int) -> list[Line]:
    """The lines of a block, each at most `width` cells, the free line before it included."""
    shown = _shown(block.frames, width // 2)
    first = [_mark(frame, fresh=place >= len(block.frames) - block.fresh) for place, frame in enumerate(shown)]
    later = [_mark(frame, fresh=False) for frame in shown]
    margin = sum(cell_len(text) for text, _ in later)
    made: list[Line] = []
    if block.gap:
        outer = later[: len(block.frames) - block.fresh]
        made.append(Line(outer, sum(len(text) for text, _ in outer)))
    bars = sum(len(text) for text, _ in takewhile(lambda run: run == _BAR, later))
    for number, (line, start, joint) in enumerate(_LEAVES[block.shape](block, width - margin)):
        before = later if number else first
        made.append(Line([*before, *line], start + sum(len(text) for text, _ in before) if start else bars, joint))
    return made


def estimate(block: Block, width: int) -> int:
    """About how many lines `render` gives, without the work."""
    width = max(min(width, MEASURE) - 3 * len(block.frames), 10)
    if block.shape in ("text", "plain", "heading"):
        lines = sum(1 + (len(line) if line.isascii() else 2 * len(line)) // width for line in block.lines) or 1
    else:
        lines = len(block.lines) + 1
    return lines + block.gap


def _shown(frames: Iterable[Frame], room: int) -> list[Frame]:
    """The outer frames that leave half of the width to the text."""
    shown: list[Frame] = []
    for frame in frames:
        room -= cell_len(_mark(frame, fresh=True)[0])
        if room < 0:
            break
        shown.append(frame)
    return shown


@lru_cache(256)
def _mark(frame: Frame, *, fresh: bool) -> Run:
    if not frame.mark:
        return _BAR
    mark = frame.mark.rjust(3 if frame.mark[0].isdigit() else 2) + " "
    return (mark if fresh else " " * cell_len(mark), ink(Kind.MARK))


Leaf = Iterator[tuple[list[Run], int, str]]
"""The lines of a leaf: runs, how many characters of margin, joint."""


def _text(block: Block, width: int) -> Leaf:
    kind = Kind.TEXT if all(frame.mark for frame in block.frames) else Kind.QUOTE
    text = "\n".join(block.lines).replace("\t", " ")
    for line, joint in wrap(runs(closed(text) if block.growing else text, kind), min(width, MEASURE)):
        yield line, 0, joint


def _plain(block: Block, width: int) -> Leaf:
    for line, joint in wrap([("\n".join(block.lines).expandtabs(4), ink(Kind.TEXT))], min(width, MEASURE)):
        yield line, 0, joint


def _heading(block: Block, width: int) -> Leaf:
    kind = Kind.HEADING if block.level < 3 else Kind.TEXT
    for line, joint in wrap(runs(" ".join(block.lines).replace("\t", " "), kind, BOLD), min(width, MEASURE)):
        yield line, 0, joint


def _rule(block: Block, width: int) -> Leaf:
    yield [("─" * min(width, MEASURE), ink(Kind.LINE))], min(width, MEASURE), "\n"


def _code(block: Block, width: int) -> Leaf:
    width = min(width, WIDE)
    from qwen2_tui.markdown.code import highlight, language  # with its library, when there is code

    name = language(block.info)
    if name and not block.joined:
        yield _code_row(((name, ink(Kind.LABEL)),), width), width, ""
    for line in highlight(name, (line.expandtabs(4) for line in block.lines)):
        rows = _code_rows(line, width)
        for number, row in enumerate(rows, 1):
            yield row, 2, "\n" if number == len(rows) else ""


@lru_cache(2048)
def _code_rows(line: tuple[Run, ...], width: int) -> list[list[Run]]:
    return [_code_row(row, width) for row in chop(line, width - 3)]


def _code_row(row: Iterable[Run], width: int) -> list[Run]:
    row = list(row)
    space = width - 2 - sum(cell_len(text) for text, _ in row)
    return [(" ", ink(Kind.EDGE)), (" ", ink(Kind.CODE)), *row, (" " * max(space, 0), ink(Kind.CODE))]


def _table(block: Block, width: int) -> Leaf:
    for line in layout(block.lines, min(width, WIDE)):
        yield line, 0, "\n"


_LEAVES = {"text": _text, "plain": _plain, "heading": _heading, "rule": _rule, "code": _code, "table": _table}

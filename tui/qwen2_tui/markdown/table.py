"""Tables: columns aligned, as wide as what they hold; wrapped where the terminal is too narrow, and one row a record where far too narrow."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

from rich.cells import cell_len

from qwen2_tui.markdown.ink import BOLD, Kind, Run, ink
from qwen2_tui.markdown.inline import runs
from qwen2_tui.markdown.lines import cells
from qwen2_tui.markdown.wrap import wrap

Side = Literal["left", "center", "right"]
Cell = tuple[Run, ...]
NARROWEST = 6  # cells of a column; with less, rows become records
_LINE = ink(Kind.LINE)


def layout(lines: Sequence[str], width: int) -> list[list[Run]]:
    """The lines of a table. lines: its head, the line that says how columns are aligned, its rows."""
    head, sides = lines[0], tuple(map(_side, cells(lines[1])))
    count = len(sides)
    rows = [_cells(head, count, BOLD), *(_cells(line, count, 0) for line in lines[2:])]
    available = width - 3 * (count - 1)
    if available < NARROWEST * count and count > 1:
        return _records(rows, width)
    natural = [max(_size(row[column]) for row in rows) for column in range(count)]
    widths = _fitting(natural, available)
    tight = sum(natural) > available  # rows take several lines: a rule between them tells which belong together
    rule: list[Run] = [("─┼─".join("─" * one for one in widths), _LINE)]
    made = [*_row(rows[0], widths, sides), rule]
    for number, row in enumerate(rows[1:]):
        if tight and number:
            made.append(rule)
        made += _row(row, widths, sides)
    return made


def _side(delimiter: str) -> Side:
    if delimiter.endswith(":"):
        return "center" if delimiter.startswith(":") else "right"
    return "left"


@lru_cache(1024)
def _cells(line: str, count: int, flags: int) -> tuple[Cell, ...]:
    """The cells of a row: as many as the table has columns."""
    texts = cells(line)[:count]
    return tuple(runs(text, Kind.TEXT, flags) for text in texts + [""] * (count - len(texts)))


@lru_cache(4096)
def _size(cell: Cell) -> int:
    return max(cell_len(line) for line in "".join([text for text, _ in cell]).split("\n"))


def _fitting(natural: Sequence[int], available: int) -> tuple[int, ...]:
    """Widths of columns: what they need, or where that is too much, narrow columns that and the others the same share of the rest."""
    widths = [max(1, size) for size in natural]
    left, wanting = available, sorted(range(len(widths)), key=lambda column: widths[column])
    for place, column in enumerate(wanting):
        widths[column] = min(widths[column], left // (len(wanting) - place))
        left -= widths[column]
    return tuple(widths)


@lru_cache(1024)
def _row(row: tuple[Cell, ...], widths: tuple[int, ...], sides: tuple[Side, ...]) -> list[list[Run]]:
    columns = [[line for line, _ in wrap(cell, width)] for cell, width in zip(row, widths, strict=True)]
    made: list[list[Run]] = []
    for number in range(max(map(len, columns))):
        line: list[Run] = []
        for column, width, side in zip(columns, widths, sides, strict=True):
            if line:
                line.append((" │ ", _LINE))
            line += _aligned(column[number] if number < len(column) else [], width, side)
        made.append(line)
    return made


def _aligned(line: list[Run], width: int, side: Side) -> list[Run]:
    space = width - sum(cell_len(text) for text, _ in line)
    before = {"left": 0, "center": space // 2, "right": space}[side]
    padding = [(" " * before, ink(Kind.TEXT))] if before > 0 else []
    return [*padding, *line, *([(" " * (space - before), ink(Kind.TEXT))] if space > before else [])]


def _records(rows: Sequence[tuple[Cell, ...]], width: int) -> list[list[Run]]:
    """Every row as lines "column: cell"."""
    made: list[list[Run]] = []
    for row in rows[1:] or rows:
        if made:
            made.append([("─" * min(width, 12), _LINE)])
        for head, cell in zip(rows[0], row, strict=True):
            if row is rows[0]:
                made += [line for line, _ in wrap(head, width)]
            elif any(text for text, _ in cell):
                made += [line for line, _ in wrap([*head, (": ", _LINE), *cell], width)]
    return made

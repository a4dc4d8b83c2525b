"""Lines of a width: where to break, in cells of a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from rich.cells import cell_len, split_graphemes

from qwen2_tui.markdown.ink import Ink, Run

_CHUNK = re.compile(r"\s*\S+\s*|\s+")
_NEXT = re.compile(r"\S+\s*")
# Chinese and Japanese may break between any two characters, but not before what closes, nor after what opens.
_CLOSERS = frozenset("，。、；：？！）】」』》〉”’…ー～·,.;:?!)]}%")
_OPENERS = frozenset("（【「『《〈“‘([{")

Span = tuple[int, int]


def spans(text: str, width: int) -> list[Span]:
    """Where `text`, which has no newline, is cut into lines of at most `width` cells: start and end of each, without the space between."""
    if len(text) <= width and text.isascii():
        return [(0, len(text.rstrip(" ")))]
    found: list[Span] = []
    start = end = cells = 0  # of the line that grows; end without its last space
    for left, right, beyond, size in _units(text, width):
        if left > start and cells + size > width:
            found.append((start, end))
            start, cells = left, 0
        cells += size + cell_len(text[right:beyond])
        end = right
    found.append((start, end))
    return found


def _units(text: str, width: int) -> Iterator[tuple[int, int, int, int]]:
    """What is never broken: start, end, end of the space behind it, cells without that space."""
    at = 0
    pattern = _CHUNK  # the space at the start of a line belongs to its first word
    while match := pattern.match(text, at):
        pattern = _NEXT
        at = match.end()
        begin = match.start()
        word = match.group().rstrip()
        size = cell_len(word)
        if len(word) == size and size <= width:
            yield begin, begin + len(word), at, size
        else:
            yield from _pieces(word, begin, at, width)


def _pieces(word: str, offset: int, beyond: int, width: int) -> Iterator[tuple[int, int, int, int]]:
    """The units of a word that is too long or has wide characters."""
    start, cells = 0, 0
    before = ""  # the grapheme before
    wide_before = False
    for left, right, size in split_graphemes(word)[0]:
        grapheme = word[left:right]
        wide = size > 1
        free = (wide or wide_before) and grapheme[0] not in _CLOSERS and before not in _OPENERS
        if left > start and (free or cells + size > width):
            yield offset + start, offset + left, offset + left, cells
            start, cells = left, 0
        cells += size
        before, wide_before = grapheme, wide
    yield offset + start, offset + len(word), beyond, cells


def wrap(runs: Sequence[Run], width: int) -> Iterator[tuple[list[Run], str]]:
    """Lines of at most `width` cells, each with what joins it to the next: a newline, or where the text goes on, a space or nothing."""
    for line in _hard_lines(runs):
        text = "".join([text for text, _ in line])
        cut = spans(text, width)
        last = len(cut) - 1
        if last == 0 and cut[0] == (0, len(text)):
            yield line, "\n"
            continue
        for number, (made, span) in enumerate(zip(_cut(line, cut), cut, strict=True)):
            yield made, "\n" if number == last else " " if cut[number + 1][0] > span[1] else ""


def chop(runs: Sequence[Run], width: int) -> list[list[Run]]:
    """One line, cut wherever `width` cells are full: code, whose spaces matter."""
    text = "".join([text for text, _ in runs])
    if text.isascii():
        if len(text) <= width:
            return [list(runs)]
        cut = [(at, min(at + width, len(text))) for at in range(0, len(text), width)]
    else:
        cut, start, cells = [], 0, 0
        for left, _, size in split_graphemes(text)[0]:
            if cells + size > width:
                cut.append((start, left))
                start, cells = left, 0
            cells += size
        cut.append((start, len(text)))
    return list(_cut(runs, cut))


def _hard_lines(runs: Iterable[Run]) -> Iterator[list[Run]]:
    line: list[Run] = []
    for text, ink in runs:
        if "\n" in text:
            first, *more = text.split("\n")
            if first:
                line.append((first, ink))
            for one in more:
                yield line
                line = [(one, ink)] if one else []
        elif text:
            line.append((text, ink))
    yield line


def _cut(line: Sequence[Run], cut: Iterable[Span]) -> Iterator[list[Run]]:
    """The runs of each span; spans come in order."""
    pieces = iter(line)
    text, ink = next(pieces, ("", Ink(0)))
    offset = 0  # of `text` in the line
    for start, end in cut:
        made: list[Run] = []
        while True:
            left, right = max(start - offset, 0), end - offset
            if left < len(text) and right > left:
                made.append((text[left:right], ink))
            if right <= len(text):
                break
            offset += len(text)
            following = next(pieces, None)
            if following is None:
                break
            text, ink = following
        yield made

"""The texts of a row: how long ago, a title in the room there is, the place in a text where words were found."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from rich.cells import cell_len, set_cell_size

_DAY = 86400


def ago(seconds: float) -> str:
    """How long ago, in at most four cells: "now", "5m", "3h", "2d", "8w", "2y"."""
    for unit, length in (("y", 365 * _DAY), ("w", 7 * _DAY), ("d", _DAY), ("h", 3600), ("m", 60)):
        if seconds >= length and not (unit == "w" and seconds < 14 * _DAY):
            return f"{int(seconds // length)}{unit}"
    return "now"


def fitted(text: str, width: int) -> str:
    """`text` in exactly `width` cells, with an ellipsis where it is cut."""
    return set_cell_size(text, width) if cell_len(text) <= width else set_cell_size(text, width - 1) + "…" if width > 0 else ""


def folded(text: str) -> str:
    """As the search compares: without capitals and accents, each character still one."""
    return "".join((unicodedata.normalize("NFD", one)[0].casefold() or one)[0] for one in text)


def around(text: str, words: Sequence[str], width: int) -> tuple[str, list[tuple[int, int]]]:
    """The part of `text` with the first of `words`, in at most `width` cells, and where the words are in it."""
    low = folded(text)
    first = min((place for word in words if (place := low.find(folded(word))) >= 0), default=0)
    # A few words before it, so that it can be read; more, where the text ends soon.
    start = max(0, first - width // 3)
    while start and cell_len(text[start - 1 :]) < width:
        start -= 1
    if start and " " in text[start:first]:
        start = text.index(" ", start, first) + 1
    part = ("…" if start else "") + text[start:]
    part = part if cell_len(part) <= width else set_cell_size(part, max(0, width - 1)) + "…"
    low, places = folded(part), list[tuple[int, int]]()
    place = 0
    while place < len(part):
        length = max((len(word) for word in words if word and low.startswith(folded(word), place)), default=0)
        if length:
            places.append((place, place + length))
        place += length or 1
    return part, places

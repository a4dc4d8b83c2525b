"""The line of honest numbers: how far a reply is and how fast, what the model holds of memory, and how full the context is.

What does not fit is left out, the least important first; nothing is ever cut in the middle of a number.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rich.cells import cell_len
from rich.text import Text
from textual.widgets import Static

from qwen2_local.sanitize import clean_line
from qwen2_tui.conversation import Measure
from qwen2_tui.live import Progress

_BAR = 10


@dataclass(frozen=True, slots=True)
class Numbers:
    """What the line shows. words: instead of speeds, while there is no model, say. memory: bytes, 0: not known. measure: None: not counted."""

    words: str = ""
    progress: Progress | None = None
    memory: int = 0
    measure: Measure | None = None


class StatusLine(Static):
    """One line."""

    DEFAULT_CSS = """
    StatusLine { height: 1; padding: 0 1; color: $text-muted; background: $background; }
    """

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.numbers = Numbers()

    def show(self, numbers: Numbers) -> None:
        """Shows them, if they are others than before."""
        if numbers != self.numbers:
            self.numbers = numbers
            self._draw()

    def on_mount(self) -> None:
        """Also in another theme's colours."""
        self.watch(self.app, "theme", self._draw, init=False)

    def on_resize(self) -> None:
        """More or fewer of them fit."""
        self._draw()

    def _draw(self, *_: object) -> None:
        # It is one line, whatever it says: nothing has to be laid out anew, which would cost as much as all the drawing of a reply.
        self.update(line(self.numbers, self.size.width, self.app.theme_variables), layout=False)


def line(numbers: Numbers, width: int, colours: dict[str, str] | None = None) -> Text:
    """width: in cells."""
    left, right = list(_left(numbers)), list(_right(numbers))
    # The first that fits, from all that there is to the least.
    for rights, lefts in _ways(len(left), len(right)):
        words, meter = left[lefts], right[rights]
        if cell_len(words) + cell_len(meter) + 3 * bool(words and meter) <= width or (lefts, rights) == (len(left) - 1, len(right) - 1):
            text = Text(words, no_wrap=True, end="")
            text.append(" " * max(width - cell_len(words) - cell_len(meter), 1 if words and meter else 0))
            text.append(meter, _colour(numbers.measure, colours or {}))
            text.truncate(width)
            return text
    raise AssertionError("the last way is always taken")


def _ways(lefts: int, rights: int) -> Iterator[tuple[int, int]]:
    """(right, left) in turn one form shorter each."""
    left = right = 0
    yield right, left
    while (left, right) != (lefts - 1, rights - 1):
        if right < rights - 1 and (right <= left or left == lefts - 1):
            right += 1
        else:
            left += 1
        yield right, left


def _colour(measure: Measure | None, colours: dict[str, str]) -> str:
    if measure is None or not colours or measure.left > measure.most // 8:
        return ""
    return colours["text-error"] if measure.left <= 0 else colours["text-warning"]


def _left(numbers: Numbers) -> Iterator[str]:
    """What goes on, in ever shorter words."""
    progress, words = numbers.progress, clean_line(numbers.words)
    memory = size(numbers.memory) if numbers.memory else ""
    if words:
        yield words
    elif progress is None or (progress.phase == "over" and not progress.written):
        yield memory
    elif progress.phase == "waiting":
        yield "waiting for the model"
    elif progress.phase == "reading":
        yield _joined(f"reading {progress.read:,} of {progress.prompt:,} tokens", _left_of(progress))
        yield f"reading {progress.read:,} of {progress.prompt:,}"
    else:
        speed = rate(progress.tokens_per_s) if progress.tokens_per_s else f"{progress.written:,} token{'s' * (progress.written != 1)}"
        first = f"first token {seconds(progress.first_token_s)}"
        yield _joined(speed, first, memory)
        yield _joined(speed, first)
        yield speed


def _left_of(progress: Progress) -> str:
    return "" if progress.left_s is None else f"{seconds(progress.left_s)} left"


def _right(numbers: Numbers) -> Iterator[str]:
    measure = numbers.measure
    if measure is None:
        yield ""
        return
    used = f"{measure.used:,} / {measure.most:,}"
    cached = f" ({measure.cached:,} from cache)" if measure.cached else ""
    yield f"context {bar(measure.used, measure.most)} {used}{cached}"
    yield f"context {used}{cached}"
    yield f"context {used}"
    yield used


def bar(used: int, most: int) -> str:
    """A bar of how full it is. Empty only where it is, and full only where it is."""
    filled = min(_BAR, -(-used * _BAR // most)) if most > 0 else _BAR
    if filled == _BAR and used < most:
        filled -= 1
    return "▓" * filled + "░" * (_BAR - filled)


def rate(tokens_per_s: float) -> str:
    """A speed: 38.2 tok/s, 1,470 tok/s."""
    return f"{tokens_per_s:.1f} tok/s" if tokens_per_s < 99.95 else f"{tokens_per_s:,.0f} tok/s"


def seconds(time: float) -> str:
    """A duration: 0.31 s, 9 s, 2:05."""
    if time < 9.95:
        return f"{time:.1f} s"
    whole = round(time)
    return f"{whole} s" if whole < 60 else f"{whole // 60}:{whole % 60:02}" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def size(number: int) -> str:
    """Bytes, for a person."""
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"


def _joined(*parts: str) -> str:
    return " · ".join(part for part in parts if part)

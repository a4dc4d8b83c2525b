"""The turns of a conversation as one column of lines: what is where, without rendering what is not seen."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from rich.cells import cell_len

from qwen2_local.chats import State
from qwen2_local.sanitize import clean, clean_line
from qwen2_local.types import Role
from qwen2_tui.markdown.document import Document
from qwen2_tui.markdown.ink import Kind, ink
from qwen2_tui.markdown.render import MEASURE, Line

HEAD = -1  # the "block" of the role line, with the free line above it
FOOT = (1 << 21) - 2  # that of the line below the text
NEAR = 40  # turns on both sides of what is seen whose lines are kept


@dataclass(frozen=True, slots=True)
class Turn:
    """A message as it is shown. number, count: which alternative of how many. footer: a quiet line under it, which says of what is not whole why."""

    key: int
    role: Role
    name: str
    text: str
    state: State = "whole"
    number: int = 1
    count: int = 1
    footer: str = ""


class Place(NamedTuple):
    """Where a line is, whatever the heights of what is above it: turn, block of its text (or HEAD, FOOT), line in that."""

    turn: int
    block: int
    line: int

    @property
    def code(self) -> int:
        """One number for it, in the same order."""
        return self.turn << 42 | (self.block + 1) << 20 | self.line

    @classmethod
    def of(cls, code: int) -> Place:
        """The place of that number."""
        return cls(code >> 42, (code >> 20 & (1 << 22) - 1) - 1, code & (1 << 20) - 1)


class Shown:
    """A turn at a width. Its text is looked at when the first of its lines is."""

    def __init__(self, turn: Turn, width: int) -> None:
        self.turn = turn
        self.width = width
        self._document: Document | None = None
        self._estimate: int | None = None
        self._head = self._header()
        self._foot = [Line([(text, ink(Kind.QUIET))])] if (text := clean_line(turn.footer)) else []

    def _header(self) -> list[Line]:
        turn = self.turn
        kind = Kind.USER if turn.role == "user" else Kind.MODEL if turn.role == "assistant" else Kind.QUIET
        runs = [(clean_line(turn.name), ink(kind))]
        if turn.count > 1:
            note = f"‹ {turn.number}/{turn.count} ›"
            space = min(self.width, MEASURE) - cell_len(runs[0][0]) - cell_len(note)
            runs += [(" " * max(space, 2), ink(Kind.TEXT)), (note, ink(Kind.QUIET))]
        return [Line([]), Line(runs)]

    @property
    def opened(self) -> bool:
        """Its text was looked at."""
        return self._document is not None

    @property
    def document(self) -> Document:
        """Its text."""
        if self._document is None:
            self._document = Document(clean(self.turn.text), self.width, markdown=self.turn.role == "assistant")
            self._document.finish()
        return self._document

    def grow(self) -> None:
        """Its text is not whole yet."""
        self._document = Document(clean(self.turn.text), self.width)

    def turned(self, turn: Turn) -> Shown:
        """The same for `turn`, whose text is the same."""
        other = Shown(turn, self.width)
        other._document = self._document
        return other

    def resize(self, width: int) -> None:
        """Another width."""
        if width != self.width:
            self.width = width
            self._estimate = None
            self._head = self._header()
            if self._document is not None:
                self._document.resize(width)

    def forget(self) -> None:
        """Keeps heights only."""
        if self._document is not None:
            self._document.forget()

    @property
    def height(self) -> int:
        """Lines in all: estimated, until they were rendered."""
        return len(self._head) + self._body() + len(self._foot)

    def _body(self) -> int:
        if self._document is not None:
            return self._document.height
        if self._estimate is None:
            self._estimate = self._estimated()
        return self._estimate

    def _estimated(self) -> int:
        text = self.turn.text
        return 1 + text.count("\n") + (len(text) if text.isascii() else 2 * len(text)) // max(min(self.width, MEASURE), 1)

    def prepare(self, first: int, last: int) -> bool:
        """Renders lines from `first` to before `last`; whether the height of anything changed."""
        before = self.height
        document = self.document
        changed = document.prepare(max(first - len(self._head), 0), min(last - len(self._head), document.height))
        return changed or self.height != before

    def line(self, number: int) -> Line:
        """A line."""
        head = len(self._head)
        if number < head:
            return self._head[number]
        number -= head
        if number < self.document.height:
            return self.document.line(number)
        foot = number - self.document.height
        return self._foot[foot] if foot < len(self._foot) else Line([])  # blank: the turn is shorter than was estimated, and not prepared yet

    def all(self) -> Iterator[tuple[int, list[Line]]]:
        """All its lines, block by block."""
        yield HEAD, self._head
        for block in range(self.document.blocks):
            yield block, self.document.lines(block)
        yield FOOT, self._foot

    def place(self, number: int) -> tuple[int, int]:
        """Block and line of a line."""
        head = len(self._head)
        if number < head:
            return HEAD, number
        number -= head
        body = self._body()
        if number >= body:
            return FOOT, number - body
        return self.document.place(number)

    def number(self, block: int, line: int) -> int:
        """The line at a place."""
        head = len(self._head)
        if block == HEAD:
            return min(line, head - 1)
        if block == FOOT:
            return head + self._body() + line
        return head + self.document.number(block, line)


class Flow:
    """All turns. Lines are counted from 0 to `height`."""

    def __init__(self, turns: Iterable[Turn] = (), width: int = 80) -> None:
        self._width = width
        self._shown = [Shown(turn, width) for turn in turns]
        self._starts = [0]  # the first line of each turn, as far as known
        self._near = range(0)

    def __len__(self) -> int:
        return len(self._shown)

    def __getitem__(self, turn: int) -> Shown:
        return self._shown[turn]

    @property
    def turns(self) -> tuple[Turn, ...]:
        """What is shown."""
        return tuple(shown.turn for shown in self._shown)

    def append(self, turn: Turn) -> None:
        """One more turn."""
        self._shown.append(Shown(turn, self._width))

    def replace(self, index: int, turn: Turn) -> None:
        """Another turn in that place."""
        before = self._shown[index]
        same = (turn.text, turn.role) == (before.turn.text, before.turn.role)
        self._shown[index] = before.turned(turn) if same else Shown(turn, self._width)
        self._stale(index)

    def truncate(self, count: int) -> None:
        """Only the first `count` turns stay."""
        del self._shown[count:]
        self._stale(count)

    def grow(self) -> None:
        """The last turn will be fed."""
        self._shown[-1].grow()
        self._stale(len(self) - 1)

    def feed(self, text: str) -> None:
        """More of the last turn."""
        self._shown[-1].document.feed(text)
        self._stale(len(self) - 1)

    def end(self, turn: Turn, fed: str) -> None:
        """The last turn is whole. fed: the text that it was fed, or began with."""
        last = self._shown[-1]
        if clean(turn.text) == fed:
            last.document.finish()
            self._shown[-1] = last.turned(turn)
        else:
            self._shown[-1] = Shown(turn, self._width)
        self._stale(len(self) - 1)

    def resize(self, width: int) -> bool:
        """Another width; False if it is the one that there was."""
        if width == self._width:
            return False
        self._width = width
        for shown in self._shown:
            shown.resize(width)
        self._stale(0)
        return True

    def _open(self, turn: int) -> None:
        """Looks at the text of a turn: its height is better known then."""
        if not self._shown[turn].opened:
            _ = self._shown[turn].document
            self._stale(turn)

    def _stale(self, turn: int) -> None:
        """The height of a turn may be another."""
        del self._starts[turn + 1 :]

    def _begins(self) -> list[int]:
        starts = self._starts
        for shown in self._shown[len(starts) - 1 :]:
            starts.append(starts[-1] + shown.height)
        return starts

    @property
    def height(self) -> int:
        """Lines in all, estimates among them."""
        return self._begins()[-1]

    def start(self, turn: int) -> int:
        """The first line of a turn."""
        return self._begins()[turn]

    def turn_at(self, line: int) -> int:
        """The turn that a line is in."""
        return min(max(bisect_right(self._begins(), line) - 1, 0), len(self._shown) - 1)

    def place(self, line: int) -> Place:
        """Where a line is."""
        turn = self.turn_at(line)
        start = self._begins()[turn]
        self._open(turn)
        return Place(turn, *self._shown[turn].place(line - start))

    def number(self, place: Place) -> int:
        """The line at a place, now."""
        turn = min(place.turn, len(self._shown) - 1)
        self._open(turn)
        return self._begins()[turn] + self._shown[turn].number(place.block, place.line)

    def line(self, number: int) -> Line:
        """A line; it should be prepared."""
        turn = self.turn_at(number)
        return self._shown[turn].line(number - self._begins()[turn])

    def prepare(self, first: int, last: int) -> bool:
        """Renders lines from `first` to before `last`; whether any height came out other than it was taken for."""
        changed = False
        starts = self._begins().copy()
        turns = range(self.turn_at(max(first, 0)), self.turn_at(max(last - 1, 0)) + 1) if self._shown else range(0)
        for turn in turns:
            changed = self._shown[turn].prepare(first - starts[turn], last - starts[turn]) or changed
        if changed:
            self._stale(turns.start)
        self._keep_near(turns)
        return changed

    def _keep_near(self, turns: range) -> None:
        kept = range(max(turns.start - NEAR, 0), turns.stop + NEAR)
        for turn in self._near:
            if turn not in kept and turn < len(self._shown):
                self._shown[turn].forget()
        self._near = kept

"""A message at a width. Blocks are found at once, which is cheap; lines are made where they are asked for."""

from __future__ import annotations

from bisect import bisect_right

from qwen2_tui.markdown.blocks import Block, Blocks, plain
from qwen2_tui.markdown.render import Line, estimate, render

KEPT = 400  # blocks whose lines are kept: beyond, those far from what is asked for are made again when needed


class Document:
    """A message, whole or growing.

    Lines are counted from 0 to `height`. Heights of blocks never rendered are estimates, so a line's number holds until the next `prepare`
    or `feed`; (block, line in it) holds as long as the width, and until the block itself changes: settled blocks never do.
    """

    def __init__(self, text: str, width: int, *, markdown: bool = True) -> None:
        self._source: Blocks | None = Blocks() if markdown else None
        self._width = width
        self._blocks: list[Block] = []
        self._lines: list[list[Line] | None] = []
        self._heights: list[int] = []
        self._made: list[list[Line]] = []  # the lines that blocks from `_firm` on had before more came
        self._firm = 0
        self._starts = [0]  # the first line of each block, as far as known
        self._rendered = 0
        if self._source is not None:
            self.feed(text)
        else:
            self._extend(plain(text))

    def feed(self, text: str) -> None:
        """More text of a message in Markdown."""
        assert self._source is not None
        firm = len(self._source.settled)
        self._source.feed(text)
        self._renew(firm, self._source.tail())

    def finish(self) -> None:
        """The text has ended."""
        if self._source is not None:
            firm = len(self._source.settled)
            self._source.finish()
            self._renew(firm, [])

    def _renew(self, firm: int, tail: list[Block]) -> None:
        """The blocks from `firm` on are others now. Lines that come out the same stay the same objects, with what was drawn of them."""
        assert self._source is not None
        self._made = [lines or [] for lines in self._lines[firm:]]
        self._firm = firm
        self._rendered -= sum(1 for lines in self._lines[firm:] if lines is not None)
        del self._blocks[firm:], self._lines[firm:], self._heights[firm:]
        self._extend([*self._source.settled[firm:], *tail])

    def _extend(self, blocks: list[Block]) -> None:
        self._blocks += blocks
        self._lines += [None] * len(blocks)
        del self._starts[len(self._heights) + 1 :]
        self._heights += [estimate(block, self._width) for block in blocks]

    def resize(self, width: int) -> None:
        """Another width: nothing of the lines holds any more."""
        if width != self._width:
            self._width = width
            self._made = []
            blocks, self._blocks, self._lines, self._heights, self._rendered = self._blocks, [], [], [], 0
            self._extend(blocks)

    @property
    def height(self) -> int:
        """Lines in all."""
        return self._begins()[-1]

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return len(self._blocks)

    def _begins(self) -> list[int]:
        starts = self._starts
        for height in self._heights[len(starts) - 1 :]:
            starts.append(starts[-1] + height)
        return starts

    def place(self, line: int) -> tuple[int, int]:
        """The block that the line is in, and which line of the block it is."""
        starts = self._begins()
        block = min(max(bisect_right(starts, line) - 1, 0), max(len(self._blocks) - 1, 0))
        return block, line - starts[block]

    def number(self, block: int, line: int) -> int:
        """The line's number, from its place; of the nearest line there is."""
        if not self._blocks:
            return 0
        block = min(block, len(self._blocks) - 1)
        return self._begins()[block] + min(line, max(self._heights[block] - 1, 0))

    def prepare(self, first: int, last: int) -> bool:
        """Renders the blocks in which lines from `first` to before `last` are; whether any height came out other than estimated."""
        if last <= first or not self._blocks:
            return False
        changed = False
        for block in range(self.place(first)[0], self.place(last - 1)[0] + 1):
            changed = self.render(block) or changed
        return changed

    def render(self, block: int) -> bool:
        """Renders a block, unless it is; whether its height came out other than estimated."""
        if self._lines[block] is not None:
            return False
        lines = render(self._blocks[block], self._width)
        if self._made and 0 <= block - self._firm < len(self._made):
            for at, (line, before) in enumerate(zip(lines, self._made[block - self._firm], strict=False)):
                if line == before:
                    lines[at] = before
        if self._rendered >= KEPT:
            self._forget(block)
        self._lines[block] = lines
        self._rendered += 1
        if self._heights[block] == len(lines):
            return False
        self._heights[block] = len(lines)
        del self._starts[block + 1 :]
        return True

    def _forget(self, near: int) -> None:
        for block in range(len(self._lines)):
            if abs(block - near) > KEPT // 4:
                self._lines[block] = None
        self._rendered = sum(1 for lines in self._lines if lines is not None)

    def forget(self) -> None:
        """Lines are made again when they are asked for; heights stay."""
        self._lines = [None] * len(self._blocks)
        self._made = []
        self._rendered = 0

    def line(self, number: int) -> Line:
        """A line; its block is rendered if it is not."""
        block, line = self.place(number)
        lines = self.lines(block)
        return lines[min(line, len(lines) - 1)]

    def lines(self, block: int) -> list[Line]:
        """All lines of a block."""
        self.render(block)
        lines = self._lines[block]
        assert lines is not None
        return lines

    def offset(self, block: int, line: int) -> int:
        """How many characters of the block stand before one of its lines: its place at any width."""
        return sum(len(one.text.strip()) for one in self.lines(block)[:line])

    def line_at(self, block: int, offset: int) -> int:
        """The line of the block that the character is in."""
        lines = self.lines(block)
        for number, line in enumerate(lines):
            offset -= len(line.text.strip())
            if offset < 0:
                return number
        return len(lines) - 1

    def codes(self) -> list[tuple[int, int]]:
        """The code blocks: the first and the last of the blocks that each one is."""
        found: list[tuple[int, int]] = []
        for number, block in enumerate(self._blocks):
            if block.shape == "code":
                found.append((found.pop()[0] if block.joined and found else number, number))
        return found

    def code(self, which: int) -> str:
        """The text of a code block, as it was written."""
        first, last = self.codes()[which]
        return "\n".join(line for block in self._blocks[first : last + 1] for line in block.lines)

"""Text to blocks, line by line, as it streams in.

A block is a leaf of the document (a paragraph, a heading, a fence, a table, a rule) with the quotes and list items that it stands in. So an
open list is as many blocks as it has items, and whatever is closed stays as it is: where the text was cut into pieces cannot matter, as only
whole lines are taken. The rules are CommonMark's, and GitHub's for tables and tasks, with these exceptions: HTML is text; there are no
reference definitions; a line without a bar ends a table; lines, blocks and nesting have bounds, past which a block is continued by another.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from qwen2_tui.markdown.lines import BLANK, FENCE, HEADING, ITEM, QUOTE, RULE, TASK, UNDERLINE, begins_table, closes, dedent, foreseen, indent, title

LINE = 4096  # characters of a line that are looked at together
TEXT = 4096  # characters of a paragraph
ROWS = 100  # lines of a block
CODE = 6000  # characters of code
DEPTH = 12  # quotes and items around a block

Shape = Literal["text", "plain", "heading", "code", "table", "rule"]


@dataclass(frozen=True, slots=True)
class Frame:
    """A quote or a list item around a block.

    mark: the bullet or number before it, "" for a quote. indent: columns that its later lines are indented by. sort: what tells its list
    from another. first: whether its list begins with it.
    """

    mark: str = ""
    indent: int = 0
    sort: str = ""
    number: int = 0
    first: bool = True


@dataclass(slots=True)
class Block:
    """A leaf. Its lines grow while it is open.

    fresh: how many of its innermost frames begin with it, and show their marks. gap: whether a line is left free before it. level: of a
    heading. info: what stands behind a fence. joined: it goes on where the block before it was full. growing: more of it is on its way.
    """

    shape: Shape
    frames: tuple[Frame, ...] = ()
    lines: list[str] = field(default_factory=list)
    fresh: int = 0
    gap: bool = True
    level: int = 0
    info: str = ""
    joined: bool = False
    growing: bool = False


_BULLETS = "•◦▪"
_TASKS = {" ": "☐", "x": "☑", "X": "☑"}


def plain(text: str) -> list[Block]:
    """Text that is shown as it is, in blocks of bounded size."""
    found: list[Block] = []
    lines: list[str] = []
    size = 0
    for line in text.split("\n"):
        for piece in [line[at : at + LINE] for at in range(0, len(line), LINE)] or [""]:
            if size > TEXT or len(lines) >= ROWS:
                found.append(Block("plain", lines=lines, gap=False, joined=bool(found)))
                lines, size = [], 0
            lines.append(piece)
            size += len(piece)
    return [*found, Block("plain", lines=lines, gap=False, joined=bool(found))]


class Blocks:
    """A document that grows. `settled` blocks are as they will stay; `tail()` gives those that may still change."""

    def __init__(self) -> None:
        self.settled: list[Block] = []
        self._leaf: Block | None = None  # the open block
        self._size = 0  # characters in it
        self._fence = ""  # what closes it, while it is a fence
        self._fence_indent = 0
        self._frames: tuple[Frame, ...] = ()
        self._fresh = 0  # of the frames, how many have shown no mark yet
        self._blank = False  # the line before was blank
        self._blanks = 0  # blank lines in indented code, which belong to it if more code follows
        self._rest = ""  # a line that has not ended
        self._midline = False  # `_rest` goes on within a line that was too long

    def feed(self, text: str) -> None:
        """More text."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._physical(line)
            self._midline = False
        while len(self._rest) > LINE:
            self._rest = self._cut(self._rest)

    def finish(self) -> None:
        """The text has ended: all is settled. Nothing may be fed after it."""
        if self._rest:
            self._physical(self._rest)
            self._rest = ""
        self._close()
        self._drop(0)

    def tail(self) -> list[Block]:
        """What the text so far is seen as beyond the settled blocks, if it ended here. Mostly one block."""
        ahead = Blocks()
        ahead.__dict__.update(self.__dict__)
        # The last settled block is there for what looks back at it.
        before = self.settled[-1:]
        ahead.settled = before.copy()
        if self._leaf is not None:
            ahead._leaf = replace(self._leaf, lines=self._leaf.lines.copy())
        ahead._foresee()
        ahead.finish()
        blocks = ahead.settled[len(before) :]
        if blocks:
            blocks[-1].growing = True
        return blocks

    def _foresee(self) -> None:
        """Takes the line that has not ended for what it will be."""
        leaf = self._leaf
        if self._midline or not (leaf is None or leaf.shape in ("text", "table", "code")):
            return
        line, self._rest = self._rest, ""
        if leaf is None or leaf.shape != "code":
            paragraph = "" if leaf is None else leaf.lines[-1] if leaf.shape == "text" else None
            *lines, self._rest = foreseen(line, paragraph) or [""]
            for one in lines:
                self._take(one)
        elif not self._fence or line.strip(" \t>" + self._fence[0]) or self._fence in line:
            self._rest = line  # all but the start of what ends the code

    def _physical(self, line: str) -> None:
        while len(line) > LINE:
            line = self._cut(line)
        self._take(line)

    def _cut(self, line: str) -> str:
        """Takes the start of a line that is too long; gives the rest."""
        at = line.rfind(" ", LINE // 2, LINE) + 1 or LINE
        self._take(line[:at])
        self._midline = True
        return line[at:]

    def _take(self, line: str) -> None:
        if self._midline:
            self._go_on(line)
        else:
            self._line(line.rstrip("\r"))

    def _go_on(self, rest: str) -> None:
        """More of a line: never the start of anything."""
        leaf = self._leaf
        if leaf is not None and leaf.shape == "code":
            self._append(rest)
        else:
            self._close()
            self._open(Block("text", lines=[rest], gap=False, joined=True))

    def _line(self, line: str) -> None:
        rest, depth = self._matching(line)
        leaf = self._leaf
        whole = depth == len(self._frames)
        if leaf is not None and leaf.shape == "code" and whole and self._in_code(rest):
            return
        if BLANK.match(rest):
            self._close()
            if not whole:
                self._drop(depth)
            elif self._fresh and self._frames[-1].mark:  # an item that begins with two blank lines stays empty
                self._open(Block("text"))
                self._close()
                self._frames = (*self._frames[:-1], replace(self._frames[-1], indent=LINE + 1))
            self._blank = True
            return
        opened = True
        while opened:
            opened = False
            if depth < DEPTH:
                rest, depth, opened = self._frame(rest, depth)
        if BLANK.match(rest):
            return  # an item or a quote without anything yet
        whole = depth == len(self._frames)
        if indent(rest) < 4 and self._begins(rest, depth, whole):
            return
        leaf = self._leaf
        if leaf is not None and leaf.shape == "text":
            self._append(rest.strip(" \t"))  # even where it does not stand in all the frames
            return
        if leaf is not None and leaf.shape == "table" and whole and "|" in rest:
            self._append(rest)
            return
        self._close()
        self._drop(depth)
        if indent(rest) >= 4:
            self._open(Block("code", lines=[dedent(rest, 4)]))
            self._fence, self._fence_indent = "", 4
        else:
            self._open(Block("text", lines=[rest.strip(" \t")]))

    def _matching(self, line: str) -> tuple[str, int]:
        """What is left of the line behind the frames that it continues, and how many these are."""
        rest = line
        for depth, frame in enumerate(self._frames):
            if frame.mark:
                if not BLANK.match(rest):
                    if indent(rest) < frame.indent:
                        return rest, depth
                    rest = dedent(rest, frame.indent)
            else:
                match = QUOTE.match(rest)
                if match is None:
                    return rest, depth
                rest = rest[match.end() :]
        return rest, len(self._frames)

    def _in_code(self, rest: str) -> bool:
        """Takes a line of open code; False if it ends indented code, and is something else."""
        assert self._leaf is not None
        if self._fence:
            if closes(rest, self._fence):
                self._close()
            else:
                self._append(dedent(rest, self._fence_indent))
            return True
        if BLANK.match(rest):
            self._blanks += 1
            return True
        if indent(rest) < 4:
            return False
        for _ in range(self._blanks):
            self._append("")
        self._blanks = 0
        self._append(dedent(rest, 4))
        return True

    def _frame(self, rest: str, depth: int) -> tuple[str, int, bool]:
        """Opens the quote or item that `rest` begins with, if it does."""
        space_before = indent(rest)
        bare = rest.lstrip(" \t")
        if space_before >= 4 or not bare:
            return rest, depth, False
        if bare[0] == ">":
            self._push(Frame(), depth)
            return bare[2:] if bare[1:2] == " " else bare[1:], depth + 1, True
        match = ITEM.match(bare)
        if match is None or RULE.match(bare):
            return rest, depth, False
        sign, number, delimiter, space = match.groups()
        paragraph = self._leaf is not None and self._leaf.shape == "text" and depth == len(self._frames)
        if paragraph and (space is None or (number is not None and int(number) != 1)):
            return rest, depth, False  # more likely a number or a minus that happens to begin a line
        width = indent(" " * (space_before + len(sign)) + (space or " ")) - space_before - len(sign)
        width = width if 1 <= width <= 4 and space is not None else 1
        sort = delimiter or sign
        before = self._frames[depth] if depth < len(self._frames) else None
        follows = before is not None and before.sort == sort
        place = (before.number + 1 if before is not None and follows else int(number)) if number is not None else 0
        content = dedent(bare[len(sign) :], width) if space is not None else ""
        items = sum(1 for frame in self._frames[:depth] if frame.mark)
        mark = f"{place}{delimiter}" if number is not None else _BULLETS[items % len(_BULLETS)]
        task = TASK.match(content)
        if task is not None:
            mark, content = _TASKS[task[1]], content[task.end() :]
        self._push(Frame(mark, space_before + len(sign) + width, sort, place, first=not follows), depth)
        return content, depth + 1, bool(content)

    def _begins(self, rest: str, depth: int, whole: bool) -> bool:
        """Takes a line that is a leaf of its own, or begins one that is no paragraph."""
        leaf = self._leaf
        paragraph = leaf is not None and leaf.shape == "text" and whole and not leaf.joined
        if paragraph and leaf is not None and UNDERLINE.match(rest):
            leaf.shape, leaf.level = "heading", 1 if "=" in rest else 2
            self._close()
            return True
        if paragraph and leaf is not None and self._table(leaf, rest):
            return True
        if RULE.match(rest):
            self._close()
            self._drop(depth)
            self._open(Block("rule"))
            self._close()
            return True
        if match := HEADING.match(rest):
            self._close()
            self._drop(depth)
            self._open(Block("heading", lines=[title(rest[match.end() :])], level=len(match[1])))
            self._close()
            return True
        if match := FENCE.match(rest):
            self._close()
            self._drop(depth)
            before, fence, info = match.group(1, 2, 3) if match[2] else match.group(4, 5, 6)
            self._open(Block("code", info=info.strip(" \t")))
            self._fence, self._fence_indent = fence, len(before)
            return True
        return False

    def _table(self, leaf: Block, rest: str) -> bool:
        """Makes a table of the open paragraph's last line, if `rest` is the line below its head."""
        head = leaf.lines[-1]
        if not begins_table(head, rest):
            return False
        if len(leaf.lines) > 1:
            leaf.lines.pop()
            self._close()
            self._open(Block("table", lines=[head, rest]))
        else:
            leaf.shape = "table"
            leaf.lines.append(rest)
        return True

    def _push(self, frame: Frame, depth: int) -> None:
        self._close()
        self._drop(depth)
        self._frames = (*self._frames, frame)
        self._fresh += 1

    def _drop(self, depth: int) -> None:
        """The frames from `depth` on are over."""
        if len(self._frames) <= depth:
            return
        self._close()
        if self._fresh:  # an empty item
            self._open(Block("text"))
            self._close()
        self._frames = self._frames[:depth]

    def _open(self, block: Block) -> None:
        frames = self._frames
        block.frames, block.fresh = frames, self._fresh
        if not self.settled:
            block.gap = False
        elif block.gap and self._fresh:
            outer = frames[: len(frames) - self._fresh]
            outermost = frames[len(outer)]
            inside = bool(outer) and bool(outer[-1].mark)
            if outermost.mark and (inside or not outermost.first):
                block.gap = self._blank
        self._fresh = 0
        self._blank = False
        self._leaf = block
        self._size = sum(map(len, block.lines))

    def _append(self, line: str) -> None:
        leaf = self._leaf
        assert leaf is not None
        if self._size > (TEXT if leaf.shape == "text" else CODE) or len(leaf.lines) >= ROWS:
            # Full: another goes on. A table's begins with the head again.
            lines = leaf.lines[:2] if leaf.shape == "table" else []
            self.settled.append(leaf)
            leaf = Block(leaf.shape, lines=lines, gap=False, info=leaf.info, joined=True)
            self._open(leaf)
        leaf.lines.append(line)
        self._size += len(line)
        self._blank = False

    def _close(self) -> None:
        """The open block stays as it is."""
        if self._leaf is not None:
            self.settled.append(self._leaf)
            self._leaf = None
        self._fence, self._blanks = "", 0

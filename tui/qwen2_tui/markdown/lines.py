"""A line of Markdown by itself: how far it is indented, what it may begin, what an unfinished one will be."""

from __future__ import annotations

import re

BLANK = re.compile(r"[ \t]*$")
QUOTE = re.compile(r" {0,3}> ?")
ITEM = re.compile(r"([-+*]|(\d{1,9})([.)]))(?:([ \t]+)(?=\S)|[ \t]*$)")
TASK = re.compile(r"\[([ xX])\][ \t]+(?=\S)")
RULE = re.compile(r" {0,3}([-_*])[ \t]*(?:\1[ \t]*){2,}$")
HEADING = re.compile(r" {0,3}(#{1,6})(?:[ \t]+|$)")
UNDERLINE = re.compile(r" {0,3}(=+|-+)[ \t]*$")
FENCE = re.compile(r"( {0,3})(`{3,})([^`]*)$|( {0,3})(~{3,})(.*)$")
_DELIMITER = re.compile(r":?-+:?$")
_PIPE = re.compile(r"(?<!\\)\|")
_ITEM_SIGN = re.compile(r"([ \t]*(?:[-+*]|\d{1,9}[.)])[ \t]+)(?:[-+*]|`{1,2}|~{1,2})$")
_BAR = re.compile(r"\|[ \t]*[^|\s-]")
COLUMNS = 50  # of a table


def indent(line: str) -> int:
    """Columns of space at the start."""
    bare = line.lstrip(" ")
    column = len(line) - len(bare)
    for character in bare:
        if character == "\t":
            column += 4 - column % 4
        elif character == " ":
            column += 1
        else:
            break
    return column


def dedent(line: str, columns: int) -> str:
    """`line` without up to `columns` columns of space at its start; what a tab stands for beyond them stays, as spaces."""
    column = 0
    for at, character in enumerate(line):
        if column >= columns or character not in " \t":
            return " " * (column - columns) + line[at:]
        column += 1 if character == " " else 4 - column % 4
    return " " * (column - columns)


def title(text: str) -> str:
    """What a heading says, without the signs that may close it."""
    text = text.strip(" \t")
    bare = text.rstrip("#")
    return bare.rstrip(" \t") if not bare or bare[-1] in " \t" else text


def cells(row: str) -> list[str]:
    """The cells of a table's row."""
    row = row.strip()
    row = row.removeprefix("|")
    if row.endswith("|") and not row.endswith("\\|"):
        row = row[:-1]
    return [cell.strip().replace("\\|", "|") for cell in _PIPE.split(row)]


def begins_table(head: str, below: str) -> bool:
    """Whether `below` is what makes `head` the head of a table."""
    if "-" not in below or "|" not in head + below:
        return False
    delimiters = cells(below)
    return len(delimiters) == len(cells(head)) <= COLUMNS and all(map(_DELIMITER.match, delimiters))


def closes(line: str, fence: str) -> bool:
    """Whether the line ends what `fence` began."""
    bare = line.strip(" \t")
    return indent(line) < 4 and bare.startswith(fence) and not bare.strip(fence[0])


def foreseen(line: str, paragraph: str | None) -> list[str]:
    """The lines that the start of a line will most likely be, so that what is seen of it does not change back and forth.

    paragraph: the last line of the open one; "" if no block is open; None if another is.
    """
    bare = line.strip(" \t>")
    if bare in ("`", "``", "~", "~~") or (paragraph and bare and not bare.strip("-=*_+")):
        return []  # a fence; an item, a rule or what makes a heading of the paragraph
    if match := _ITEM_SIGN.match(line):
        return [match[1]]
    if paragraph and _BAR.match(paragraph) and not bare.strip("|:- \t"):
        return [_below(paragraph)]
    if paragraph == "" and _BAR.match(line):
        return [line, _below(line)]
    return [line] if line else []


def _below(head: str) -> str:
    """A line that makes `head` the head of a table."""
    return "|" + "---|" * len(cells(head))

"""What a piece of text is. The widget's palette turns it into colours."""

from __future__ import annotations

from enum import IntEnum
from typing import NewType

Ink = NewType("Ink", int)
"""A kind, and flags of what is added to it: `kind * 64 + flags`."""

BOLD, ITALIC, CODE, LINK, ADDRESS, STRIKE = 1, 2, 4, 8, 16, 32
FLAGS = 64


class Kind(IntEnum):
    """What text is, apart from emphasis."""

    TEXT = 0
    QUIET = 1  # footers, what is said about the text
    HEADING = 2
    QUOTE = 3
    MARK = 4  # bullets, numbers
    USER = 5
    MODEL = 6
    CODE = 7
    LABEL = 8  # a code block's language
    EDGE = 9  # the left edge of a code block: shows the focus
    KEYWORD = 10
    NAME = 11
    STRING = 12
    NUMBER = 13
    COMMENT = 14
    BUILTIN = 15
    ADDED = 16
    REMOVED = 17
    LINE = 18  # rules, the bars of quotes and tables


def ink(kind: Kind, flags: int = 0) -> Ink:
    """The ink of `kind` with `flags`."""
    return Ink(kind * FLAGS + flags)


Run = tuple[str, Ink]
"""Some text in one ink."""

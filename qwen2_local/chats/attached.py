"""Files attached to a question lie in its text, before it: a model answers better what comes last, and more questions to a file find its KV.

<file name="report.txt" lines="2" tokens="12">
Two lines
of a file.
</file>

What is in @report.txt?

The number of lines says where a file ends: whatever is in it, it cannot pretend to be the question.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

_HEAD = re.compile(r'<file name="([^"\n]{0,4096})" lines="([0-9]{1,9})" tokens="([0-9]{1,12})">\n')
_END = "</file>\n\n"


@dataclass(frozen=True, slots=True)
class Attached:
    """A text file of a question. tokens: of its text alone, as the model counted them that it was attached for."""

    name: str
    text: str = field(repr=False)
    tokens: int = 0


def joined(question: str, files: Sequence[Attached]) -> str:
    """The message that says both."""
    parts = []
    for file in files:
        name = file.name.replace('"', "'").replace("\n", " ")
        parts.append(f'<file name="{name}" lines="{file.text.count(chr(10)) + 1}" tokens="{file.tokens}">\n{file.text}\n{_END}')
    return "".join(parts) + question


def split(message: str) -> tuple[str, tuple[Attached, ...]]:
    """The reverse: the question, and its files."""
    files: list[Attached] = []
    start = 0
    while (head := _HEAD.match(message, start)) is not None:
        name, lines, tokens = head[1], int(head[2]), int(head[3])
        end = head.end()
        for _ in range(lines):
            end = message.find("\n", end) + 1
            if not end:
                return message[start:], tuple(files)
        if not message.startswith(_END, end):
            break
        files.append(Attached(name, message[head.end() : end - 1], tokens))
        start = end + len(_END)
    return message[start:], tuple(files)


def folded(message: str) -> str:
    """For a person to read: the question, with a line for each file instead of its text."""
    question, files = split(message)
    if not files:
        return message
    return "\n".join([*(f"@{file.name} · {file.tokens:,} tokens" for file in files), "", question])

"""What commands write: replies to stdout, everything else to stderr. Terminals get sanitised text, pipes the exact text."""

from __future__ import annotations

import shutil
import sys
import textwrap
import time
from types import TracebackType
from typing import Self, TextIO

import click

from qwen2_local.errors import UsageError
from qwen2_local.sanitize import clean, clean_line


class Status:
    """One line on stderr about work that takes over a second; gone when the work is done. Silent where stderr is no terminal."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._shown = ""
        self._live = sys.stderr.isatty()
        self._phases: dict[str, tuple[float, int]] = {}

    def show(self, text: str) -> None:
        """Replace the line."""
        if self._live and time.monotonic() - self._started > 1.0:
            line = clean_line(text)[: shutil.get_terminal_size().columns - 1]  # a line that wraps cannot be replaced
            print(f"\r{line:<{len(self._shown)}}", end="", file=sys.stderr, flush=True)
            self._shown = line

    def prefill(self, done: int, total: int) -> None:
        """Progress of reading a prompt, in tokens."""
        spent = time.monotonic() - self._started
        left = f" · {spent / done * (total - done):.0f} s left" if 0 < done < total else ""
        self.show(f"reading {done:,} of {total:,} tokens{left}")
        if done == total:
            self.clear()

    def bytes(self, doing: str, done: int, total: int) -> None:
        """Progress of work measured in bytes, with its speed and the time left. total: 0 while that is not known."""
        if not total:
            return self.show(doing)
        now = time.monotonic()
        # Not since the start: what an earlier run has done took this one no time.
        began, before = self._phases.setdefault(doing, (now, done))
        spent, moved = now - began, done - before
        speed = f" · {moved / spent / 1e6:.0f} MB/s · {spent / moved * (total - done):.0f} s left" if spent > 0 and moved > 0 else ""
        self.show(f"{doing} · {done / total:.0%} of {gigabytes(total)}{speed}")

    def clear(self) -> None:
        """Take the line away."""
        if self._shown:
            print("\r" + " " * len(self._shown) + "\r", end="", file=sys.stderr, flush=True)
            self._shown = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.clear()


def reply(text: str) -> None:
    """A piece of a reply, at once."""
    if text:
        sys.stdout.write(clean(text) if sys.stdout.isatty() else text)
        sys.stdout.flush()


def note(text: str) -> None:
    """Lines for the person, on stderr."""
    print(wrap(clean(text), sys.stderr), file=sys.stderr, flush=True)


def quote(text: str) -> None:
    """Somebody's text on stderr, with its lines as they are."""
    print(clean(text), file=sys.stderr, flush=True)


def wrap(text: str, stream: TextIO, *, indent: int | None = None) -> str:
    """`text` with its lines broken between words where `stream` is a terminal that they are too wide for; elsewhere as it is.

    indent: of further lines, in characters; by default as their first.
    """
    if not stream.isatty():
        return text
    width = max(20, shutil.get_terminal_size().columns)
    lines = []
    for line in text.split("\n"):
        further = " " * (len(line) - len(line.lstrip(" ")) if indent is None else indent)
        parts = textwrap.wrap(
            line, width, subsequent_indent=further, break_long_words=False, break_on_hyphens=False, expand_tabs=False, replace_whitespace=False
        )
        lines += parts if len(line) > width else [line]
    return "\n".join(lines)


def table(rows: list[tuple[str, ...]]) -> None:
    """Columns, the first row being the head."""
    cells = [tuple(clean_line(cell) for cell in row) for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    for row in cells:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def gigabytes(size: int) -> str:
    """Bytes as people say them: "4.68 GB", "12 MB", "7 kB"."""
    if size < 1e6:
        return f"{size / 1e3:.0f} kB"
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.0f} MB"


def confirmed(what: str, *, yes: bool) -> bool:
    """Whether `what` is really to be deleted. Raises UsageError where nobody can be asked."""
    if yes:
        return True
    if not sys.stdin.isatty():
        raise UsageError(f"Deleting {what} has to be confirmed.", hint="Say --yes where nobody can be asked.")
    if click.confirm(f"Delete {what}?", err=True):
        return True
    note("Nothing was deleted.")
    return False


def ago(seconds: float) -> str:
    """How long ago, in words: "3 hours ago"."""
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if (count := int(seconds // length)) > 0:
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    return "just now"

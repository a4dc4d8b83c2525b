"""What of an unfinished output is on the disk for certain, so that a conversion that was killed goes on where it was.

A text file of lines, each added at once when what it tells is on the disk:

    qwen2-local 1 FINGERPRINT           what is being made, and of what
    89abcdef 17 18 21                   these pieces are written; first comes the CRC-32 of the rest
    89abcdef whole                      all is written, and may be published

A line that a crash has torn ends it: what comes after is done again.
"""

from __future__ import annotations

import os
import re
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from qwen2_local.files import write_all

_MAGIC = "qwen2-local 1"
_MAX = 64 << 20
_WHOLE = "whole"
_TEXT = re.compile(rf"\d{{1,9}}( \d{{1,9}})*|{_WHOLE}")
# How much work a crash may cost: syncing more often would slow the work down.
_EVERY_BYTES = 256 << 20
_EVERY_S = 5.0


@dataclass(frozen=True, slots=True)
class Entries:
    """What a journal tells. pieces: that are written. whole: all is, and may have been published. nbytes: of its valid lines."""

    pieces: frozenset[int]
    whole: bool
    nbytes: int


def read_journal(path: Path, fingerprint: str) -> Entries | None:
    """The journal `path`, if there is one, of this `fingerprint`."""
    try:
        with path.open("rb") as file:
            lines = file.read(_MAX).split(b"\n")[:-1]
    except FileNotFoundError:
        return None
    if not lines or lines[0] != _first(fingerprint).encode():
        return None
    pieces: set[int] = set()
    whole = False
    nbytes = len(lines[0]) + 1
    for line in lines[1:]:
        text = line[9:].decode("ascii", "replace")
        if line != _line(text).encode() or not _TEXT.fullmatch(text):
            break
        if text == _WHOLE:
            whole = True
        else:
            pieces.update(map(int, text.split()))
        nbytes += len(line) + 1
    return Entries(frozenset(pieces), whole, nbytes)


class Journal:
    """A journal being written. Its methods are for one thread; it syncs on another one, so that work goes on meanwhile."""

    def __init__(self, handle: int, data: Sequence[int], finished: frozenset[int], pool: ThreadPoolExecutor) -> None:
        """handle: of the journal, at its end. data: handles of the files that it tells about. finished: what it has told already."""
        self.finished = finished
        self._handle = handle
        self._data = data
        self._pool = pool
        self._syncing: Future[None] | None = None
        self._pending: list[int] = []
        self._nbytes = 0
        self._last = time.monotonic()

    def note(self, piece: int, nbytes: int) -> None:
        """A piece is written, `nbytes` of the output. Raises OSError of an earlier sync."""
        self._pending.append(piece)
        self._nbytes += nbytes
        late = self._nbytes >= _EVERY_BYTES or time.monotonic() - self._last >= _EVERY_S
        if late and (self._syncing is None or self._syncing.done()):
            self._start()

    def sync(self) -> None:
        """Returns when all that was noted will survive a crash. Raises OSError."""
        if self._pending:
            self._start()
        if self._syncing is not None:
            self._syncing.result()

    def whole(self) -> None:
        """All of the output, also what lies beside the weights, is on the disk."""
        self.sync()
        self._add(_WHOLE)

    def _start(self) -> None:
        if self._syncing is not None:
            self._syncing.result()
        pieces, self._pending, self._nbytes, self._last = self._pending, [], 0, time.monotonic()
        self._syncing = self._pool.submit(self._record, pieces)

    def _record(self, pieces: list[int]) -> None:
        for handle in self._data:
            os.fsync(handle)
        self._add(" ".join(map(str, pieces)))

    def _add(self, text: str) -> None:
        write_all(self._handle, f"{_line(text)}\n".encode())
        os.fsync(self._handle)


@contextmanager
def journal(path: Path, fingerprint: str, entries: Entries | None, data: Sequence[int]) -> Iterator[Journal]:
    """The journal `path`, begun, or taken up after its `entries`. data: handles of the files that it tells about, which are on the disk.

    When the block ends, also by an error, what was noted is told. Raises OSError.
    """
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        with ThreadPoolExecutor(1, "journal") as pool:
            os.ftruncate(handle, entries.nbytes if entries else 0)
            os.lseek(handle, 0, os.SEEK_END)
            if entries is None:
                write_all(handle, f"{_first(fingerprint)}\n".encode())
            os.fsync(handle)
            made = Journal(handle, data, entries.pieces if entries else frozenset(), pool)
            try:
                yield made
            except BaseException:
                with suppress(OSError):
                    made.sync()
                raise
            made.sync()
    finally:
        os.close(handle)


def _first(fingerprint: str) -> str:
    return f"{_MAGIC} {fingerprint}"


def _line(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x} {text}"

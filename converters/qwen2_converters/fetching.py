"""Fetches the shards of a checkpoint while it is converted: `arriving.Arrivals` for files on a server.

SOURCE/model-00001-of-00004.safetensors      whole, or a stub: the header and holes
BESIDE/NAME/                                 where the downloader works on one shard
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from qwen2_converters.download import download, read_range
from qwen2_converters.remote import RemoteFile
from qwen2_local import files
from qwen2_local.errors import BadFile, Cancelled
from qwen2_local.formats.safetensors import MAX_HEADER

AHEAD = 2
"""Shards that are on the disk at once, where each is deleted as soon as it is converted."""

_PARALLEL = 4
_FIRST = 1 << 18  # holds most headers
_TICK_S = 0.1
_GRACE_S = 5.0


def shards_folder(source: Path) -> Path:
    """BESIDE for the unfinished checkpoint in the folder `source`."""
    return source.with_name("shards")


def is_stub(path: Path) -> bool:
    """Does hardly anything of the file lie on the disk? A file that does not look it may still be one, where the file system is odd: hashes tell."""
    state = path.stat()
    return state.st_blocks * 512 < state.st_size // 10


def make_stub(file: RemoteFile, path: Path) -> None:
    """Puts a stub of the safetensors file `file` at `path`. Raises FetchFailed, BadFile for what has no such header."""
    head = read_range(file, 0, min(_FIRST, file.size)) if file.size else b""
    length = 8 + int.from_bytes(head[:8], "little")
    if not 8 < length <= min(file.size, MAX_HEADER + 8):
        raise BadFile(f"{file.name} is no safetensors file, or damaged.", hint="Try another revision or repository.")
    if length > len(head):
        head += read_range(file, len(head), length)
    _write_stub(path, head[:length], file.size)


def _header(path: Path) -> bytes:
    """The first bytes of a safetensors file, up to its tensors."""
    with path.open("rb") as file:
        start = file.read(8)
        return start + file.read(min(int.from_bytes(start, "little"), MAX_HEADER))


def _write_stub(path: Path, head: bytes, size: int) -> None:
    temporary = path.with_name(f"{path.name}.stub")
    with files.disk_errors(path, len(head)):
        files.write_file(temporary, head)
        os.truncate(temporary, size)
        temporary.replace(path)


class Fetching:
    """Shards on their way into the folder `source`, where those of `missing` are stubs. Use it in a `with` block: they come in threads of their own.

    identity: says which bytes they will be. keep: all are wanted, also those that an earlier run has converted. discard: make stubs again of
    those that are consumed. bounded: be at most AHEAD shards ahead of the conversion.
    """

    def __init__(self, missing: Sequence[RemoteFile], source: Path, beside: Path, identity: str, *, keep: bool, discard: bool, bounded: bool) -> None:
        self._left = sorted(missing, key=lambda file: file.name)
        self._source = source
        self._beside = beside
        self._identity = identity
        self._keep = keep
        self._discard = discard
        self._cancelled = threading.Event()
        self._changed = threading.Condition()
        self._coming = {file.name for file in missing}
        self._ahead = AHEAD if bounded else len(missing)
        self._errors: list[BaseException] = []
        self._sizes = {file.name: file.size for file in missing}
        self._bytes = dict.fromkeys(self._sizes, 0)
        self._threads: list[threading.Thread] = []
        self.tell: Callable[[], None] = lambda: None

    @property
    def identity(self) -> str:
        """As `Arrivals` says."""
        return self._identity

    @property
    def total(self) -> int:
        """Bytes that will have come."""
        return sum(self._sizes.values())

    @property
    def done(self) -> int:
        """Bytes that have come."""
        return sum(self._bytes.values())

    def wait(self, file: Path) -> None:
        """As `Arrivals` says; `tell` is called now and then."""
        self._start()
        while True:
            with self._changed:
                if self._errors:
                    raise self._errors[0]
                if file.name not in self._coming:
                    return
                self._changed.wait(_TICK_S)
            self.tell()

    def consumed(self, file: Path) -> None:
        """As `Arrivals` says."""
        with self._changed:
            if self._threads:
                self._ahead += file.name in self._sizes
                self._changed.notify_all()
            elif not self._keep:  # an earlier run has finished with it
                self._left = [one for one in self._left if one.name != file.name]
                self._sizes.pop(file.name, None)
                self._bytes.pop(file.name, None)
        path = self._source / file.name
        if self._discard and path.is_file() and not is_stub(path):
            _write_stub(path, _header(path), path.stat().st_size)

    def finish(self) -> None:
        """Returns when all have come: for a source that is to be kept."""
        for name in sorted(self._coming):
            self.wait(self._source / name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._cancelled.set()
        with self._changed:
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(_GRACE_S)

    def _start(self) -> None:
        if not self._threads:
            count = min(AHEAD if self._discard else _PARALLEL, len(self._left))
            self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(count)]
            for thread in self._threads:
                thread.start()

    def _work(self) -> None:
        try:
            while (file := self._next()) is not None:
                self._fetch(file)
                with self._changed:
                    self._coming.discard(file.name)
                    self._changed.notify_all()
        except BaseException as error:  # It goes to the thread that waits, whatever it is.
            with self._changed:
                self._errors.append(error)
                self._changed.notify_all()

    def _next(self) -> RemoteFile | None:
        """The next file, once there may be one more on the disk; None at the end."""
        with self._changed:
            while self._left and self._ahead <= 0:
                self._changed.wait(_TICK_S)
                if self._cancelled.is_set():
                    break
            if self._cancelled.is_set():
                raise Cancelled("The download was stopped.", hint="Run the same command again: what has come is kept.")
            self._ahead -= 1
            return self._left.pop(0) if self._left else None

    def _fetch(self, file: RemoteFile) -> None:
        place = self._beside / file.name

        def advance(count: int) -> None:
            self._bytes[file.name] = count

        download([file], place, progress=lambda step: advance(step.done), cancelled=self._cancelled)
        final = self._source / file.name
        # Nothing vouched for the stub's header, by which the conversion finds the weights.
        right = _header(place / file.name) == _header(final)
        (place / file.name).replace(final)
        with suppress(OSError):
            place.rmdir()
        if not right:
            fault = f"{file.name} began otherwise when its server was first asked."
            raise BadFile(fault, hint="Run the same command again: now it is whole and verified.")
        advance(file.size)

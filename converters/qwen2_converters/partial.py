"""A file on its way: NAME.part, what is known of it in NAME.part.json, and hashes that are always those of the bytes in it.

Only this program writes here, under `download`'s lock. Whoever dies at any point leaves a beginning of the file and a sidecar that tells of
which, or one of them without the other, which is worth nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Self

from qwen2_converters.remote import RemoteFile
from qwen2_local.errors import UsageError
from qwen2_local.files import write_atomic

_READ = 1 << 20
_MAX_SIDECAR = 10_000


class Hashes:
    """The SHA-256 of some bytes, and their git blob id as well if `file` has one."""

    def __init__(self, file: RemoteFile) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        self._blob = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False) if file.blob_id and not file.sha256 else None

    def update(self, data: bytes | memoryview) -> None:
        """Goes on with `data`."""
        self._sha256.update(data)
        if self._blob:
            self._blob.update(data)

    @property
    def sha256(self) -> str:
        """Of the bytes so far, in hexadecimal."""
        return self._sha256.hexdigest()

    def right(self) -> bool:
        """Whether these are the file's. True for one that has no hash."""
        if self._blob:
            return self._blob.hexdigest() == self._file.blob_id
        return self._file.sha256 in (None, self.sha256)


class Partial:
    """The beginning of one file, in `folder`. Use it in a `with` block.

    length: bytes that are there. version: the ETag (or date) that its server gave them, "" if none. host: that server.
    """

    def __init__(self, file: RemoteFile, folder: Path, on_read: Callable[[int], None]) -> None:
        """Takes up what an earlier run left, if it is of this very file, and hashes it; `on_read` is told how far that is."""
        self.file = file
        self.final = folder / file.name
        self.path, self._sidecar = part_names(self.final)
        self.version, self.host, self.length = "", "", 0
        self._hashes = Hashes(file)
        self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            self._take_up(on_read)
        except BaseException:
            os.close(self._handle)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._handle)

    def restart(self, version: str, host: str) -> None:
        """Throws away what there is; what comes now is `version` from `host`."""
        self._empty()
        # Durable in this order: else a crash of the machine could leave old bytes under the new version's name.
        os.fsync(self._handle)
        self.version, self.host = version, host
        self._note()

    def write(self, data: bytes) -> None:
        """Goes on with `data`."""
        view = memoryview(data)
        while view:
            written = os.write(self._handle, view)
            self._hashes.update(view[:written])
            self.length += written
            view = view[written:]

    def right(self) -> bool:
        """Whether what is there is the whole file, as far as can be told."""
        return self.length == self.file.size and self._hashes.right()

    def publish(self) -> str:
        """Gives the file its name, for good, and its SHA-256. The sidecar stays, with that, until `discard`."""
        os.fsync(self._handle)
        self._note(self._hashes.sha256)
        self.path.replace(self.final)
        with suppress(OSError):
            sync_folder(self.final.parent)
        return self._hashes.sha256

    def set_aside(self) -> None:
        """Renames what is there to NAME.bad, in the place of an older one, and begins anew."""
        self.path.replace(bad_name(self.final))
        # Opened before the old one is closed: if it fails, `__exit__` closes that one, and not what another thread has opened meanwhile.
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        os.close(self._handle)
        self._handle = handle
        self._empty()

    def _note(self, sha256: str = "") -> None:
        known = {"file": _identity(self.file), "version": self.version, "host": self.host, "sha256": sha256}
        write_atomic(self._sidecar, json.dumps(known))

    def _empty(self) -> None:
        self._sidecar.unlink(missing_ok=True)
        os.ftruncate(self._handle, 0)
        os.lseek(self._handle, 0, os.SEEK_SET)
        self._hashes = Hashes(self.file)
        self.version, self.host, self.length = "", "", 0

    def _take_up(self, on_read: Callable[[int], None]) -> None:
        known = _read_sidecar(self._sidecar)
        size = os.fstat(self._handle).st_size
        version, host = known.get("version"), known.get("host")
        if known.get("file") != _identity(self.file) or size > self.file.size or not isinstance(version, str) or not isinstance(host, str):
            return self._empty()
        if self.file.checked_by == "size" and not version:
            return self._empty()  # Nothing would tell whether the rest is of the same file.
        while data := os.read(self._handle, _READ):
            self._hashes.update(data)
            self.length += len(data)
            on_read(self.length)
        self.version, self.host = version, host


def _read_sidecar(path: Path) -> dict[str, object]:
    with suppress(OSError, ValueError, RecursionError):
        with path.open("rb") as file:
            raw = file.read(_MAX_SIDECAR)
        known = json.loads(raw)
        return known if isinstance(known, dict) else {}
    return {}


def finished(file: RemoteFile, final: Path, on_read: Callable[[int], None]) -> str:
    """The SHA-256 of `final` if it is the whole, right `file`; else nothing. Without a hash of the source's, an earlier run's decides."""
    if not plain_or_none(final) or final.stat().st_size != file.size:
        return ""
    known = _read_sidecar(part_names(final)[1])
    if file.checked_by == "size" and (not file.etag or known.get("file") != _identity(file)):
        return ""
    hashes = Hashes(file)
    with final.open("rb") as opened:
        while data := opened.read(_READ):
            hashes.update(data)
            on_read(opened.tell())
    right = hashes.sha256 == known.get("sha256") if file.checked_by == "size" else hashes.right()
    return hashes.sha256 if right else ""


def _identity(file: RemoteFile) -> list[object]:
    """What a beginning must agree in with the file. A hash says all; where it is known, it does not matter from which server the bytes are."""
    return [file.size, file.sha256 or file.blob_id or file.etag]


def part_names(final: Path) -> tuple[Path, Path]:
    """Where the beginning of `final` is kept, and its sidecar."""
    return final.with_name(f"{final.name}.part"), final.with_name(f"{final.name}.part.json")


def bad_name(final: Path) -> Path:
    """Where a wrong `final` is set aside."""
    return final.with_name(f"{final.name}.bad")


def discard(final: Path) -> None:
    """Deletes what lies beside `final`, finished or not. Never raises OSError."""
    for path in (*part_names(final), bad_name(final)):
        with suppress(OSError):
            path.unlink(missing_ok=True)


def plain_or_none(path: Path) -> bool:
    """Whether there is a file at `path`. Raises UsageError for anything else there: a folder, a link, a pipe."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return False
    if not stat.S_ISREG(mode):
        raise UsageError(f"{path} is in the way: it is no plain file.", hint="Move it away.")
    return True


def sync_folder(folder: Path) -> None:
    """Makes the names in `folder` durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

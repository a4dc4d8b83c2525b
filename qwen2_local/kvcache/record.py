"""One stored link as a file: a header of fixed size, the tokens, the KV bytes. The SHA-256 in the header is over all the rest.

What is in a file has to be exactly what its name says, so a file of another place, model or length is none. Nothing is allocated by what
a header says before it was compared with the file's size.
"""

from __future__ import annotations

import hashlib
import os
import stat
import struct
from pathlib import Path

from qwen2_local.kvcache.chain import CHUNK, Link, link

_FIELDS = struct.Struct("<8sHHIQ32s32s")
"""Magic, version, tokens, zero, bytes of data, root, parent; behind them the checksum, the tokens, the data."""

_CHECKSUM = 32
_HEADER = _FIELDS.size + _CHECKSUM

_MAGIC = b"QWEN2KV\0"
_VERSION = 1
_MOST = 1 << 30
"""Bytes of data. 256 tokens of Qwen2-72B in 32 bits are 168 MB."""

_WIDTH = 4


class Damaged(Exception):
    """What lies there is not the record of that name."""


def size_of(link: Link, data: int) -> int:
    """Bytes of the file of a link with so many bytes of data."""
    return _HEADER + len(link.packed) + data


def head(link: Link, data: bytes) -> bytes:
    """What a file has before its data. Raises ValueError for more data than a reader would accept."""
    if len(data) > _MOST:
        raise ValueError(f"{len(data)} bytes are too many for one chunk")
    return _fields(link, len(data)) + _checksum(link, data) + link.packed


def read(path: Path, wanted: Link) -> bytes:
    """The data of the file at `path`, which has to be that of `wanted`. Raises Damaged, FileNotFoundError and other OSErrors."""
    with _Reader(path) as reader:
        found, length, checksum = reader.link(wanted.start)
        if found != wanted:
            raise Damaged
        data = reader.read(length)
    if _checksum(wanted, data) != checksum:
        raise Damaged
    return data


def peek(path: Path, start: int) -> Link:
    """The link whose file lies at `path`, by its header; its data was not looked at. Raises as `read` does."""
    with _Reader(path) as reader:
        return reader.link(start)[0]


def _fields(link: Link, length: int) -> bytes:
    return _FIELDS.pack(_MAGIC, _VERSION, link.count, 0, length, link.root, link.parent)


def _checksum(link: Link, data: bytes) -> bytes:
    digest = hashlib.sha256(_fields(link, len(data)))
    digest.update(link.packed)
    digest.update(data)
    return digest.digest()


class _Reader:
    def __init__(self, path: Path) -> None:
        # No link to elsewhere, and no waiting for whoever writes into a pipe.
        try:
            self._handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if isinstance(error, FileNotFoundError | PermissionError) or not os.path.lexists(path):
                raise
            raise Damaged from error  # a symbolic link, a socket
        state = os.fstat(self._handle)
        self._size = state.st_size if stat.S_ISREG(state.st_mode) else -1

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._handle)

    def link(self, start: int) -> tuple[Link, int, bytes]:
        """The link that the header and the tokens say, the bytes of data, their checksum."""
        if self._size < _HEADER:
            raise Damaged
        magic, version, count, zero, length, root, parent = _FIELDS.unpack(self.read(_FIELDS.size))
        checksum = self.read(_CHECKSUM)
        if (magic, version, zero) != (_MAGIC, _VERSION, 0) or not 0 < count <= CHUNK or length > _MOST:
            raise Damaged
        if self._size != _HEADER + count * _WIDTH + length:
            raise Damaged
        return link(root, parent, start, self.read(count * _WIDTH)), length, checksum

    def read(self, count: int) -> bytes:
        """Exactly so many bytes. Raises Damaged where the file ends before."""
        data = os.read(self._handle, count)
        if len(data) == count:
            return data
        parts = [data]  # a signal, a file over 2 GB, a file that was cut meanwhile
        left = count - len(data)
        while left:
            parts.append(os.read(self._handle, left))
            if not parts[-1]:
                raise Damaged
            left -= len(parts[-1])
        return b"".join(parts)

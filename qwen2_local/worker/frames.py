"""Frames on a pipe: four bytes of length, most significant first, then that many bytes of JSON.

What comes out of a pipe is not trusted: a frame has a bounded length and is one JSON value, or `FrameError` says what is wrong.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator

from qwen2_local.errors import BackendError

MAX_FRAME = 16_000_000
"""Bytes of JSON in a frame at most: room for the scores of 131,072 tokens."""

_LENGTH = struct.Struct(">I")


class FrameError(BackendError):
    """What came over the pipe to or from a worker is no message of ours."""

    def __init__(self, what: str, *, hint: str = "Run it again; if it happens again, report it.") -> None:
        super().__init__(f"A worker process and this program do not understand each other: {what}.", hint=hint)


def encode(value: object) -> bytes:
    """A frame of a JSON value. Raises FrameError for one that is too large."""
    body = _encode(value).encode("ascii")
    if len(body) > MAX_FRAME:
        raise FrameError(f"a message of {len(body):,} bytes is too large")
    return _LENGTH.pack(len(body)) + body


class Decoder:
    """Bytes as they come, cut anywhere, to values."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[object]:
        """The values that are whole now. Raises FrameError; nothing more can be read then."""
        self._buffer += data
        start = 0
        try:
            while len(self._buffer) - start >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(self._buffer, start)
                if not 0 < length <= MAX_FRAME:
                    raise FrameError(f"a frame of {length:,} bytes")
                end = start + _LENGTH.size + length
                if len(self._buffer) < end:
                    break
                body = bytes(self._buffer[start + _LENGTH.size : end])
                start = end
                yield _parse(body)
        finally:
            del self._buffer[:start]

    def end(self) -> None:
        """Nothing more comes. Raises FrameError in the middle of a frame."""
        if self._buffer:
            raise FrameError("it ends in the middle of a frame")


def _constant(name: str) -> float:
    if name == "-Infinity":  # the log-probability of what cannot be
        return float("-inf")
    raise ValueError(f"{name} is no number")


_encode = json.JSONEncoder(separators=(",", ":")).encode
_decode = json.JSONDecoder(parse_constant=_constant).decode


def _parse(body: bytes) -> object:
    try:
        return _decode(body.decode("ascii"))
    except (ValueError, RecursionError) as error:
        raise FrameError(f"a frame is no JSON ({str(error)[:100]})") from error

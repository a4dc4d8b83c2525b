"""Tokens to text while they stream: whole characters only, and nothing of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from qwen2_local.errors import InvalidSampling


class TextStream:
    """Bytes of tokens in, text out, up to the first stop string.

    The first stop string is the one complete first; of those that end at the same character, the longest. So the text depends only on the
    bytes, not on how they were cut into tokens. Bytes that are no UTF-8 become U+FFFD as soon as that is certain. Text that may still
    turn out to be the start of a stop string is held back.
    """

    stopped: bool
    """A stop string was met: nothing more will come."""

    def __init__(self, stops: Sequence[str] = ()) -> None:
        """`stops` are the stop strings; raises InvalidSampling for an empty one."""
        if "" in stops:
            raise InvalidSampling("A stop string is empty, which would stop every reply at once.", hint="Leave it out, or give it a character.")
        self.stopped = False
        self._stops = tuple(stops)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def push(self, data: bytes) -> str:
        """The text that has become certain with these bytes; perhaps none."""
        return "" if self.stopped else self._advance(self._decoder.decode(data))

    def finish(self) -> str:
        """The text held back, the stream being at its end. Later calls give nothing."""
        if self.stopped:
            return ""
        text = self._advance(self._decoder.decode(b"", final=True)) + self._held
        self._held = ""
        return text

    def _advance(self, fresh: str) -> str:
        text = self._held + fresh
        ends = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if ends:
            self.stopped = True
            self._held = ""
            return text[: min(ends)[1]]
        certain = len(text) - self._undecided(text)
        self._held = text[certain:]
        return text[:certain]

    def _undecided(self, text: str) -> int:
        """The length of the longest end of `text` with which a stop string starts."""
        longest = min(len(text), max(map(len, self._stops), default=1) - 1)
        return next((length for length in range(longest, 0, -1) if any(stop.startswith(text[-length:]) for stop in self._stops)), 0)

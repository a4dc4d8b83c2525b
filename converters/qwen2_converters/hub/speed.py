"""How fast the last pull was, for a guess at how long the next one takes."""

from __future__ import annotations

import time
from contextlib import suppress

from qwen2_local import files, paths

_FILE = "download-speed"
_LEAST = 20_000_000
"""Bytes below which a speed says more of the server's manners than of the line."""


class Stopwatch:
    """Takes the speed of one download, from its first sign to its last."""

    def __init__(self) -> None:
        self._began: tuple[float, int] | None = None
        self._last = (0.0, 0)

    def at(self, done: int) -> None:
        """So many bytes are there now."""
        self._last = (time.monotonic(), done)
        self._began = self._began or self._last

    def remember(self) -> None:
        """Keeps the speed, if enough has come. Never raises OSError: it is only a guess."""
        if self._began is not None and self._last[1] - self._began[1] >= _LEAST:
            speed = (self._last[1] - self._began[1]) / max(0.001, self._last[0] - self._began[0])
            with suppress(OSError):
                files.write_atomic(paths.cache() / _FILE, f"{speed:.0f}\n")


def last_speed() -> int:
    """Bytes a second of the last pull, 0 if there was none."""
    with suppress(OSError, ValueError), (paths.cache() / _FILE).open("rb") as file:
        speed = int(file.read(20))
        return speed if 0 < speed < 1 << 40 else 0
    return 0

"""When to draw again what has come of a reply: often enough to look alive, rarely enough to leave the CPU to the model."""

from __future__ import annotations

import time
from collections.abc import Callable

LEAST = 0.1  # seconds between two drawings: faster is not read
MOST = 1.0  # a slow machine still shows that something comes
SHARE = 30  # a drawing waits this many times what the last one cost: the app takes a thirtieth of a core for it at most


class Pace:
    """Says when the next flush is due.

    The cost of a flush is the CPU time that the calling (UI) thread has used since it began: with the drawing that follows it, and with
    whatever else it had to do.
    clock: seconds that pass; cpu: seconds of CPU that the calling thread has used.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, cpu: Callable[[], float] = time.thread_time) -> None:
        self._clock, self._cpu = clock, cpu
        self._flushed, self._used = clock() - MOST, cpu()

    def flushed(self) -> None:
        """A flush begins now: call it before the work."""
        self._flushed, self._used = self._clock(), self._cpu()

    def wait(self) -> float:
        """Seconds until the next flush is due; 0.0 if it is."""
        pause = min(max(LEAST, SHARE * (self._cpu() - self._used)), MOST)
        return max(0.0, self._flushed + pause - self._clock())

"""A backend without a model, for tests of the engine: it counts up, writes down what it was told, and waits or fails on demand."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from qwen2_local.backends.base import BackendInfo, Row, RowResult
from qwen2_local.errors import Cancelled

VOCABULARY = 1000


class Scripted:
    """The token after `n` is `n + 1`. Checks that it is used from one thread and as the Protocol says."""

    def __init__(self, *, context: int = 256, step_tokens: int = 32) -> None:
        self.info = BackendInfo("scripted", "1", "qwen2", context, VOCABULARY, 1, 1)
        self.step_tokens = step_tokens
        self.sequences: dict[int, list[int]] = {}
        self.steps: list[tuple[int, tuple[int, ...]]] = []
        """Of every step that was begun: tokens already there, tokens that came."""
        self.choices: list[object] = []
        self.trims: list[int] = []
        self.opened = 0
        self.closed = 0
        self.fail: dict[int, BaseException] = {}
        """By number of the step: what it raises."""
        self.hold_from: int | None = None
        """Steps from this number on wait for `go`, or for a cancel."""
        self.held = threading.Semaphore(0)
        """Released once for each step that begins to wait."""
        self.go = threading.Semaphore(0)
        self._cancelled = threading.Event()
        self._thread = threading.get_ident()

    def open(self) -> int:
        self._check()
        number, self.opened = self.opened, self.opened + 1
        self.sequences[number] = []
        return number

    def step(self, rows: Sequence[Row]) -> list[RowResult]:
        self._check()
        self._cancelled.clear()
        (row,) = rows
        present = self.sequences[row.sequence]
        number = len(self.steps)
        self.steps.append((len(present), tuple(row.tokens)))
        self.choices.append(row.choose)
        assert 0 < len(row.tokens) <= self.step_tokens
        assert len(present) + len(row.tokens) <= self.info.context
        if number in self.fail:
            raise self.fail[number]
        if self.hold_from is not None and number >= self.hold_from:
            self.held.release()
            while not self.go.acquire(timeout=0.005):
                if self._cancelled.is_set():
                    raise Cancelled("Stopped.")
        present.extend(row.tokens)
        return [RowResult(None if row.choose is None else (present[-1] + 1) % row.choose.limit)]

    def trim(self, sequence: int, length: int) -> None:
        self._check()
        assert 0 <= length <= len(self.sequences[sequence])
        self.trims.append(length)
        del self.sequences[sequence][length:]

    def free(self, sequence: int) -> None:
        self._check()
        del self.sequences[sequence]

    def cancel(self) -> None:
        self._cancelled.set()

    def close(self) -> None:
        self._check()
        self.closed += 1

    def _check(self) -> None:
        assert threading.get_ident() == self._thread, "used from another thread than the one that made it"
        assert not self.closed

"""A reply on its way: a thread of its own reads it, the screen takes what came whenever it likes. Nothing is posted per token."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from qwen2_local.sanitize import clean
from qwen2_local.types import Completion

if TYPE_CHECKING:
    from qwen2_local.aio import Readable


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a reply is. Counts are tokens.

    phase: waiting for the model to begin; reading the prompt; writing; over. read: of the prompt, what was cached included. cached: what was there
    already; 0 until it is known. first_token_s: seconds from the question to the first token, 0 before it. left_s: of reading; None: not known yet.
    """

    phase: Literal["waiting", "reading", "writing", "over"]
    read: int = 0
    prompt: int = 0
    cached: int = 0
    written: int = 0
    tokens_per_s: float = 0.0
    first_token_s: float = 0.0
    left_s: float | None = None


class LiveReply:
    """Begins a reply, and reads it to its end. All methods may be called from any thread, and none waits."""

    def __init__(self, begin: Callable[[Callable[[int, int], None]], Readable]) -> None:
        """begin: called in the thread; what it is given is to be told how far reading is. What it raises ends up in `error`."""
        self.error: Exception | None = None
        self.completion: Completion | None = None
        self._begin = begin
        self._reply: Readable | None = None
        self._lock = threading.Lock()
        self._parts: list[str] = []
        self._over = False
        self._stopped = False
        self._began = time.perf_counter()
        # (when, tokens read) at the first slice of the prompt, and at the latest: the speed between them says what is left.
        self._slices: tuple[tuple[float, int], tuple[float, int]] | None = None
        self._prompt = 0
        self._written = 0
        self._first = self._last = 0.0
        self._thread = threading.Thread(target=self._read, name="qwen2-local reply", daemon=True)
        self._thread.start()

    @property
    def over(self) -> bool:
        """Has it ended, and is it kept in its chat?"""
        return self._over

    @property
    def stopped(self) -> bool:
        """Was it asked to stop?"""
        return self._stopped

    def take(self) -> str:
        """The text that came since the last call, without anything that a terminal obeys."""
        with self._lock:
            text = "".join(self._parts)
            self._parts.clear()
        return clean(text)

    def stop(self) -> None:
        """What came stays; `over` follows soon."""
        with self._lock:
            self._stopped = True
            reply = self._reply
        if reply is not None:
            reply.cancel()

    def wait(self, timeout: float) -> bool:
        """For the end of the app only: until what came is kept. Was it in time?"""
        self._thread.join(timeout)
        return self._over

    def progress(self) -> Progress:
        """How far it is."""
        done, slices, written = self.completion, self._slices, self._written
        phase: Literal["waiting", "reading", "writing", "over"]
        phase = "over" if self._over else "writing" if written else "reading" if slices else "waiting"
        read, left = 0, None
        if slices is not None:
            (since, at_first), (now, read) = slices
            if now > since and read > at_first:
                left = (self._prompt - read) * (now - since) / (read - at_first) - (time.perf_counter() - now)
                left = max(0.0, left)
        speed = (written - 1) / (self._last - self._first) if written > 1 and self._last > self._first else 0.0
        first = self._first - self._began if written else 0.0
        if done is not None:
            usage = done.usage
            return Progress(phase, usage.prompt_tokens, usage.prompt_tokens, usage.cached_tokens, written, usage.decode_tokens_per_s, first)
        return Progress(phase, read, self._prompt, 0, written, speed, first, left)

    def _read(self) -> None:
        try:
            reply = self._begin(self._reading)
            with self._lock:
                self._reply = reply
                stopped = self._stopped
            if stopped:
                reply.cancel()
            try:
                for piece in reply:
                    self._last = time.perf_counter()
                    if not self._written:
                        self._first = self._last
                    self._written += 1
                    with self._lock:
                        self._parts.append(piece.text)
            finally:
                self.completion = reply.completion
        except Exception as error:
            self.error = error
        finally:
            self._over = True

    def _reading(self, done: int, total: int) -> None:
        now = time.perf_counter()
        self._prompt = total
        self._slices = (self._slices[0] if self._slices else (now, done)), (now, done)

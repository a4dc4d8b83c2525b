"""Many requests at once, their results in order."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from qwen2_local.errors import UsageError
from qwen2_local.stream import Stream
from qwen2_local.types import Completion

T = TypeVar("T")


def in_order(begin: Callable[[T], Stream], items: Iterable[T], *, concurrency: int) -> Generator[Completion | Exception]:
    """The completions of `items`, in their order; `begin` starts one. So many are under way at once; few more items are drawn than that.

    An item that fails gives its error. Closing the iterator, or a Ctrl-C in it, stops all.
    """
    return _in_order(begin, items, checked(concurrency))


def checked(concurrency: int) -> int:
    """It, if it is one. Raises UsageError."""
    if type(concurrency) is not int or concurrency < 1:
        raise UsageError(f"concurrency is {concurrency!r}, but has to be a whole number, at least 1.")
    return concurrency


def _in_order(begin: Callable[[T], Stream], items: Iterable[T], concurrency: int) -> Generator[Completion | Exception]:
    lock = threading.Lock()
    streams: set[Stream] = set()
    stopped = False

    def one(item: T) -> Completion | Exception:
        try:
            stream = begin(item)
            with lock:
                streams.add(stream)
            if stopped:
                stream.close()
            try:
                return stream.finish()
            finally:
                with lock:
                    streams.discard(stream)
        except Exception as error:
            return error

    waiting: deque[Future[Completion | Exception]] = deque()
    pool = ThreadPoolExecutor(concurrency, thread_name_prefix="qwen2-local map")
    try:
        for item in items:
            waiting.append(pool.submit(one, item))
            if len(waiting) >= 2 * concurrency:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        stopped = True
        pool.shutdown(wait=False, cancel_futures=True)
        with lock:
            left = list(streams)
        for stream in left:
            stream.cancel()  # whoever reads it gets to its end
        pool.shutdown()


class Meter:
    """How far a long list is, on stderr: one line that is written over, at most a few times a second; nothing where nobody looks."""

    def __init__(self, total: int | None, *, shown: bool = True) -> None:
        """total: of how many, where that is known."""
        self._total = total
        self._done = 0
        self._began = time.monotonic()
        self._shown = 0.0
        self._width = 0
        # Also in a notebook, whose stderr is no terminal.
        self._on = shown and sys.stderr is not None and (sys.stderr.isatty() or "ipykernel" in sys.modules)

    def advance(self) -> None:
        """One more is done."""
        self._done += 1
        now = time.monotonic()
        if not self._on or now - self._began < 1 or (now - self._shown < 0.2 and self._done != self._total):
            return
        self._shown = now
        rate = self._done / (now - self._began)
        text = f"{self._done:,}" + (f" of {self._total:,}" if self._total else "") + f" · {rate:.1f} a second"
        if self._total and self._done < self._total:
            seconds = int((self._total - self._done) / rate) + 1
            text += f" · {seconds // 60}:{seconds % 60:02} left"
        print(f"\r{text.ljust(self._width)}", end="", file=sys.stderr, flush=True)
        self._width = len(text)

    def close(self) -> None:
        """Wipe the line away."""
        if self._width:
            print(f"\r{' ' * self._width}\r", end="", file=sys.stderr, flush=True)
            self._width = 0

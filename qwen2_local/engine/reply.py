"""One caller's end of a request: a mailbox that the engine fills, and the iterator that empties it."""

from __future__ import annotations

from collections.abc import Callable
from queue import SimpleQueue
from typing import Generic, Self, TypeVar

from qwen2_local.engine.events import Event, Finished

T = TypeVar("T")


class Mailbox(Generic[T]):
    """Results on their way to a reader, who may dawdle: they are bounded by what was asked for, and nobody waits for the reader.

    cancelled: set by the reader, read by the engine. An exception is the last thing that comes.
    """

    __slots__ = ("cancelled", "put", "take")

    def __init__(self) -> None:
        queue: SimpleQueue[T | BaseException] = SimpleQueue()
        self.put, self.take = queue.put, queue.get
        self.cancelled = False

    def end(self, last: T | BaseException) -> None:
        """Put the last thing that comes: twice, as a Ctrl-C may come just when the reader has taken it and lose it."""
        self.put(last)
        self.put(last)


class Reply:
    """The events of one request, made by `Engine.submit`. A reply that is forgotten cancels itself. For one reader; `cancel` is for any thread."""

    def __init__(self, mailbox: Mailbox[Event], cancel: Callable[[Mailbox[Event]], None], require_reader: Callable[[], None]) -> None:
        """require_reader: raises UsageError where what is to come cannot be awaited."""
        self._mailbox = mailbox
        self._cancel = cancel
        self._require_reader = require_reader
        self._ended = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Event:
        """The next event; waits for it. Raises BackendError where the engine failed, UsageError after a fork and on the thread that
        computes it: both would wait for ever."""
        if self._ended:
            raise StopIteration
        self._require_reader()
        event = self._mailbox.take()
        if isinstance(event, BaseException):
            self._ended = True
            raise event
        if isinstance(event, Finished):
            self._ended = True
        return event

    def cancel(self) -> None:
        """Stop the work. What came until then can still be read, and behind it `Finished("cancelled")`."""
        if not self._ended:
            self._cancel(self._mailbox)

    def __del__(self) -> None:
        self.cancel()

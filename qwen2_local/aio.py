"""The async twins' means: work that blocks runs in a thread of its own, and ends when its task is cancelled."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Protocol, Self, TypeVar

from qwen2_local.types import Completion, Piece

T = TypeVar("T")


class Readable(Protocol):
    """A reply as it comes: a `Stream`, or a chat's."""

    completion: Completion | None

    def __iter__(self) -> Iterator[Piece]: ...
    def __next__(self) -> Piece: ...
    def cancel(self) -> None: ...  # noqa: D102
    def close(self) -> None: ...  # noqa: D102


class AsyncStream:
    """A reply as it comes, for `async for`; afterwards `completion` holds the whole. `aclose`, or a cancelled task, stops the work."""

    def __init__(self, begin: Callable[[], Readable]) -> None:
        """`begin` starts the reply; it is called in a thread, at the first piece that is wanted."""
        self._reader = _Reader(begin)
        self._queue: asyncio.Queue[Piece | BaseException | None] | None = None
        self._ended = False

    @property
    def completion(self) -> Completion | None:
        """The whole, once the stream has ended."""
        stream = self._reader.stream
        return None if stream is None else stream.completion

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Piece:
        """The next piece. Raises what the engine raises."""
        if self._ended:
            raise StopAsyncIteration
        if self._queue is None:
            self._queue = self._reader.start()
        queue = self._queue
        try:
            piece = await queue.get()
        except asyncio.CancelledError:
            self._reader.stop()
            raise
        if isinstance(piece, Piece):
            return piece
        self._ended = True
        if piece is None:
            raise StopAsyncIteration
        raise piece

    async def aclose(self) -> None:
        """Stop the reply; what came so far is in `completion`. Idempotent."""
        self._reader.stop()
        while not self._ended and self._queue is not None:
            self._ended = not isinstance(await self._queue.get(), Piece)

    async def finish(self) -> Completion:
        """Read the rest and give the whole reply."""
        async for _ in self:
            pass
        assert self.completion is not None
        return self.completion

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        if reader := getattr(self, "_reader", None):
            reader.stop()


class _Reader:
    """Reads a stream in a thread of its own, which does not know the `AsyncStream`: so who forgets that one stops the work."""

    def __init__(self, begin: Callable[[], Readable]) -> None:
        self._begin = begin
        self._stopped = False
        self.stream: Readable | None = None

    def start(self) -> asyncio.Queue[Piece | BaseException | None]:
        """The queue that gets the pieces, and last None or what was raised."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue()

        def put(item: Piece | BaseException | None) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(queue.put_nowait, item)

        def pump() -> None:
            try:
                self.stream = stream = self._begin()
                if self._stopped:
                    stream.cancel()
                for piece in stream:
                    put(piece)
                put(None)
            except BaseException as error:
                put(error)

        threading.Thread(target=pump, name="qwen2-local async", daemon=True).start()
        return queue

    def stop(self) -> None:
        """Stop the work, which may not have begun."""
        self._stopped = True
        if self.stream is not None:
            self.stream.cancel()


async def in_thread(work: Callable[[], T], stop: Callable[[], None] | None = None) -> T:
    """The result of `work`, done in a thread. stop: called when the task is cancelled, so that the work ends."""
    future = asyncio.get_running_loop().run_in_executor(None, work)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        if stop is not None:
            stop()
        raise

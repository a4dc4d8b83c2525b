"""A reply as it comes: the engine's token events as pieces of text."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Self

from qwen2_local.detokenize import TextStream
from qwen2_local.engine import Finished, Prefilled, Reply, Token
from qwen2_local.options import Progress
from qwen2_local.types import Completion, FinishReason, Piece, Usage


class Stream:
    """Iterate for `Piece`s; afterwards `completion` holds the whole. The work is under way already; a stream that is forgotten stops it.

    For one reader; `close` may come from any thread. After an early `close`, `completion` has the finish_reason "cancelled" and what was read.
    """

    completion: Completion | None
    """The whole, once the stream has ended."""

    def __init__(
        self,
        reply: Reply,
        token_bytes: Callable[[int], bytes],
        prompt_tokens: int,
        stop: Sequence[str] = (),
        progress: Progress | None = None,
        model: object = None,
    ) -> None:
        """token_bytes: what a token stands for. stop: strings that end the text. model: stays loaded as long as this is here.

        Raises InvalidSampling for an empty stop string.
        """
        self.completion = None
        self._model = model
        self._reply = reply
        self._bytes = token_bytes
        self._progress = progress
        self._decoder = TextStream(stop)
        self._prompt = prompt_tokens
        self._cached = 0
        self._parts: list[str] = []
        self._tokens: list[int] = []
        self._logprobs: list[tuple[float, tuple[tuple[int, float], ...]]] = []
        self._rest: Piece | None = None
        self._closed = False
        self._began = self._first = self._last = time.perf_counter()
        # Held by whoever takes events. Reentrant: a Ctrl-C may come in `next`, and its handler call `close`.
        self._taking = threading.RLock()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Piece:
        """The next piece. Raises what the engine raises; the stream has ended then."""
        with self._taking:
            if self._rest is not None and not self._closed:
                rest, self._rest = self._rest, None
                return rest
            if self.completion is not None:
                raise StopIteration
            try:
                for event in self._reply:
                    if type(event) is Token and not self._closed:
                        return self._piece(event)
                    if isinstance(event, Prefilled):
                        self._cached = event.cached
                        if self._progress is not None:
                            self._progress(event.done, event.total)
                    elif isinstance(event, Finished):
                        self._end(event)
                        if self._rest is not None and not self._closed:
                            return self.__next__()
            except Exception:
                self._end(None)
                raise
            if self.completion is None:  # a Ctrl-C came while the last event was looked at
                self._end(None)
            raise StopIteration

    def cancel(self) -> None:
        """Stop the work, without waiting; whoever reads gets to the end soon. From any thread."""
        self._closed = True
        self._reply.cancel()

    def close(self) -> None:
        """Stop the reply; what was read so far is in `completion`. Idempotent."""
        self.cancel()
        with self._taking:
            while self.completion is None:
                next(self, None)

    def finish(self) -> Completion:
        """Read the rest and give the whole reply."""
        for _ in self:
            pass
        assert self.completion is not None
        return self.completion

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _piece(self, token: Token) -> Piece:
        now = time.perf_counter()
        if not self._tokens:
            self._first = now
        self._last = now
        text = self._decoder.push(self._bytes(token.id))
        self._tokens.append(token.id)
        if token.logprob is not None:
            self._logprobs.append((token.logprob, token.top))
        self._parts.append(text)
        if self._decoder.stopped:
            self._reply.cancel()
            self._drain()
        return Piece(text, token.id, token.logprob, token.top)

    def _drain(self) -> None:
        """Behind a stop string: what still comes is not wanted, but for its end."""
        for event in self._reply:
            if isinstance(event, Finished):
                self._end(event, "stop")

    def _end(self, finished: Finished | None, reason: FinishReason | None = None) -> None:
        """finished: None where an error was the end."""
        rest = self._decoder.finish()
        if rest:
            # Bytes of a character that never came whole, or the start of a stop string.
            self._parts.append(rest)
            self._rest = Piece(rest, self._tokens[-1])
        whole = finished is not None and not self._closed and reason is None
        prefill_s = finished.prefill_s if whole and finished else self._first - self._began if self._tokens else time.perf_counter() - self._began
        decode_s = finished.decode_s if whole and finished else self._last - self._first if self._tokens else 0.0
        drafted, accepted = (finished.drafted, finished.accepted) if finished else (0, 0)
        usage = Usage(self._prompt, self._cached, len(self._tokens), prefill_s, decode_s, drafted, accepted)
        reason = reason or (finished.reason if finished and not self._closed else "cancelled")
        chunks = finished.chunks if finished else ()
        self.completion = Completion("".join(self._parts), reason, usage, tuple(self._tokens), tuple(self._logprobs), chunks)

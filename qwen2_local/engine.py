"""The engine: one owner thread per loaded model turns prompts of token ids into token events.

It knows tokens and sequences, and nothing of text. All calls into the backend happen on the owner thread (MLX's arrays demand that, and it
lets Ctrl-C work while native code runs). One request at a time, in order: a later one waits, and a consumer that dawdles holds up nobody, as
events are buffered. The last request's sequence stays, so that a prompt which begins with the same ids computes only its new part.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue

from qwen2_local.backends.base import Backend, BackendInfo, Choice, Row
from qwen2_local.errors import BackendError, Cancelled, ContextOverflow, Qwen2LocalError, UsageError
from qwen2_local.sampling import uniform
from qwen2_local.types import FinishReason, Sampling

_log = logging.getLogger("qwen2_local.engine")

_OPEN_SLICE = 64
"""Tokens of the first prefill slice; later ones grow to the backend's `step_tokens` while a slice stays short enough to cancel."""
_SLICE_SECONDS = 0.25


@dataclass(frozen=True, slots=True)
class Request:
    """What to generate. `limit`: ids from here on are never chosen; `stops`: ids that end the reply; `max_tokens`: None fills the context."""

    prompt: tuple[int, ...]
    sampling: Sampling
    stops: frozenset[int]
    limit: int
    max_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Prefilled:
    """Progress of reading the prompt: tokens done (cached ones included) of all."""

    done: int
    total: int
    cached: int


@dataclass(frozen=True, slots=True)
class Token:
    """A token of the reply; a stop token is not one."""

    id: int


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of a reply, with seconds spent before the first token and after it."""

    reason: FinishReason
    prefill_s: float
    decode_s: float


Event = Prefilled | Token | Finished


class Engine:
    """Owns a backend. Thread-safe. It belongs to the process that made it: after a fork, the child gets an error."""

    def __init__(self, load: Callable[[], Backend]) -> None:
        """`load` makes the backend, on the owner thread. Raises what it raises; BackendError for what is no error of ours."""
        self._process = os.getpid()
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        # Reentrant: the garbage collector may close an iterator, and so come to `_stop`, on a thread that holds it.
        self._lock = threading.RLock()
        self._closed = False
        self._running: threading.Event | None = None
        self._backend: Backend | None = None
        self._sequence = -1
        self._cached: list[int] = []
        self._thread = threading.Thread(target=self._own, name="qwen2-local engine", daemon=True)
        self._thread.start()
        loaded: SimpleQueue[BackendInfo | BaseException] = SimpleQueue()
        self._jobs.put(lambda: self._load(load, loaded.put))
        try:
            result = loaded.get()
            if isinstance(result, BaseException):
                raise result
        except BaseException:
            self.close()
            raise
        self.info = result

    def generate(self, request: Request) -> Generator[Event, None, None]:
        """Stream the reply. Closing the iterator stops the work; a Ctrl-C in the consumer does so too.

        The work begins with the first `next`. Raises ContextOverflow before any work if the prompt leaves no room for a token, UsageError
        if the model is closed or was loaded before a fork, BackendError if the backend fails.
        """
        self._require_own_process()
        room = self.info.context - len(request.prompt)
        if room < 1:
            raise ContextOverflow(
                f"The prompt has {len(request.prompt):,} tokens, but the context holds {self.info.context:,} with the reply.",
                hint="Shorten it, or give a larger --context (up to what the model and the memory allow).",
            )
        events: SimpleQueue[Event | BaseException] = SimpleQueue()
        stopped = threading.Event()
        with self._lock:
            # Under the lock, so that `close` comes before or after: every job that is put is run.
            if self._closed:
                raise UsageError("The model is closed.", hint="Load it again.")
            self._jobs.put(lambda: self._run(request, room, events.put, stopped))
        ended = False
        try:
            while not ended:
                self._require_own_process()
                event = events.get()
                ended = isinstance(event, (Finished, BaseException))
                if isinstance(event, BaseException):
                    raise event
                yield event
        finally:
            if not ended:
                self._stop(stopped)

    def close(self) -> None:
        """Free the model and end the thread. A reply under way, and any that waits, ends as cancelled. Idempotent."""
        if os.getpid() != self._process:
            return  # Thread and model are the parent's.
        with self._lock:
            if not self._closed:
                self._closed = True
                self._jobs.put(None)
            if self._running is not None:
                self._stop(self._running)
        if threading.current_thread() is not self._thread:  # the garbage collector may call from there
            self._thread.join()

    def _stop(self, stopped: threading.Event) -> None:
        """Stop a request, which may be waiting, running or over; only a running one is under way in the backend."""
        stopped.set()
        if os.getpid() != self._process:
            return  # The lock may be held by a thread that is not in this process.
        with self._lock:
            if self._running is stopped and self._backend is not None:
                self._backend.cancel()

    def _require_own_process(self) -> None:
        if os.getpid() != self._process:
            hint = 'Load it in the process that uses it; with multiprocessing, choose the start method "spawn".'
            raise UsageError(f"The model was loaded by process {self._process}, of which this is a fork.", hint=hint)

    def _own(self) -> None:
        """The owner thread. No job raises."""
        while (job := self._jobs.get()) is not None:
            job()
        if self._backend is not None:
            try:
                self._backend.close()
            except Exception:
                _log.exception("The backend failed while it was closed.")
            self._backend = None

    def _load(self, load: Callable[[], Backend], answer: Callable[[BackendInfo | BaseException], None]) -> None:
        try:
            self._backend = load()
            answer(self._backend.info)
        except Qwen2LocalError as error:
            answer(error)
        except BaseException as error:
            answer(_failure("The model could not be loaded", error))

    def _run(self, request: Request, room: int, emit: Callable[[Event | BaseException], None], stopped: threading.Event) -> None:
        """One request, on the owner thread; its last event is Finished or an error."""
        with self._lock:
            if self._closed:
                stopped.set()
            self._running = stopped
        try:
            if stopped.is_set():  # while it waited: what is cached stays for the next
                emit(Finished("cancelled", 0.0, 0.0))
            else:
                emit(self._reply(request, room, emit, stopped))
        except Qwen2LocalError as error:
            self._forget()
            emit(error)
        except BaseException as error:
            self._forget()
            emit(_failure(f"{self.info.name} failed", error))
        finally:
            with self._lock:
                self._running = None

    def _reply(self, request: Request, room: int, emit: Callable[[Event | BaseException], None], stopped: threading.Event) -> Finished:
        """Prefill, then decode token by token."""
        backend = self._backend
        assert backend is not None
        started = time.perf_counter()
        seed = request.sampling.seed if request.sampling.seed is not None else secrets.randbits(64)
        penalty = request.sampling.repetition_penalty != 1.0
        seen = set(request.prompt) if penalty else set()
        position = len(request.prompt)

        def choice() -> Choice:
            s = request.sampling
            number = uniform(seed, position) if s.temperature > 0 else 0.0
            return Choice(request.limit, s.temperature, s.top_p, s.top_k, s.repetition_penalty, tuple(seen), number)

        try:
            token = self._prefill(backend, request.prompt, choice, emit, stopped)
        except Cancelled:
            return Finished("cancelled", time.perf_counter() - started, 0.0)
        first = time.perf_counter()

        def finished(reason: FinishReason) -> Finished:
            return Finished(reason, first - started, time.perf_counter() - first)

        most = room if request.max_tokens is None else min(room, request.max_tokens)
        # A greedy choice without penalty is the same for every token.
        fixed = choice() if request.sampling.temperature == 0.0 and not penalty else None
        count = 0
        while token not in request.stops:
            emit(Token(token))
            count += 1
            if count >= most:
                return finished("context" if most == room else "length")
            if stopped.is_set():
                return finished("cancelled")
            position += 1
            if penalty:
                seen.add(token)
            try:
                chosen = backend.step((Row(self._sequence, (token,), fixed or choice()),))[0].token
            except Cancelled:
                return finished("cancelled")
            self._cached.append(token)
            assert chosen is not None
            token = chosen
        return finished("stop")

    def _prefill(
        self,
        backend: Backend,
        prompt: Sequence[int],
        choice: Callable[[], Choice],
        emit: Callable[[Event | BaseException], None],
        stopped: threading.Event,
    ) -> int:
        """Bring the sequence to `prompt` and choose the next token."""
        if self._sequence < 0:
            self._sequence = backend.open()
            self._cached = []
        common = 0
        # The last token is computed again in any case: its logits are wanted.
        for mine, wanted in zip(self._cached, prompt[:-1], strict=False):
            if mine != wanted:
                break
            common += 1
        if common < len(self._cached):
            backend.trim(self._sequence, common)
            del self._cached[common:]
        done, size = common, min(_OPEN_SLICE, backend.step_tokens)
        emit(Prefilled(done, len(prompt), common))
        while True:
            if stopped.is_set():
                raise Cancelled("Stopped.")
            part = prompt[done : done + size]
            last = done + len(part) == len(prompt)
            before = time.perf_counter()
            result = backend.step((Row(self._sequence, part, choice() if last else None),))[0]
            self._cached.extend(part)
            done += len(part)
            emit(Prefilled(done, len(prompt), common))
            if last:
                assert result.token is not None
                return result.token
            if time.perf_counter() - before < _SLICE_SECONDS / 2:
                size = min(2 * size, backend.step_tokens)

    def _forget(self) -> None:
        """After a failure nothing in the sequence is trusted."""
        sequence, self._sequence, self._cached = self._sequence, -1, []
        if self._backend is not None and sequence >= 0:
            with suppress(Exception):
                self._backend.free(sequence)


def _failure(what: str, error: BaseException) -> BackendError:
    """An error of a library as one of ours, with the first as its cause."""
    said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    failure = BackendError(f"{what}: {said}", hint="Run `qwen2-local doctor`, and attach what it says to a bug report.")
    failure.__cause__ = error
    return failure

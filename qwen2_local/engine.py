"""The engine: one owner thread per loaded model turns prompts of token ids into token events.

It knows tokens and sequences, and nothing of text. All calls into the backend happen on the owner thread (MLX's arrays demand that, and it
lets Ctrl-C work while native code runs). One request at a time, in order: a later one waits, and a consumer that dawdles holds up nobody, as
events are buffered. The last request's sequence stays, so that a prompt which begins with the same ids computes only its new part.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue

from qwen2_local.backends.base import Backend, BackendInfo, Choice, Row
from qwen2_local.errors import BackendError, Cancelled, ContextOverflow, Qwen2LocalError
from qwen2_local.sampling import uniform
from qwen2_local.types import FinishReason, Sampling

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
    """Owns a backend. Thread-safe; `close` is idempotent."""

    def __init__(self, load: Callable[[], Backend]) -> None:
        """`load` makes the backend, on the owner thread. Raises what it raises."""
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._running: threading.Event | None = None
        self._backend: Backend | None = None
        self._sequence = -1
        self._cached: list[int] = []
        self._thread = threading.Thread(target=self._own, name="qwen2-local engine", daemon=True)
        self._thread.start()

        def start() -> BackendInfo:
            self._backend = load()
            return self._backend.info

        try:
            self.info = self._call(start)
        except BaseException:
            self.close()
            raise

    def generate(self, request: Request) -> Iterator[Event]:
        """Stream the reply. Closing the iterator stops the work; a Ctrl-C in the consumer does so too.

        Raises ContextOverflow before any work if the prompt leaves no room for a token, BackendError if the backend fails.
        """
        room = self.info.context - len(request.prompt)
        if room < 1:
            raise ContextOverflow(
                f"The prompt has {len(request.prompt):,} tokens, but the context holds {self.info.context:,} with the reply.",
                hint="Shorten it, or give a larger --context (up to what the model and the memory allow).",
            )
        events: SimpleQueue[Event | BaseException] = SimpleQueue()
        stopped = threading.Event()
        self._jobs.put(lambda: self._run(request, room, events.put, stopped))
        ended = False
        try:
            while not ended:
                event = events.get()
                ended = isinstance(event, (Finished, BaseException))
                if isinstance(event, BaseException):
                    raise event
                yield event
        finally:
            if not ended:
                self._stop(stopped)

    def _stop(self, stopped: threading.Event) -> None:
        """Stop a request, which may be waiting, running or over; only a running one is under way in the backend."""
        stopped.set()
        with self._lock:
            if self._running is stopped and self._backend is not None:
                self._backend.cancel()

    def close(self) -> None:
        """Free the model and end the thread."""
        if self._thread.is_alive():
            self._jobs.put(None)
            self._thread.join()

    def _own(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
        if self._backend is not None:
            self._backend.close()
            self._backend = None

    def _call(self, work: Callable[[], BackendInfo]) -> BackendInfo:
        answer: SimpleQueue[BackendInfo | BaseException] = SimpleQueue()

        def job() -> None:
            try:
                answer.put(work())
            except BaseException as error:
                answer.put(error)

        self._jobs.put(job)
        result = answer.get()
        if isinstance(result, BaseException):
            raise result
        return result

    def _run(self, request: Request, room: int, emit: Callable[[Event | BaseException], None], stopped: threading.Event) -> None:
        """One request, on the owner thread; its last event is Finished or an error."""
        with self._lock:
            self._running = stopped
        try:
            self._decode(request, room, emit, stopped)
        except Cancelled:
            emit(Finished("cancelled", 0.0, 0.0))
        except Qwen2LocalError as error:
            self._forget()
            emit(error)
        except Exception as error:
            self._forget()
            emit(BackendError(f"{self.info.name} failed: {error}", hint="Run `qwen2-local doctor`, and attach what it says to a bug report."))
        finally:
            with self._lock:
                self._running = None

    def _decode(self, request: Request, room: int, emit: Callable[[Event | BaseException], None], stopped: threading.Event) -> None:
        backend = self._backend
        assert backend is not None
        started = time.perf_counter()
        seed = request.sampling.seed if request.sampling.seed is not None else secrets.randbits(64)
        seen = set(request.prompt) if request.sampling.repetition_penalty != 1.0 else set()
        position = len(request.prompt)

        def choice() -> Choice:
            s = request.sampling
            number = uniform(seed, position) if s.temperature > 0 else 0.0
            return Choice(request.limit, s.temperature, s.top_p, s.top_k, s.repetition_penalty, tuple(seen), number)

        token = self._prefill(backend, request.prompt, choice, emit, stopped)
        first = time.perf_counter()
        most = room if request.max_tokens is None else min(room, request.max_tokens)
        reason: FinishReason = "context" if most == room else "length"
        sequence, cached, stops, penalty = self._sequence, self._cached, request.stops, request.sampling.repetition_penalty != 1.0
        # A greedy choice without penalty is the same for every token.
        fixed = choice() if request.sampling.temperature == 0.0 and not penalty else None
        count = 0
        while True:
            if token in stops:
                reason = "stop"
                break
            count += 1
            emit(Token(token))
            if count >= most:
                break
            if stopped.is_set():
                reason = "cancelled"
                break
            position += 1
            if penalty:
                seen.add(token)
            row = Row(sequence, (token,), fixed if fixed is not None else choice())
            chosen = backend.step((row,))[0].token
            cached.append(token)
            assert chosen is not None
            token = chosen
        emit(Finished(reason, first - started, time.perf_counter() - first))

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
        backend = self._backend
        if backend is not None and self._sequence >= 0:
            backend.free(self._sequence)
        self._sequence = -1
        self._cached = []

"""An engine in another process, behind the interface of `Engine`."""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from typing import Any, cast

from qwen2_local import kvcache
from qwen2_local.backends.base import BackendInfo, Layout, Scores
from qwen2_local.engine import Event, Request
from qwen2_local.engine.reply import Mailbox, Reply
from qwen2_local.errors import BackendError, Cancelled, UsageError, WorkerDied
from qwen2_local.worker.messages import Forget, Generate, Know, Look, Score
from qwen2_local.worker.process import Worker
from qwen2_local.worker.setup import Setup

_TRIES = 2
_BROKEN_HINT = "Run `qwen2-local doctor`, and try a smaller model or a shorter --context."


class RemoteEngine:
    """A model in a worker process. Thread-safe. It belongs to the process that made it, as `Engine` does.

    A worker that dies fails the requests under way (WorkerDied); the next one starts another, which goes on from the KV cache on the disk.
    """

    def __init__(self, setup: Setup, *, idle_s: float | None = None) -> None:
        """Load the model in a new process. idle_s: give its memory back after so many seconds without a request; the next one loads it again.

        Raises what loading raises, and WorkerDied for a process that dies of it twice.
        """
        self._process = os.getpid()
        self._setup = setup
        self._numbers = itertools.count(1)
        # Held while a worker is started: who comes meanwhile waits for it.
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._broken = ""
        self._used = time.monotonic()
        self._worker: Worker | None = None
        _, self.info = self._start()
        if idle_s is not None:
            threading.Thread(target=self._watch, args=(idle_s,), name="qwen2-local idle", daemon=True).start()

    @property
    def pid(self) -> int | None:
        """The worker's process id; None while there is none."""
        worker = self._worker
        return None if worker is None or worker.dead else worker.pid

    @property
    def layout(self) -> Layout:
        """How the KV memory is laid out now, as `Engine.layout`."""
        layout = self._answer(Look(next(self._numbers)))
        assert isinstance(layout, Layout)
        return layout

    def submit(self, request: Request) -> Reply:
        """Begin a reply. Raises UsageError if the model is closed or was loaded before a fork, WorkerDied where no worker will load it.

        Whatever else is wrong the reply raises.
        """
        number = next(self._numbers)
        mailbox: Mailbox[Event] = Mailbox()
        constraint = None if request.constraint is None else json.dumps(request.constraint.spec.plain())
        order = Generate(
            number, request.prompt, request.sampling, request.stops, request.limit, request.max_tokens, constraint, request.logprobs, request.lookup,
            request.persist,
        )  # fmt: skip
        worker = self._ask(order, mailbox)

        def require_reader() -> None:
            self._require_own_process()
            worker.require_reader()

        return Reply(mailbox, lambda _: worker.cancel(number), require_reader)

    def generate(self, request: Request) -> Generator[Event, None, None]:
        """Stream the reply, as `Engine.generate`: the work begins with the first `next`, and closing the iterator stops it."""
        reply = self.submit(request)
        try:
            yield from reply
        finally:
            reply.cancel()

    def score(self, tokens: Sequence[int], limit: int, first: int = 1) -> Scores:
        """How likely each token from number `first` on is, as `Engine.score`."""
        scores = self._answer(Score(next(self._numbers), tuple(tokens), limit, first))
        assert isinstance(scores, Scores)
        return scores

    def known(self, prompt: Sequence[int]) -> int:
        """How much of a prompt is known, as `Engine.known`. Starts no worker, and keeps none from being idle: without one it is 0."""
        self._require_own_process()
        self._require_open()
        worker = self._worker
        mailbox: Mailbox[object] = Mailbox()
        if worker is None or not worker.ask(Know(next(self._numbers), tuple(prompt)), mailbox):
            return 0
        result = mailbox.take()
        if isinstance(result, BaseException) and not isinstance(result, (WorkerDied, Cancelled)):
            raise result
        return result if isinstance(result, int) else 0

    def forget(self, chunks: Iterable[str]) -> None:
        """Delete KV, as `Engine.forget`. Starts no worker: without one there is only what lies on the disk."""
        names = tuple(chunks)
        worker = self._worker
        mailbox: Mailbox[object] = Mailbox()
        order = Forget(next(self._numbers), names)
        if worker is not None and worker.ask(order, mailbox):
            result = mailbox.take()
            if result is None:
                return
            if not isinstance(result, (WorkerDied, Cancelled)):  # else it is gone, and its memory with it
                raise cast(BaseException, result)
        with closing(kvcache.open_default(self._setup.label)) as kv:
            kv.delete(names)

    def close(self) -> None:
        """Free the model and end the process. Replies under way, and those that wait, end as cancelled. Idempotent."""
        if os.getpid() != self._process:
            return
        self._closed.set()
        worker = self._worker
        if worker is not None:
            worker.close()

    def _answer(self, order: Score | Look) -> object:
        """The one answer to an order. Raises what the worker raised."""
        mailbox: Mailbox[object] = Mailbox()
        worker = self._ask(order, mailbox)
        try:
            result = mailbox.take()
        except BaseException:
            worker.cancel(order.number)
            raise
        if isinstance(result, BaseException):
            raise result
        return result

    def _ask(self, order: Generate | Score | Look, mailbox: Mailbox[Any]) -> Worker:
        self._require_own_process()
        self._used = time.monotonic()
        while True:
            worker = self._alive()
            if worker.ask(order, mailbox):
                return worker

    def _alive(self) -> Worker:
        """The worker, or a new one where it died or was idle for long."""
        with self._lock:
            self._require_open()
            worker = self._worker
            if worker is None or worker.dead:
                worker, self.info = self._start()
            return worker

    def _start(self) -> tuple[Worker, BackendInfo]:
        if self._broken:
            raise WorkerDied(self._broken, hint=_BROKEN_HINT)
        for left in reversed(range(_TRIES)):
            try:
                # Seen by `close` from here on, so that it need not wait until the model is loaded.
                worker = self._worker = Worker(self._setup)
            except OSError as error:
                raise BackendError(f"No process can be started for the model: {error.strerror}.", hint="Close other programs.") from error
            if self._closed.is_set():  # before that line
                worker.close()
            try:
                return worker, worker.loaded()
            except WorkerDied as error:
                self._require_open()
                if left == 0:
                    self._broken = f"The process that loads the model died twice. {error.what}"
                    raise WorkerDied(self._broken, hint=_BROKEN_HINT) from error
            except BaseException:
                worker.kill()
                raise
        raise AssertionError("unreachable")

    def _watch(self, idle_s: float) -> None:
        """End a worker that has had nothing to do for long."""
        while not self._closed.wait(max(0.05, self._used + idle_s - time.monotonic())):
            with self._lock:
                if time.monotonic() - self._used < idle_s:
                    continue
                if self._worker is not None and self._worker.retire():
                    self._worker.close()
                    self._worker = None
                self._used = time.monotonic()

    def _require_open(self) -> None:
        if self._closed.is_set():
            raise UsageError("The model is closed.", hint="Load it again.")

    def _require_own_process(self) -> None:
        if os.getpid() != self._process:
            hint = 'Load it in the process that uses it; with multiprocessing, choose the start method "spawn".'
            raise UsageError(f"The model was loaded by process {self._process}, of which this is a fork.", hint=hint)

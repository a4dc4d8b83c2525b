"""The engine's thread, and the ways into it.

All calls into the backend happen on the owner thread: MLX's arrays demand that, and it lets Ctrl-C work while native code runs.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

from qwen2_local.backends.base import Backend, BackendInfo, Layout, Scores
from qwen2_local.engine.events import Event, Request
from qwen2_local.engine.generating import Generation
from qwen2_local.engine.reply import Mailbox, Reply
from qwen2_local.engine.scheduler import Scheduler, failure
from qwen2_local.engine.scoring import Scoring
from qwen2_local.engine.speculation import DraftModel, Speculator
from qwen2_local.engine.work import Work
from qwen2_local.errors import ContextOverflow, Qwen2LocalError, UsageError
from qwen2_local.kvcache import KvCache

_log = logging.getLogger("qwen2_local.engine")

_MOST_UNDER_WAY = 256
"""Requests; one more waits in the thread that brings it."""


class Engine:
    """Owns a backend. Thread-safe. It belongs to the process that made it: after a fork, the child gets an error."""

    def __init__(
        self,
        load: Callable[[], Backend],
        *,
        kv: KvCache | None = None,
        draft: Callable[[], Backend] | None = None,
        parallel: int = 8,
        kv_memory: int | None = None,
    ) -> None:
        """`load` makes the backend, on the owner thread. Raises what it raises; BackendError for what is no error of ours.

        kv: where KV is kept, shared and found again; it stays open when the engine is closed. draft: makes a smaller model that drafts
        tokens for this one. parallel: requests on the device at once, at most. kv_memory: bytes that the KV of all of them may take; by
        default that of one of the longest context.
        """
        self._process = os.getpid()
        self._cache = kv
        self._inbox: SimpleQueue[Work | Callable[[], None] | None] = SimpleQueue()
        """Requests, other things to do between steps, and None: a cancel or the close is to be looked at."""
        # Reentrant: the garbage collector may drop a reply, and so come to `_cancel`, on a thread that holds it.
        self._lock = threading.RLock()
        self._under_way = threading.Semaphore(_MOST_UNDER_WAY)
        self._closed = False
        self._backend: Backend | None = None
        self._speculator = Speculator(None)
        loaded: SimpleQueue[BackendInfo | BaseException] = SimpleQueue()

        def start() -> BackendInfo:
            self._backend = load()
            if draft is not None:
                self._speculator = Speculator(DraftModel(draft(), self._backend.info.vocabulary))
            self._scheduler = Scheduler(self._backend, kv, self._speculator, parallel=parallel, kv_memory=kv_memory, ended=self._under_way.release)
            return self._backend.info

        self._thread = threading.Thread(target=self._own, args=(start, loaded.put), name="qwen2-local engine", daemon=True)
        self._thread.start()
        try:
            result = loaded.get()
            if isinstance(result, BaseException):
                raise result
        except BaseException:
            self.close()
            raise
        self.info = result

    @property
    def closed(self) -> bool:
        """Has it been closed? `load` may ask, and give up where nobody waits for it any more."""
        return self._closed

    @property
    def layout(self) -> Layout:
        """How the KV memory is laid out now; it follows what is asked for."""
        return self._scheduler.device.layout

    def generate(self, request: Request) -> Generator[Event, None, None]:
        """Stream the reply. Closing the iterator stops the work; a Ctrl-C in the consumer does so too.

        The work begins with the first `next`. Raises as `submit` does, and as `Reply` does.
        """
        reply = self.submit(request)
        try:
            yield from reply
        finally:
            reply.cancel()

    def submit(self, request: Request) -> Reply:
        """Begin a reply. Blocks while very many are under way.

        Raises ContextOverflow before any work if the prompt leaves no room for a token, UsageError if it is empty, if the model is closed
        or was loaded before a fork.
        """
        self._require_own_process()
        yarn, room = self._room(len(request.prompt), request.max_tokens or 1)
        mailbox: Mailbox[Event] = Mailbox()
        work = Generation(request, mailbox, room, yarn=yarn)
        work.speculation = self._speculator.begin(lookup=request.lookup)
        self._send(work)
        return Reply(mailbox, self._cancel, self._require_reader)

    def score(self, tokens: Sequence[int], limit: int, first: int = 1) -> Scores:
        """How likely each token from number `first` on was as the one after those before it; of these, what is known is not computed.

        limit: ids from here on are out of the distribution. Raises as `submit` does, UsageError where there is no such token, BackendError if
        the backend fails, Cancelled if the model is closed.
        """
        self._require_own_process()
        if not 1 <= first < len(tokens):
            raise UsageError("There is nothing to score: a text of at least two tokens is needed.", hint="Give some text.")
        yarn, _ = self._room(len(tokens) - 1, 1)
        mailbox: Mailbox[Scores] = Mailbox()
        self._send(Scoring(tokens, limit, mailbox, first=first, yarn=yarn))
        try:
            result = mailbox.take()
        except BaseException:
            self._cancel(mailbox)
            raise
        if isinstance(result, BaseException):
            raise result
        return result

    def known(self, prompt: Sequence[int]) -> int:
        """How many leading tokens of a prompt would not be computed if it came now, as their KV is kept: on the device, in RAM or on the disk.

        Nothing changes by that. A file that turns out damaged is computed all the same. Raises as `forget` does.
        """
        self._require_own_process()
        info, last = self.info, max(0, len(prompt) - 1)  # the last token always is
        yarn = len(prompt) + 1 > info.context < info.yarn_context
        known: SimpleQueue[int] = SimpleQueue()

        def look() -> None:
            found = 0
            try:
                found = self._scheduler.known(prompt[:last], yarn=yarn)
            except Exception:
                _log.exception("What is known of a prompt cannot be told.")
            finally:
                known.put(found)

        self._put(look)
        return known.get()

    def forget(self, chunks: Iterable[str]) -> None:
        """Delete KV, by the names that `Finished` gave, from the KV cache and the device; returns when it is gone.

        Raises UsageError if the model is closed or was loaded before a fork, OSError where files cannot be deleted.
        """
        self._require_own_process()
        names = frozenset(chunks)
        done: SimpleQueue[None] = SimpleQueue()

        def drop() -> None:
            try:
                self._scheduler.forget(names)
            finally:
                done.put(None)

        self._put(drop)
        done.get()
        if self._cache is not None:
            self._cache.delete(names)

    def close(self) -> None:
        """Free the model and end the thread. A reply under way, and any that waits, ends as cancelled. Idempotent."""
        if os.getpid() != self._process:
            return  # Thread and model are the parent's.
        with self._lock:
            self._closed = True
            self._inbox.put(None)
            if self._backend is not None:
                self._backend.cancel()
        if threading.current_thread() is not self._thread:  # the garbage collector may call from there
            self._thread.join()

    def _room(self, prompt: int, reply: int) -> tuple[bool, int]:
        """Whether a request needs stretched positions, and the tokens that the context leaves for its reply."""
        info = self.info
        if prompt < 1:
            raise UsageError("The prompt is empty.", hint="Give some text.")
        yarn = prompt + reply > info.context < info.yarn_context
        context = info.yarn_context if yarn else info.context
        if prompt >= context:
            raise ContextOverflow(
                f"The prompt has {prompt:,} tokens, but the context holds {context:,} with the reply.",
                hint="Shorten it, or give a larger --context (up to what the model and the memory allow).",
            )
        return yarn, context - prompt

    def _send(self, work: Work) -> None:
        while not self._under_way.acquire(timeout=0.1):
            if self._closed:
                break
        self._put(work)

    def _put(self, item: Work | Callable[[], None]) -> None:
        with self._lock:
            # Under the lock, so that `close` comes before or after: everything that is put gets an answer.
            if self._closed:
                raise UsageError("The model is closed.", hint="Load it again.")
            self._inbox.put(item)

    def _cancel(self, mailbox: Mailbox[Any]) -> None:
        """Stop a request, which may be waiting, running or over."""
        mailbox.cancelled = True
        if os.getpid() != self._process:
            return  # The lock may be held by a thread that is not in this process.
        with self._lock:
            if self._backend is not None and self._scheduler.breaks(mailbox):
                self._backend.cancel()
        self._inbox.put(None)

    def _require_own_process(self) -> None:
        if os.getpid() != self._process:
            hint = 'Load it in the process that uses it; with multiprocessing, choose the start method "spawn".'
            raise UsageError(f"The model was loaded by process {self._process}, of which this is a fork.", hint=hint)

    def _require_reader(self) -> None:
        self._require_own_process()
        if threading.current_thread() is self._thread:  # the garbage collector may drop, and so close, anything there
            raise UsageError("A reply cannot be awaited on the thread that computes it.", hint="Read it on another one.")

    # On the owner thread

    def _own(self, start: Callable[[], BackendInfo], answer: Callable[[BackendInfo | BaseException], None]) -> None:
        try:
            info = start()
        except Qwen2LocalError as error:
            answer(error)
        except BaseException as error:
            answer(failure("The model could not be loaded", error))
        else:
            answer(info)
            try:
                self._loop(self._scheduler)
            except BaseException as error:
                _log.exception("The engine did not end in order.")
                self._scheduler.abandon(failure("The engine failed", error))
        self._give_back()

    def _loop(self, scheduler: Scheduler) -> None:
        """Until the close. Nothing ends it before."""
        while not self._closed:
            try:
                if scheduler.busy:
                    self._take(0.0)
                    scheduler.turn()
                else:
                    self._take(scheduler.chores())
            except BaseException as error:
                _log.exception("The engine's loop failed.")
                scheduler.fail_all(error)
        self._take(0.0)
        scheduler.stop_all()

    def _take(self, wait: float | None) -> None:
        """What came from other threads; waits so many seconds for the first of it, None: without end."""
        inbox = self._inbox
        if wait == 0.0 and inbox.empty():  # as nearly always
            return
        cancels = False
        with suppress(Empty):
            while True:
                item = inbox.get(timeout=wait) if wait != 0.0 else inbox.get_nowait()
                wait = 0.0
                if item is None:
                    cancels = True
                elif isinstance(item, Work):
                    self._scheduler.add(item)
                else:
                    item()
        if cancels:
            self._scheduler.settle_cancelled()

    def _give_back(self) -> None:
        with self._lock:
            backend, self._backend = self._backend, None
        self._speculator.close()
        if backend is not None:
            try:
                backend.close()
            except Exception:
                _log.exception("The backend failed while it was closed.")

"""The worker's side: it loads a model, answers requests many at once, and ends when its parent does.

The main thread only reads orders, so that an order to stop, or the end of the pipe, is seen whatever the engine does. Each request has a
thread that carries events from the engine to the pipe.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from qwen2_local import __version__
from qwen2_local.engine import Prefilled, Request, Token
from qwen2_local.engine.reply import Reply
from qwen2_local.errors import BackendError, Qwen2LocalError
from qwen2_local.worker import messages
from qwen2_local.worker.frames import Decoder, FrameError
from qwen2_local.worker.messages import (
    Answer,
    Cancel,
    Ended,
    Failed,
    Forget,
    Forgotten,
    Generate,
    Know,
    Known,
    Loaded,
    Look,
    Looked,
    Order,
    Progress,
    Score,
    Scored,
    Start,
)
from qwen2_local.worker.setup import LocalEngine, Setup

if TYPE_CHECKING:
    from qwen2_local.grammar import Constraint
    from qwen2_local.worker.constraints import Constraints

_log = logging.getLogger("qwen2_local.worker")

_CLOSE_S = 8.5
"""How long a worker may take to end in order: replies that stop, KV that is still to be written (5 s at most). Its parent waits 10 s."""
_LOOK_S = 2.0
_MOST_REQUESTS = 1000
_READ = 1 << 16


def serve(source: int, sink: int) -> None:
    """Take orders from the descriptor `source` and answer to `sink` until the first ends, or the parent. Never returns."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is the parent's, who says what to stop
    _no_core()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(process)d %(name)s: %(message)s")
    server = _Server(sink)
    try:
        for order in _orders(source):
            server.obey(order)
    except FrameError as error:
        _log.error("%s", error.what)
        server.answer(Failed.of(0, error))
    except Exception:
        _log.exception("The worker failed.")
    finally:
        ending = threading.Thread(target=server.close, daemon=True)
        ending.start()
        ending.join(_CLOSE_S)
        # Native code that is still at work would keep the interpreter from ending.
        os._exit(0)


class _Server:
    def __init__(self, sink: int) -> None:
        self._sink = sink
        self._writing = threading.Lock()
        self._setup: Setup | None = None
        self._engine: LocalEngine | None = None
        self._grammars: Constraints | None = None
        self._ready = threading.Event()
        self._started = False
        self._lock = threading.Lock()
        self._running: dict[int, threading.Thread] = {}
        self._replies: dict[int, Reply] = {}
        self._cancelled: set[int] = set()

    def obey(self, order: Order) -> None:
        """Begin what is ordered; does not wait for it. Raises FrameError for what makes no sense."""
        if isinstance(order, Start) == self._started:
            raise FrameError("the first order, and no other, is how to start")
        match order:
            case Start():
                self._started = True
                self._begin(0, lambda: self._load(order))
            case Generate(number):
                self._begin(number, lambda: self._generate(order))
            case Score(number):
                self._begin(number, lambda: self._score(order))
            case Forget(number):
                self._begin(number, lambda: self._forget(order))
            case Look(number):
                self._begin(number, lambda: self.answer(Looked(number, self._require().layout)))
            case Know(number, prompt):
                self._begin(number, lambda: self.answer(Known(number, self._require().known(prompt))))
            case Cancel(number):
                self._cancel(number)

    def answer(self, answer: Answer) -> None:
        """Write a message. Nobody may be there to read it."""
        frame = memoryview(messages.encode(answer))
        with self._writing:
            try:
                while frame:
                    frame = frame[os.write(self._sink, frame) :]
            except OSError:
                pass  # the parent is gone, or going: the end of its pipe says so to the main thread

    def close(self) -> None:
        """End the replies under way as cancelled, and give everything back."""
        if self._engine is None:
            return
        self._engine.close()
        with self._lock:
            running = list(self._running.values())
        for thread in running:
            thread.join()

    def _begin(self, number: int, work: Callable[[], None]) -> None:
        def run() -> None:
            try:
                work()
            except BaseException as error:
                if not isinstance(error, Qwen2LocalError):
                    _log.exception("A request failed.")
                self.answer(Failed.of(number, error))
            finally:
                with self._lock:
                    del self._running[number]
                    self._replies.pop(number, None)
                    self._cancelled.discard(number)

        with self._lock:
            if number in self._running:
                raise FrameError(f"the request {number} is under way already")
            if len(self._running) >= _MOST_REQUESTS:
                error = BackendError(f"There are {_MOST_REQUESTS:,} requests under way.", hint="Wait for some of them.")
                self.answer(Failed.of(number, error))
                return
            thread = self._running[number] = threading.Thread(target=run, name=f"request {number}", daemon=True)
        thread.start()

    def _load(self, order: Start) -> None:
        if (order.protocol, order.version) != (messages.PROTOCOL, __version__):
            raise BackendError(f"qwen2-local is of version {__version__} now, not {order.version} any more.", hint="Start the program again.")
        self._setup = order.setup
        self._engine = LocalEngine(order.setup)
        self.answer(Loaded(messages.PROTOCOL, __version__, self._engine.info))
        self._ready.set()

    def _require(self) -> LocalEngine:
        self._ready.wait()
        assert self._engine is not None
        return self._engine

    def _generate(self, order: Generate) -> None:
        engine = self._require()
        constraint = None if order.constraint is None else self._constraint(order, order.constraint)
        reply = engine.submit(
            Request(
                order.prompt, order.sampling, order.stops, order.limit, order.max_tokens, constraint, order.logprobs, order.lookup, order.persist
            )
        )  # fmt: skip
        with self._lock:
            self._replies[order.number] = reply
            cancelled = order.number in self._cancelled
        if cancelled:
            reply.cancel()
        for event in reply:
            match event:
                case Token():
                    self.answer(Progress(order.number, token=event))
                case Prefilled():
                    self.answer(Progress(order.number, prefilled=event))
                case _:
                    self.answer(Ended(order.number, event))

    def _constraint(self, order: Generate, plain: str) -> Constraint:
        with self._lock:
            if self._grammars is None:
                from qwen2_local.worker.constraints import Constraints  # rarely needed, and slow to import

                assert self._setup is not None
                self._grammars = Constraints(self._setup.tokenizer)
        return self._grammars.start(plain, order.limit, order.stops)

    def _score(self, order: Score) -> None:
        scores = self._require().score(order.tokens, order.limit, order.first)
        self.answer(Scored(order.number, tuple(scores.logprobs.tolist()), tuple(scores.greedy.tolist())))

    def _forget(self, order: Forget) -> None:
        self._require().forget(order.chunks)
        self.answer(Forgotten(order.number))

    def _cancel(self, number: int) -> None:
        with self._lock:
            reply = self._replies.get(number)
            if reply is None and number in self._running:
                self._cancelled.add(number)
        if reply is not None:
            reply.cancel()


def _orders(source: int) -> Iterator[Order]:
    """What the parent says, until it ends."""
    decoder = Decoder()
    parent = os.getppid()
    while True:
        # The end of the pipe is not seen while a fork of the parent holds its other end.
        if not select.select([source], [], [], _LOOK_S)[0]:
            if os.getppid() != parent:
                return
            continue
        data = os.read(source, _READ)
        if not data:
            decoder.end()
            return
        for value in decoder.feed(data):
            order = messages.order(value)
            if isinstance(order, Start):
                _die_with(order.parent)
            yield order


def _die_with(parent: int) -> None:
    """Let the system end this process when its parent ends, where it can."""
    if sys.platform == "linux":
        import ctypes

        def gone(_signal: int, _frame: object) -> None:
            # It also comes when only the thread ended that started this process.
            if os.getppid() != parent:
                raise SystemExit

        signal.signal(signal.SIGHUP, gone)
        ctypes.CDLL(None).prctl(1, signal.SIGHUP)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # before this was asked for
        raise SystemExit


def _no_core() -> None:
    """No core dump: it would hold a whole model, and what was said to it."""
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

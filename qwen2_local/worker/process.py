"""One worker process, as its parent sees it: started, spoken to, and found dead."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np

from qwen2_local import __version__, paths
from qwen2_local.backends.base import BackendInfo, Scores
from qwen2_local.engine import Finished
from qwen2_local.engine.reply import Mailbox
from qwen2_local.errors import BackendError, Cancelled, Qwen2LocalError, UsageError, WorkerDied
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
    Progress,
    Score,
    Scored,
    Start,
)
from qwen2_local.worker.setup import Setup

_READ = 1 << 16
_CLOSE_S = 10.0
_MOST_LOG = 1_000_000
LOG = "worker.log"


@dataclass(frozen=True, slots=True)
class _Waiting:
    """One who waits for a request. stopped: what ends it where the model is closed."""

    mailbox: Mailbox[Any]
    stopped: object


class Worker:
    """A child process with a model. Two threads speak to it and listen, so that no caller is stopped in the middle of a message."""

    def __init__(self, setup: Setup) -> None:
        """Start it; `loaded` waits for the model. Raises OSError where no process can be started."""
        self._pending: dict[int, _Waiting] = {}
        self._lock = threading.Lock()
        self._closing = False
        self._error: Qwen2LocalError | None = None
        self._info: BackendInfo | None = None
        self._loaded = threading.Event()
        self._outgoing: SimpleQueue[bytes | None] = SimpleQueue()
        with _log_file() as log:
            self._child = subprocess.Popen(
                _command(),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, bufsize=0, env=_environment(),
                start_new_session=True,  # a Ctrl-C in the terminal is for the parent
            )  # fmt: skip
        assert self._child.stdin is not None and self._child.stdout is not None
        self._stdin, self._stdout = self._child.stdin, self._child.stdout
        self._outgoing.put(messages.encode(Start(messages.PROTOCOL, __version__, os.getpid(), setup)))
        self._writer = threading.Thread(target=self._speak, name="qwen2-local to a worker", daemon=True)
        self._reader = threading.Thread(target=self._listen, name="qwen2-local from a worker", daemon=True)
        self._writer.start()
        self._reader.start()

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._child.pid

    @property
    def dead(self) -> bool:
        """Has it ended, or is it about to?"""
        return self._error is not None or self._closing or self._is_deaf()

    def loaded(self) -> BackendInfo:
        """Wait for the model. Raises what loading raised, WorkerDied."""
        self._loaded.wait()
        if self._info is None:
            assert self._error is not None
            raise self._error
        return self._info

    def ask(self, order: Generate | Score | Forget | Look | Know, mailbox: Mailbox[Any]) -> bool:
        """Begin a request, whose events go to `mailbox`. False if the worker is dead."""
        frame = messages.encode(order)
        with self._lock:
            if self.dead:
                return False
            stopped = Finished("cancelled", 0.0, 0.0) if isinstance(order, Generate) else Cancelled("Stopped.")
            self._pending[order.number] = _Waiting(mailbox, stopped)
        self._outgoing.put(frame)
        return True

    def require_reader(self) -> None:
        """Raises UsageError on the thread that brings what is to be read: the garbage collector may drop, and so close, anything there."""
        if threading.current_thread() is self._reader:
            raise UsageError("A reply cannot be awaited on the thread that brings it.", hint="Read it on another one.")

    def cancel(self, number: int) -> None:
        """Stop a request, if it is under way. From any thread, the garbage collector's too: takes no lock."""
        if number in self._pending:
            self._outgoing.put(messages.encode(Cancel(number)))

    def retire(self) -> bool:
        """Take no more requests, if none is under way; whether that is so. For `close` to follow."""
        with self._lock:
            self._closing = self._closing or not self._pending
            return self._closing

    def close(self) -> None:
        """Let it end in order: replies under way end as cancelled, and what it was still to keep is kept. Kills one that takes too long."""
        self._closing = True
        self._outgoing.put(None)
        if threading.current_thread() is not self._reader:
            self._reader.join(_CLOSE_S)
            if self._reader.is_alive():
                self.kill()
                self._reader.join()

    def kill(self) -> None:
        """End it at once."""
        with suppress(OSError):
            self._child.kill()

    def _is_deaf(self) -> bool:
        """Has the other end of its input been closed? The system does that first of all when a process dies."""
        poll = select.poll()
        try:
            poll.register(self._stdin, 0)  # errors are always told
        except ValueError:  # closed here
            return True
        return bool(poll.poll(0))

    def _speak(self) -> None:
        with suppress(OSError):  # that it is dead, the other thread finds out
            while (frame := self._outgoing.get()) is not None:
                rest = memoryview(frame)
                while rest:
                    rest = rest[self._stdin.write(rest) or 0 :]
        with suppress(OSError):
            self._stdin.close()

    def _listen(self) -> None:
        decoder = Decoder()
        fault: FrameError | None = None
        try:
            while data := os.read(self._stdout.fileno(), _READ):
                for value in decoder.feed(data):
                    self._hear(messages.answer(value))
        except Exception as error:
            fault = error if isinstance(error, FrameError) else FrameError(f"{type(error).__name__}: {error}")
            self.kill()
        self._over(self._reap(), fault)

    def _reap(self) -> int:
        try:
            code = self._child.wait(_CLOSE_S)
        except subprocess.TimeoutExpired:
            self.kill()
            code = self._child.wait()
        self._stdout.close()
        self._outgoing.put(None)
        return code

    def _over(self, code: int, fault: FrameError | None) -> None:
        """The process has ended: tell everybody who waits."""
        with self._lock:
            self._error = self._error or fault or _died(code)
            pending = list(self._pending.values())
            self._pending.clear()
        for waiting in pending:
            waiting.mailbox.put(waiting.stopped if self._closing else self._error)
        self._loaded.set()

    def _hear(self, answer: Answer) -> None:
        match answer:
            case Loaded(protocol, version, info):
                if (protocol, version) != (messages.PROTOCOL, __version__):
                    raise FrameError(f"it is of version {version}, this is {__version__}", hint="Start the program again.")
                self._info = info
                self._loaded.set()
            case Failed(0):
                self._error = answer.error()
                self._outgoing.put(None)
                self._loaded.set()
            case Progress(number, prefilled, token):
                waiting, event = self._pending.get(number), token or prefilled
                if waiting is not None and event is not None:
                    waiting.mailbox.put(event)
            case Ended(number, finished):
                self._end(number, finished)
            case Scored(number, logprobs, greedy):
                self._end(number, Scores(np.array(logprobs, np.float64), np.array(greedy, np.bool_)))
            case Forgotten(number):
                self._end(number, None)
            case Looked(number, layout):
                self._end(number, layout)
            case Known(number, tokens):
                self._end(number, tokens)
            case Failed(number):
                self._end(number, answer.error())

    def _end(self, number: int, last: object) -> None:
        with self._lock:
            waiting = self._pending.pop(number, None)
        if waiting is not None:
            waiting.mailbox.put(last)


def try_out() -> float:
    """The seconds that a worker without a model takes to start and end. Raises WorkerDied, BackendError where none can be started."""
    began = time.perf_counter()
    try:
        done = subprocess.run(_command(), env=_environment(), stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BackendError(f"No worker process starts: {error}.", hint="Close other programs.") from error
    if done.returncode != 0:
        said = done.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
        raise WorkerDied(f"{_died(done.returncode).what} {said[:300]}".strip(), hint="Install qwen2-local again.")
    return time.perf_counter() - began


def _command() -> list[str]:
    return [sys.executable, "-P", "-m", "qwen2_local.worker"]


def _environment() -> dict[str, str]:
    """The child finds this package, wherever it was imported from."""
    places = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))}


def _log_file() -> Any:
    """Where the child's errors go, and what its libraries print. /dev/null where no log can be written."""
    path = paths.logs() / LOG
    try:
        with suppress(FileNotFoundError):
            if path.stat().st_size > _MOST_LOG:
                path.replace(path.with_suffix(".log.1"))
        return os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "ab")
    except OSError:
        return Path(os.devnull).open("ab")


def _died(code: int) -> WorkerDied:
    """Why a process of this exit code is dead, for people."""
    again = "The next question starts another one, which goes on from what is kept."
    log = f"If it happens again, run `qwen2-local doctor`; {paths.logs() / LOG} says more."
    if code >= 0:
        return WorkerDied(f"The worker process ended unexpectedly (exit code {code}).", hint=f"{again} {log}")
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    if name == "SIGKILL":
        why = f"{again} Perhaps the memory ran out: a shorter --context or a smaller model needs less."
        return WorkerDied("The worker process was killed (SIGKILL).", hint=why)
    if name in ("SIGTERM", "SIGHUP", "SIGINT"):
        return WorkerDied(f"The worker process was ended from outside ({name}).", hint=again)
    return WorkerDied(f"The worker process crashed in native code ({name}).", hint=f"{again} {log}")

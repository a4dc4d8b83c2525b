"""One command of ours in a process of its own: read by a thread, stopped by closing its stdin, gone when we are."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any

from qwen2_local.sanitize import clean

_MOST_LINES = 20
_MOST_ANSWER = 1 << 22

OnEvent = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Ended:
    """How it ended. code: the exit code, see `qwen2-local --help`. answer: the JSON object that it printed, empty if none. words: what it told."""

    code: int
    answer: Mapping[str, Any]
    words: str


class Child:
    """`qwen2-local ARGUMENTS`. It keeps what it has when it is stopped, as a command does at Ctrl-C."""

    def __init__(self, arguments: Sequence[str], *, on_end: Callable[[Ended], None], on_event: OnEvent = lambda event: None, nice: int = 0) -> None:
        """on_end: gets how it ended, on_event: what it tells with `--events`; both in a thread. nice: how far it steps back behind others.

        Raises OSError where none can be started.
        """
        self._on_event, self._on_end = on_event, on_end
        self._answer: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (a pipe that nobody reads meanwhile would fill up)
        try:
            # A session of its own: a Ctrl-C in the terminal is not for it, and Linux weighs sessions against each other.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "qwen2_local.cli.child", str(nice), *arguments],
                stdin=subprocess.PIPE, stdout=self._answer, stderr=subprocess.PIPE, start_new_session=True,
            )  # fmt: skip
        except OSError:
            self._answer.close()
            raise
        self._reader = threading.Thread(target=self._read, name="qwen2-local reads a command", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def stop(self) -> None:
        """Let it end, within ten seconds at most. Does not wait."""
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()

    def wait(self, timeout: float | None = None) -> bool:
        """Until it has ended, and all was told; False if that took longer."""
        self._reader.join(timeout)
        return not self._reader.is_alive()

    def _read(self) -> None:
        assert self._process.stderr is not None
        lines: deque[str] = deque(maxlen=_MOST_LINES)
        for line in self._process.stderr:
            event = _object(line)
            if event:
                self._on_event(event)
            else:
                lines.append(clean(line.decode(errors="replace")).rstrip())
        code = self._process.wait()
        self._process.stderr.close()
        self.stop()
        with self._answer as answer:
            answer.seek(0)
            said = _object(answer.read(_MOST_ANSWER))
        self._on_end(Ended(code, said, "\n".join(lines).strip()))


def _object(text: bytes) -> Mapping[str, Any]:
    """The JSON object that it is; empty if it is none."""
    if text.startswith(b"{"):
        with suppress(ValueError, RecursionError):
            made = json.loads(text)
            if isinstance(made, dict):
                return made
    return {}

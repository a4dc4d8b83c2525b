"""A real terminal for the app: a pseudo-terminal that it runs in, and an emulator that says what a person would see there.

Emulation is pyte's; reading, waiting and the app's ends are here.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyte

ROOT = Path(__file__).parents[2]
ENTER, ESC, TAB = "\r", "\x1b", "\t"
ALT_ENTER, CTRL_J, SHIFT_ENTER = "\x1b\r", "\n", "\x1b[13;2u"
UP, DOWN, RIGHT, LEFT = "\x1b[A", "\x1b[B", "\x1b[C", "\x1b[D"
F1, F2, F3, F5 = "\x1bOP", "\x1bOQ", "\x1bOR", "\x1b[15~"


def ctrl(letter: str) -> str:
    """What a terminal sends for it."""
    return chr(ord(letter) & 0x1F)


# What pyte takes for text: private sequences other than "CSI ?" (the keyboard protocol), a request for a mode's state, and strings that end
# in ST. And what has no width, and is no accent either (the joiner of emoji, say): pyte drops the text behind it.
_UNKNOWN = re.compile(rb"\x1b\[[<=>][0-9;]*[a-zA-Z]|\x1b\[\?[0-9;]*\$p|\x1b[P_^X][^\x1b]*\x1b\\|\xe2\x80[\x8b-\x8f]|\xef\xb8\x8f")


def cleaned(data: bytes) -> bytes:
    """Without what the emulator does not understand."""
    return _UNKNOWN.sub(b"", data)


class Terminal:
    """Python `source` on a pseudo-terminal of its own, until the end of the `with` block."""

    def __init__(self, source: str, *, columns: int = 100, rows: int = 30, env: Mapping[str, str] | None = None, cwd: Path = ROOT) -> None:
        ours, theirs = pty.openpty()
        self._handle = ours
        self._sized(columns, rows)
        # The terminal becomes the one that sends its signals: of a new size, say.
        controlling = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)"
        variables = {"TERM": "xterm-256color", "COLORTERM": "truecolor", "PYTHONPATH": f"{ROOT}:{ROOT / 'tui'}:{ROOT / 'converters'}"}
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", f"{controlling}\n{source}"],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=cwd,
            env={**os.environ, **variables, **(env or {})},
            start_new_session=True,
        )
        os.close(theirs)
        self.raw = bytearray()
        """All bytes that came from the app."""
        self.came: list[tuple[float, int]] = []
        """When (`time.monotonic`), and up to which byte of `raw`."""
        self._seen = 0
        self._screen = pyte.Screen(columns, rows)
        self._stream = pyte.ByteStream(self._screen)
        self._came = threading.Condition()
        self._over = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    # What a person does

    def type(self, text: str) -> None:
        """Keys, as the terminal sends them. Waits for no answer."""
        data = text.encode()
        while data:
            data = data[os.write(self._handle, data[:2048]) :]

    def paste(self, text: str) -> None:
        """As a terminal with bracketed paste does."""
        self.type(f"\x1b[200~{text}\x1b[201~")

    def resize(self, columns: int, rows: int) -> None:
        """The window gets another size."""
        self.lines()
        self._screen.resize(rows, columns)
        self._screen.reset()
        self._sized(columns, rows)

    def kill(self) -> None:
        """kill -9 of the app alone, and wait for its end."""
        self.process.kill()
        self.process.wait(20)

    def end(self, timeout: float = 20) -> int:
        """Wait until the app has ended; its exit code."""
        code = self.process.wait(timeout)
        self._reader.join(timeout)
        return code

    # What a person sees

    def lines(self) -> list[str]:
        """The screen as it is now, without the spaces at the ends of its lines."""
        with self._came:
            data, self._seen = bytes(self.raw[self._seen :]), len(self.raw)
        # A sequence may have come half.
        cut = data.rfind(b"\x1b", max(0, len(data) - 32))
        if cut >= 0 and not re.match(rb"\x1b(\[[0-9;?<=>]*[ -/]?[@-~]|[^\[P_^X])", data[cut:]):
            self._seen -= len(data) - cut
            data = data[:cut]
        self._stream.feed(cleaned(data))
        return [line.rstrip() for line in self._screen.display]

    def columns(self, character: str) -> list[set[int]]:
        """Of each line, the columns in which `character` stands: a wide one before it takes two, as in any terminal."""
        self.lines()
        return [{x for x in range(self._screen.columns) if self._screen.buffer[y][x].data == character} for y in range(self._screen.lines)]

    @property
    def text(self) -> str:
        """The same as one text."""
        return "\n".join(self.lines())

    def wait_for(self, *texts: str, timeout: float = 20) -> str:
        """Until all of `texts` are to be read on the screen; the screen."""
        return self.wait_until(lambda: all(text in self.text for text in texts), f"{texts} came not", timeout)

    def wait_until_gone(self, text: str, timeout: float = 20) -> str:
        """Until `text` is no more to be read."""
        return self.wait_until(lambda: text not in self.text, f"{text!r} is still there", timeout)

    def wait_until(self, condition: Callable[[], object], words: str = "still not so", timeout: float = 20) -> str:
        """Until `condition()`; the screen."""
        until = time.monotonic() + timeout
        while True:
            before = len(self.raw)
            if condition():
                break
            ended = self._over and not condition()
            if ended or time.monotonic() > until:
                state = f"the app ended with {self.process.poll()}" if ended else f"after {timeout:g} s"
                raise AssertionError(f"{words}, {state}; on the screen:\n{self.text}")
            with self._came:
                if len(self.raw) == before:
                    self._came.wait(0.05)
        return self.text

    def wait_until_still(self, seconds: float = 0.3, timeout: float = 20) -> str:
        """Until nothing has come for so long; the screen."""
        until = time.monotonic() + timeout
        with self._came:
            while self._came.wait(seconds):
                assert time.monotonic() < until, "the screen never came to rest"
        return self.text

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(20)
        self._reader.join(5)
        os.close(self._handle)

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._handle, 65536)
            except OSError:  # Linux's way to say that the other side is closed
                data = b""
            with self._came:
                self.raw += data
                self.came.append((time.monotonic(), len(self.raw)))
                self._over = not data
                self._came.notify_all()
            if not data:
                return

    def _sized(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self._handle, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def scripted(arguments: str, **more: Any) -> Terminal:
    """The app with scripted parts: `arguments` are those of `pilot.make_app`, as Python."""
    return Terminal(f"from tests.tui.pilot import *\nfrom tests.tui.scripted import *\nraise SystemExit(make_app({arguments}).hold())", **more)


def endless(opening: str = "", **more: Any) -> Terminal:
    """The app with the real guide in a worker, whose replies go on and on."""
    source = "from qwen2_tui.app import Opening, QwenApp\nfrom tests.tui.endless import load\n"
    return Terminal(f"{source}raise SystemExit(QwenApp(loader=load, opening=Opening({opening})).hold())", **more)


def program(*arguments: str, **more: Any) -> Terminal:
    """`qwen2-local ARGUMENTS`, as a person starts it."""
    return Terminal(f"import sys\nsys.argv = {['qwen2-local', *arguments]!r}\nfrom qwen2_local.cli import main\nmain()", **more)


def children(pid: int) -> list[int]:
    """The processes that one has started, and theirs."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    pairs = [tuple(map(int, line.split())) for line in listed.splitlines()]
    own = [child for child, parent in pairs if parent == pid]
    return [*own, *(one for child in own for one in children(child))]


def gone(pids: list[int], timeout: float = 15) -> bool:
    """Have they all ended, soon? One that nobody has asked after (a zombie) has."""
    until = time.monotonic() + timeout
    while any(map(_alive, pids)):
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def _alive(pid: int) -> bool:
    done = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return done.stdout.strip()[:1] not in ("", "Z")

"""The end that nobody chose: the window is closed in the middle of a reply."""

from __future__ import annotations

import asyncio
import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen2_local.chats import ChatStore
from qwen2_tui import ending
from tests.tui.terminal import ENTER, ROOT, children, gone

# `Terminal` reads in a thread, which would hold its end open: here it has to be closed for certain.
SOURCE = """
import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from qwen2_tui.app import QwenApp
from tests.tui.endless import load
raise SystemExit(QwenApp(loader=load).hold())
"""


@pytest.fixture
def window(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The app in a terminal. Its standard error goes to a file, as with `2>log`: it draws on its output all the same."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    env = {**os.environ, "TERM": "xterm-256color", "PYTHONPATH": f"{ROOT}:{ROOT / 'tui'}:{ROOT / 'converters'}"}
    with (tmp_path / "stderr").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", SOURCE], stdin=theirs, stdout=theirs, stderr=log, env=env, cwd=ROOT, start_new_session=True
        )
    os.close(theirs)
    yield process, ours
    process.kill()
    process.wait(20)


def read_until(handle: int, text: bytes, timeout: float = 30) -> None:
    came, until = b"", time.monotonic() + timeout
    while text not in came:
        assert time.monotonic() < until, came[-2000:]
        if select.select([handle], [], [], 0.1)[0]:
            came += os.read(handle, 65536)


def test_a_closed_window_keeps_the_partial_reply_and_leaves_no_process(window: tuple[subprocess.Popen[bytes], int], tmp_path: Path):
    process, ours = window
    read_until(ours, b"ready")
    os.write(ours, f"Go on and on.{ENTER}".encode())
    read_until(ours, b"tok/s")
    workers = children(process.pid)
    os.close(ours)
    assert process.wait(15) != 0
    assert workers and gone(workers)
    with ChatStore.open() as store:
        question, reply = store.record(store.summaries()[0].id).messages[-2:]
    assert (question.text, reply.role, reply.state) == ("Go on and on.", "assistant", "partial")
    assert reply.text
    assert b"\x1b" not in (tmp_path / "stderr").read_bytes()


def test_an_output_that_fails_is_a_closed_window_as_well(monkeypatch: pytest.MonkeyPatch):
    """A terminal may go without a signal: then the thread that writes to it finds out."""
    left, ended = threading.Event(), threading.Event()
    monkeypatch.setattr(os, "_exit", lambda code: ended.set())
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)

    async def begin() -> None:
        ending.on_signals(lambda: None, left.set)

    def write() -> None:
        raise OSError(5, "Input/output error")

    asyncio.run(begin())
    for name, closed in (("another thread", False), ("textual-output", True)):
        failing = threading.Thread(target=write, name=name)
        failing.start()
        failing.join(5)
        assert ended.wait(5 if closed else 0.05) == left.is_set() == closed

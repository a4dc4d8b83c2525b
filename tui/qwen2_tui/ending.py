"""The end that nobody chose: the terminal is closed, or the process is told to end. What was said is kept, and the model lets go of its memory."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import termios
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

_GONE = 128 + signal.SIGHUP


def on_signals(quit: Callable[[], None], leave: Callable[[], None]) -> None:
    """Take SIGTERM and SIGHUP; for the main thread, in its loop.

    quit: asks the app to end as a person would. leave: keeps everything, from any thread. Where the terminal is gone there is no such end: whatever
    is written to it blocks or fails, Textual's own farewell as well. So then everything is kept, and the process ends at once.
    """
    loop = asyncio.get_running_loop()

    def terminal_gone() -> None:
        threading.Thread(target=_leave_and_end, args=(leave,), name="qwen2-local leaves", daemon=True).start()

    def told(number: int, frame: FrameType | None) -> None:
        if _has_terminal():
            loop.call_soon_threadsafe(quit)
        else:
            terminal_gone()

    def failed(args: threading.ExceptHookArgs) -> None:
        if args.thread is not None and args.thread.name == "textual-output" and issubclass(args.exc_type, OSError):
            terminal_gone()
        else:
            before(args)

    before = threading.excepthook
    threading.excepthook = failed
    signal.signal(signal.SIGTERM, told)
    signal.signal(signal.SIGHUP, told)


def _leave_and_end(leave: Callable[[], None]) -> None:
    # Continued by a shell that ends, Textual would set up the terminal anew.
    with suppress(ValueError):
        leave()
    os._exit(_GONE)


def _has_terminal() -> bool:
    try:
        termios.tcgetattr(sys.__stdin__.fileno() if sys.__stdin__ is not None else 0)
    except (termios.error, OSError, ValueError):
        return False
    return True

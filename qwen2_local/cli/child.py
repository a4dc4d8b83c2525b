"""The command line as a child of a program that shows what it does: `python -m qwen2_local.cli.child NICE pull 7b --yes --json --events`.

It works when nobody else wants the processor, and ends with its parent, however that ends: its stdin is a pipe that the parent holds open.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path

from qwen2_local.cli import main

_END_S = 10.0


def _step_back(nice: int) -> None:
    """Less of the processor. Linux weighs sessions against each other first, where it groups by them, and processes only within one."""
    os.nice(nice)
    with suppress(OSError):
        Path("/proc/self/autogroup").write_text(str(nice))


def _end_with_parent() -> None:
    """Waits for the end of stdin; then as Ctrl-C ends it, so that everything is kept; and at once, where that takes long."""
    with suppress(OSError):
        while os.read(0, 4096):
            pass
    os.kill(os.getpid(), signal.SIGINT)
    threading.Event().wait(_END_S)
    os._exit(130)


if __name__ == "__main__":
    _step_back(int(sys.argv.pop(1)))
    # Whoever starts this may ignore Ctrl-C, which is inherited.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_end_with_parent, name="qwen2-local ends with its parent", daemon=True).start()
    sys.argv[0] = "qwen2-local"
    main()

"""Where the app writes what a person need not see: `app.log` in the folder of logs. Never a word of a chat."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qwen2_local import paths

LOG = "app.log"
_MOST = 1_000_000


def path() -> Path:
    """The log."""
    return paths.logs() / LOG


@contextmanager
def written() -> Iterator[None]:
    """For the block, write what the app logs there, and to nothing else: standard error is the screen. Where that cannot be, nowhere."""
    logger = logging.getLogger("qwen2_tui")
    logger.propagate = False
    handler: logging.Handler = logging.NullHandler()
    with suppress(OSError):
        if path().exists() and path().stat().st_size > _MOST:
            path().replace(path().with_suffix(".log.1"))
        os.close(os.open(path(), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600))
        handler = logging.FileHandler(path(), encoding="utf-8", delay=True)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


def debugging() -> bool:
    """Did somebody ask for tracebacks (QWEN2_LOCAL_DEBUG)?"""
    return bool(os.environ.get("QWEN2_LOCAL_DEBUG"))

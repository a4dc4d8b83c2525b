"""Where this program keeps its things. Asking makes the folder if it can; nothing is read or made at import.

    home()            $QWEN2_LOCAL_HOME, or the platform's folder for user data
     ├─ models/       the store
     ├─ cache/        what may be deleted at any time
     ├─ kv/           the KV cache; may be deleted at any time, too
     └─ logs/

Folders that are made here are for their owner only (0700). A home that cannot be made is no error here: `writable` tells, and
whoever has to write says what that means.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def home() -> Path:
    """The folder of all data, absolute: $QWEN2_LOCAL_HOME if set and not empty, else "qwen2-local" in the user's data folder."""
    chosen = os.environ.get("QWEN2_LOCAL_HOME")
    if chosen:
        # Path.expanduser raises where there is no home.
        return _made(Path(os.path.expanduser(chosen)).absolute())  # noqa: PTH111
    from platformdirs import user_data_path

    return _made(user_data_path("qwen2-local", appauthor=False).absolute())


def models() -> Path:
    """The store's folder."""
    return _made(home() / "models")


def cache() -> Path:
    """The folder of what may be deleted at any time."""
    return _made(home() / "cache")


def kv() -> Path:
    """The KV cache's folder. It holds what conversations were about."""
    return _made(home() / "kv")


def logs() -> Path:
    """The folder of logs."""
    return _made(home() / "logs")


def writable(folder: Path) -> bool:
    """Can files be made in `folder`? False also where there is no such folder."""
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def _made(folder: Path) -> Path:
    with suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder

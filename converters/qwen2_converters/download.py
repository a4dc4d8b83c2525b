"""Fetches files into a folder: several at once, resumed to the byte, hashed on the way, renamed into place when right and not before."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from qwen2_converters.remote import Progress, RemoteFile


def download(
    files: Sequence[RemoteFile],
    folder: Path,
    *,
    progress: Callable[[Progress], None] | None = None,
    on_done: Callable[[RemoteFile, Path], None] | None = None,
    cancelled: threading.Event | None = None,
    parallel: int = 4,
    wait_s: float = 0.0,
    on_wait: Callable[[str], None] | None = None,
) -> dict[str, str]:
    """Fetches `files` into `folder`, which is made if need be, and gives the SHA-256 of each by its name.

    Files are begun in the order given, `parallel` at a time. One that is there already is hashed, and fetched only if it is wrong (or has
    no hash to tell). Half-fetched ones, NAME.part with its NAME.part.json, are resumed, also after a kill -9. A wrong one ends as NAME.bad.

    progress, on_done (a file is whole, verified and in place): called in the caller's thread. What they raise ends the download.
    cancelled: set it from any thread to end the download soon; Ctrl-C does the same. What had come stays for the next time.
    wait_s, on_wait: for another process that downloads into the same folder; as `files.lock` takes them.

    Raises FetchFailed (Offline) when retries are used up, BadFile for what is not the announced file or has an unsafe name, DoesNotFit on a
    full disk (half-fetched files are then deleted), UsageError while another process is at it, Cancelled.
    """
    raise NotImplementedError


def read_range(file: RemoteFile, start: int, stop: int) -> bytes:
    """Bytes `start` to `stop` (at most 64 MB) of a file on a server, unverified: the header of a safetensors file, say.

    Raises FetchFailed (Offline) when retries are used up.
    """
    raise NotImplementedError

"""Outputs that appear whole or not at all: built aside under an unfinished name, locked, published by a rename (see `files`)."""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qwen2_local import files
from qwen2_local.errors import UsageError


def refuse_existing(final: Path) -> None:
    """Raises UsageError if there is anything at `final`."""
    if os.path.lexists(final):
        raise UsageError(f"{final} exists.", hint="Delete it first, or choose another name.")


@contextmanager
def staged_file(final: Path, *, overwrite: bool) -> Iterator[Path]:
    """An empty file to write, which becomes `final` when the block ends well and is deleted when it does not.

    Raises UsageError if `final` exists by then, unless `overwrite`; DoesNotFit on a full disk.
    """
    temporary = final.with_name(f".qwen2-{secrets.token_hex(8)}")
    with files.disk_errors(final):
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with suppress(OSError):  # some network file systems have no locks
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield temporary
            os.fsync(handle)
            if overwrite:
                temporary.replace(final)
            else:
                _link(temporary, final)
        finally:
            with suppress(OSError):
                temporary.unlink()
            os.close(handle)


@contextmanager
def staged_folder(final: Path, *, overwrite: bool) -> Iterator[Path]:
    """The same for a folder."""
    if not overwrite or not os.path.lexists(final):
        with files.staging(final) as folder:
            yield folder
        return
    fresh = final.with_name(f".qwen2-{secrets.token_hex(8)}")
    with files.staging(fresh) as folder:
        yield folder
    files.remove_folder(final)
    fresh.rename(final)


def _link(temporary: Path, final: Path) -> None:
    """Unlike a rename, a link does not replace what another process has put there meanwhile."""
    try:
        os.link(temporary, final)
    except OSError:
        refuse_existing(final)
        # Some file systems, those of memory sticks say, have no links.
        temporary.rename(final)

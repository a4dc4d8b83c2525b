"""The file of the chats: opened, locked, written in transactions, closed."""

from __future__ import annotations

import sqlite3
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from qwen2_local.chats import schema
from qwen2_local.errors import Qwen2LocalError, UsageError


class ChatFile:
    """A database of chats in a file, or in memory; `ChatStore` says what is done with it."""

    def __init__(self, connection: sqlite3.Connection, *, path: Path | None = None, read_only: str = "", notes: tuple[str, ...] = ()) -> None:
        """Prefer `open` and `temporary`."""
        self._connection = connection
        self._lock = threading.RLock()
        self._close = weakref.finalize(self, connection.close)
        self.path = path
        self.read_only = read_only
        """Why nothing can be written; "" where it can."""
        self.notes = notes
        """Sentences that a person should see once."""

    @classmethod
    def open(cls, path: Path | None = None) -> Self:
        """The store at `path`; by default this person's own. See `schema.open_file`: damaged, newer, unwritable files have a note."""
        path = path or schema.default_path()
        opened = schema.open_file(path)
        stored = opened.connection.execute("PRAGMA database_list").fetchone()[2]
        return cls(opened.connection, path=path if stored else None, read_only=opened.read_only, notes=opened.notes)

    @classmethod
    def open_or_temporary(cls, path: Path | None = None) -> Self:
        """The same, but where that cannot be, on a full disk say, one in memory; its note says why. Never raises."""
        try:
            return cls.open(path)
        except (Qwen2LocalError, OSError) as error:
            what = error.what if isinstance(error, Qwen2LocalError) else f"{error.filename or path}: {error.strerror}."
            return cls(schema.in_memory(), notes=(f"Chats are not saved: {what}",))

    @classmethod
    def temporary(cls) -> Self:
        """A store of its own, in memory: it leaves nothing on disk."""
        return cls(schema.in_memory())

    @property
    def kept(self) -> bool:
        """Will what is written be there after the program ends?"""
        return self.path is not None and not self.read_only

    def close(self) -> None:
        """Let go of the file. Idempotent."""
        with self._lock:
            self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._lock, schema.errors(self.path):
            if not self._close.alive:
                raise UsageError("The chats are closed.", hint="Open them again.")
            yield self._connection

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction: all of the block, or nothing."""
        if self.read_only:
            raise UsageError(self.read_only, hint="Start a temporary chat, or name another folder with QWEN2_LOCAL_HOME.")
        with self._reading() as db:
            if db.in_transaction:  # of a call that a Ctrl-C left at a bad moment
                db.execute("ROLLBACK")
            try:
                db.execute("BEGIN IMMEDIATE")
                yield db
                db.execute("COMMIT")
            except BaseException:
                # Some errors, a full disk for one, have rolled it back already.
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise

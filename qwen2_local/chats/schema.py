"""The database's tables, and how a file becomes a connection: made, migrated, set aside, or read only."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from qwen2_local import files, paths
from qwen2_local.errors import BadFile, DoesNotFit, Qwen2LocalError, UsageError

INDEX = "CREATE VIRTUAL TABLE words USING fts5(text, tokenize = 'unicode61 remove_diacritics 2')"

MIGRATIONS = (
    # Version 1
    """
    CREATE TABLE chats (
        id INTEGER PRIMARY KEY AUTOINCREMENT,  -- no number is given twice, not even after a deletion
        title TEXT NOT NULL, named INTEGER NOT NULL, pinned INTEGER NOT NULL, created REAL NOT NULL, used REAL NOT NULL,
        model TEXT NOT NULL DEFAULT '', messages INTEGER NOT NULL DEFAULT 0,  -- of its last reply; how many: a list need not look at all
        tip INTEGER REFERENCES messages(id) DEFERRABLE INITIALLY DEFERRED
    );
    CREATE INDEX chats_by_use ON chats(pinned, used);
    CREATE TABLE messages (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        chat INTEGER NOT NULL REFERENCES chats(id) DEFERRABLE INITIALLY DEFERRED,
        parent INTEGER REFERENCES messages(id) DEFERRABLE INITIALLY DEFERRED,
        role TEXT NOT NULL CHECK (role IN ('system', 'user', 'assistant')),
        text TEXT NOT NULL,
        state TEXT NOT NULL CHECK (state IN ('whole', 'partial')),
        created REAL NOT NULL,
        indexed INTEGER NOT NULL,  -- a reply is indexed once it is whole or stopped; after a crash, before the next search
        tokens BLOB, tokenizer TEXT, model TEXT, sampling TEXT, finish_reason TEXT, left_out INTEGER NOT NULL,
        prompt_tokens INTEGER, cached_tokens INTEGER, completion_tokens INTEGER, prefill_s REAL, decode_s REAL,
        drafted_tokens INTEGER, accepted_tokens INTEGER
    );
    CREATE INDEX messages_of_chat ON messages(chat);
    CREATE INDEX messages_of_parent ON messages(parent);
    CREATE INDEX messages_not_indexed ON messages(id) WHERE NOT indexed;
    CREATE TABLE chunks (chat INTEGER NOT NULL REFERENCES chats(id), name TEXT NOT NULL, PRIMARY KEY (chat, name)) WITHOUT ROWID;
    CREATE INDEX chunks_by_name ON chunks(name);
    """
    + INDEX,
    # Version 2: what a person has typed and not sent, how a chat is to be answered, and the trash
    """
    ALTER TABLE chats ADD COLUMN draft TEXT NOT NULL DEFAULT '';
    ALTER TABLE chats ADD COLUMN options TEXT NOT NULL DEFAULT '';  -- an object of JSON
    ALTER TABLE chats ADD COLUMN trashed REAL;  -- since when; NULL: it is not in the trash
    CREATE INDEX chats_in_trash ON chats(trashed) WHERE trashed IS NOT NULL;
    CREATE INDEX questions ON messages(id) WHERE role = 'user';
    CREATE TABLE unsent (id INTEGER PRIMARY KEY CHECK (id = 0), draft TEXT NOT NULL);  -- of the chat that is not there yet
    """,
)
"""The statements that lead from each version of the tables to the next; the version is SQLite's `user_version`."""

_BUSY_S = 10.0
_NAME = "chats.db"


@dataclass(frozen=True, slots=True)
class Opened:
    """A connection, why nothing can be written through it ("" where it can), and sentences that a person should see once."""

    connection: sqlite3.Connection
    read_only: str
    notes: tuple[str, ...]


def default_path() -> Path:
    """Where this person's chats are."""
    return paths.home() / _NAME


def in_memory() -> sqlite3.Connection:
    """An empty database that leaves nothing on disk."""
    connection = _connect(":memory:")
    _migrate(connection, 0)
    return connection


def open_file(path: Path) -> Opened:
    """The database at `path`, made if there is none. Raises DoesNotFit on a full disk, UsageError if another process holds it too long.

    What cannot be written is opened read-only, what is newer than this program as well; a damaged file is set aside and replaced. The
    notes say so. Where there is nothing and nothing can be made, the database is in memory.
    """
    if not paths.writable(path.parent):
        return _unwritable(path)
    try:
        with errors(path):
            if _suspicion(path).exists():
                raise BadFile(f"{path} was found to be damaged.")
            connection = _connect(path) if path.exists() else None
            if connection is not None and _version(connection, path) == len(MIGRATIONS):
                return Opened(connection, "", ())
            if connection is not None:
                connection.close()
            with _alone(path):
                return _prepare(path)
    except BadFile as error:
        with _alone(path), errors(path):
            note = _restore(path, error)
            _suspicion(path).unlink(missing_ok=True)
            fresh = _prepare(path)
            return Opened(fresh.connection, fresh.read_only, (*note, *fresh.notes))


def _alone(path: Path) -> AbstractContextManager[int]:
    return files.lock(path.with_name(f"{path.name}.lock"), what=str(path), wait_s=_BUSY_S)


def _suspicion(path: Path) -> Path:
    """A file that is there from the moment on that damage was met, until the next start has looked at all of the database."""
    return path.with_name(f"{path.name}.suspect")


def _restore(path: Path, error: BadFile) -> tuple[str, ...]:
    """Gives a damaged database another name, under which it stays; of one whose search index alone is damaged, the index is made anew."""
    try:
        with errors(path), closing(_connect(path)) as connection:
            _version(connection, path)
            if connection.execute("PRAGMA quick_check(1)").fetchone()[0] == "ok":
                _check_index(connection)
                return ()  # or another process was faster
    except BadFile:
        pass
    aside = path.with_name(f"{path.name}.damaged-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}")
    with suppress(FileNotFoundError):
        path.rename(aside)
    for ending in ("-wal", "-shm"):
        with suppress(FileNotFoundError):
            path.with_name(path.name + ending).rename(aside.with_name(aside.name + ending))
    return (f"{error.what} It was kept as {aside.name}; the chats begin anew.",)


def _check_index(connection: sqlite3.Connection) -> None:
    try:
        connection.execute("INSERT INTO words(words) VALUES ('integrity-check')")
    except sqlite3.DatabaseError:
        connection.executescript(f"BEGIN IMMEDIATE; DROP TABLE words; {INDEX}; UPDATE messages SET indexed = 0; COMMIT")


def remove_backups(path: Path) -> None:
    """Deletes what was kept before migrations: it holds texts, too."""
    for backup in path.parent.glob(f"{path.name}.before-*"):
        backup.unlink(missing_ok=True)


@contextmanager
def errors(path: Path | None) -> Iterator[None]:
    """Turns SQLite's errors in the block into ours: BadFile for a damaged file, DoesNotFit for a full disk, UsageError for the rest."""
    where = str(path or "The chats in memory")
    try:
        yield
    except sqlite3.ProgrammingError:
        raise  # a bug, not a fault
    except sqlite3.DatabaseError as error:
        raise _ours(error, path, where) from error
    except UnicodeDecodeError as error:
        # SQLite's own message quotes what it has read, which may be no text where the file is damaged.
        raise _damaged("its tables cannot be read", path, where) from error


def _ours(error: sqlite3.DatabaseError, path: Path | None, where: str) -> Qwen2LocalError:
    # Errors of Python's own module have no name.
    name = getattr(error, "sqlite_errorname", "")
    free = files.free_bytes(path) if path is not None else 1 << 40
    if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
        return _damaged(str(error), path, where)
    if name == "SQLITE_FULL" or (name.startswith("SQLITE_IOERR") and free < 1 << 20):
        return DoesNotFit(f"The disk is full at {where}: {free / 1e6:.1f} MB are free.", hint="Free some space: the chat is not saved until then.")
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return UsageError(f"{where} is in use by another process.", hint="Try again when that one is done.")
    return UsageError(f"{where} cannot be read or written ({error}).", hint="Check its folder, permissions and disk; QWEN2_LOCAL_HOME names another.")


def _damaged(what: str, path: Path | None, where: str) -> BadFile:
    if path is not None:
        with suppress(OSError):
            _suspicion(path).touch(mode=0o600)
    return BadFile(f"{where} is damaged ({what}).", hint="It is kept under another name at the next start, and the chats begin anew.")


def _connect(path: Path | str, *, mode: str = "") -> sqlite3.Connection:
    name = f"{path.as_uri()}?mode={mode}" if isinstance(path, Path) and mode else str(path)
    connection = sqlite3.connect(name, uri=bool(mode), timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
    try:
        # Deleted text is overwritten; sorting must not leave any in files of its own.
        for setting in ("secure_delete = ON", "temp_store = MEMORY", "foreign_keys = ON", "synchronous = FULL", "trusted_schema = OFF"):
            connection.execute(f"PRAGMA {setting}")
    except BaseException:
        connection.close()
        raise
    return connection


def _version(connection: sqlite3.Connection, path: Path) -> int:
    """The version of its tables. Raises BadFile for a database of something else, with the connection closed."""
    try:
        version: int = connection.execute("PRAGMA user_version").fetchone()[0]
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    except BaseException:
        connection.close()
        raise
    if (version or tables) and (version < 1 or not tables >= {"chats", "messages"}):
        connection.close()
        raise BadFile(f"{path} is a database of something else.", hint="It is kept under another name.")
    return version


def _prepare(path: Path) -> Opened:
    """Makes or migrates the database, its lock being held."""
    if not path.exists():
        # For the owner only from the first moment on; SQLite gives the files beside it the same mode.
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
    connection = _connect(path)
    version = _version(connection, path)
    try:
        if version > len(MIGRATIONS):
            connection.close()
            return _read_only(path, f"{path} was written by a newer version of this program: it can be read, not written.")
        path.chmod(0o600)
        if version == 0:
            connection.execute("PRAGMA journal_mode = WAL")
        elif version < len(MIGRATIONS):
            _back_up(connection, path, version)
        _migrate(connection, version)
    except BaseException:
        connection.close()
        raise
    return Opened(connection, "", ())


def _migrate(connection: sqlite3.Connection, version: int) -> None:
    """All steps in one transaction: a crash leaves the old version."""
    if version == len(MIGRATIONS):
        return
    steps = "; ".join(MIGRATIONS[version:])
    try:
        connection.executescript(f"BEGIN IMMEDIATE; {steps}; PRAGMA user_version = {len(MIGRATIONS)}; COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.rollback()
        raise


def _back_up(connection: sqlite3.Connection, path: Path, version: int) -> None:
    files.sweep(path.parent)  # what a crash has left of one
    with files.staging_file(path.with_name(f"{path.name}.before-{version + 1}"), overwrite=True) as copy, closing(sqlite3.connect(copy)) as to:
        connection.backup(to)


def _unwritable(path: Path) -> Opened:
    if path.exists():
        return _read_only(path, f"{path.parent} cannot be written: chats can be read, but are not saved.")
    note = f"Chats are not saved: {path.parent} cannot be written. QWEN2_LOCAL_HOME names another folder."
    return Opened(in_memory(), "", (note,))


def _read_only(path: Path, reason: str) -> Opened:
    with errors(path):
        try:
            connection = _connect(path, mode="ro")
            connection.execute("SELECT 1 FROM chats LIMIT 1").fetchone()
        except sqlite3.OperationalError:
            # A WAL cannot be read where its index cannot be made; without it, its last turns are missing.
            connection = _connect(path, mode="ro&immutable=1")
            connection.execute("SELECT 1 FROM chats LIMIT 1").fetchone()
        version = _version(connection, path)
        if version < len(MIGRATIONS):
            connection = _migrated_copy(connection, version)
    return Opened(connection, reason, (reason,))


def _migrated_copy(connection: sqlite3.Connection, version: int) -> sqlite3.Connection:
    """In memory: what is older and cannot be written is read with the tables of today as well."""
    copy = _connect(":memory:")
    with closing(connection):
        connection.backup(copy)
    _migrate(copy, version)
    return copy

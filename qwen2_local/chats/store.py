"""The chats of one person: every message, found by number and by its words, and really gone once deleted."""

from __future__ import annotations

import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from qwen2_local.chats import schema
from qwen2_local.chats.records import ChatMessage, ChatRecord, Hit, Summary, dump_sampling, load_sampling, pack_tokens, title_of, unpack_tokens
from qwen2_local.chats.words import excerpt, match_of, spaced, words_of
from qwen2_local.errors import Qwen2LocalError, UnknownChat, UsageError
from qwen2_local.types import Usage

_MESSAGE = """id, parent, role, text, state, created, tokens, tokenizer, model, sampling, finish_reason, left_out,
    prompt_tokens, cached_tokens, completion_tokens, prefill_s, decode_s, drafted_tokens, accepted_tokens"""
_SUMMARY = "SELECT id, title, named, pinned, created, used, model, messages FROM chats"


class ChatStore:
    """Chats in a file, or in memory. Safe to share between threads, and the file between processes. Use it in a `with` block, or `close` it.

    Every method raises BadFile for a damaged file, DoesNotFit on a full disk, UsageError where it is in use for too long or cannot be
    written; what names a chat raises UnknownChat if there is none. Nothing of a call that raises is kept.
    """

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

    # Chats

    def create(self) -> int:
        """A new chat without messages; its number."""
        now = time.time()
        with self._writing() as db:
            return _inserted(db.execute("INSERT INTO chats(title, named, pinned, created, used) VALUES ('', 0, 0, ?, ?)", (now, now)))

    def summaries(self, *, limit: int = -1, offset: int = 0) -> list[Summary]:
        """Chats, pinned ones first, then the last used ones first. limit: -1 for all."""
        with self._reading() as db:
            return [_summary(row) for row in db.execute(f"{_SUMMARY} ORDER BY pinned DESC, used DESC, id DESC LIMIT ? OFFSET ?", (limit, offset))]

    def summary(self, chat: int) -> Summary:
        """One chat."""
        with self._reading() as db:
            row = db.execute(f"{_SUMMARY} WHERE id = ?", (_number(chat),)).fetchone()
        if row is None:
            raise _unknown(chat)
        return _summary(row)

    def rename(self, chat: int, title: str) -> None:
        """Gives a chat a title of a person's choice; with none, it is taken from the first question again."""
        title = " ".join(title.split())[:200]
        with self._writing() as db:
            first = db.execute("SELECT text FROM messages WHERE chat = ? AND role = 'user' ORDER BY id LIMIT 1", (_number(chat),)).fetchone()
            shown = title or (title_of(first[0]) if first else "")
            _changed(db.execute("UPDATE chats SET title = ?, named = ? WHERE id = ?", (shown, bool(title), chat)), chat)

    def pin(self, chat: int, pinned: bool = True) -> None:
        """Keeps a chat at the head of the list, or no longer."""
        with self._writing() as db:
            _changed(db.execute("UPDATE chats SET pinned = ? WHERE id = ?", (pinned, _number(chat))), chat)

    def record(self, chat: int) -> ChatRecord:
        """All of a chat."""
        with self._reading() as db:
            row = db.execute("SELECT title, named, pinned, created, used, tip FROM chats WHERE id = ?", (_number(chat),)).fetchone()
            if row is None:
                raise _unknown(chat)
            messages = tuple(_message(one) for one in db.execute(f"SELECT {_MESSAGE} FROM messages WHERE chat = ? ORDER BY id", (chat,)))
        return ChatRecord(row[0], bool(row[1]), bool(row[2]), row[3], row[4], row[5], messages)

    def insert(self, record: ChatRecord) -> tuple[int, dict[int, int]]:
        """Adds a whole chat; its number, and the messages' new ids by their old ones."""
        with self._writing() as db:
            return _insert_chat(db, record)

    def insert_all(self, records: Iterable[ChatRecord]) -> list[int]:
        """Adds whole chats, all or none; their numbers."""
        with self._writing() as db:
            return [_insert_chat(db, record)[0] for record in records]

    def delete(self, chats: Iterable[int], *, forget: Callable[[Sequence[str]], None]) -> None:
        """Deletes chats for good: their texts are overwritten, in the search index and the write-ahead log as well.

        forget: gets the names of the KV chunks that no other chat has, before the chats go: what fails or crashes there can be done again.
        Backups from before a migration go as well.
        """
        numbers = [(_number(chat),) for chat in dict.fromkeys(chats)]
        with self._writing() as db:
            db.execute("CREATE TEMP TABLE IF NOT EXISTS going(chat INTEGER PRIMARY KEY)")
            db.execute("DELETE FROM going")
            db.executemany("INSERT INTO going VALUES (?)", numbers)
            row = db.execute("SELECT chat FROM going WHERE chat NOT IN (SELECT id FROM chats)").fetchone()
            if row is not None:
                raise _unknown(row[0])
            going = "IN (SELECT chat FROM going)"
            names = db.execute(f"SELECT name FROM chunks WHERE chat {going} EXCEPT SELECT name FROM chunks WHERE chat NOT {going}").fetchall()
            forget([name for (name,) in names])
            db.execute(f"DELETE FROM words WHERE rowid IN (SELECT id FROM messages WHERE chat {going})")
            for table, column in (("messages", "chat"), ("chunks", "chat"), ("chats", "id")):
                db.execute(f"DELETE FROM {table} WHERE {column} {going}")
            # A deletion only marks words as gone, in a place of its own; merging all places drops them.
            db.execute("INSERT INTO words(words) VALUES ('optimize')")
        with self._reading() as db:
            # The log still holds what was written before. Another process may be reading from it: then its last user empties it.
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if self.path is not None:
            schema.remove_backups(self.path)

    # Messages

    def add(self, chat: int, message: ChatMessage, *, index: bool = True) -> int:
        """Puts a message behind its parent, and the conversation now ends with it. Its id.

        index: False for a reply that is still being written.
        """
        now = time.time()
        with self._writing() as db:
            _changed(db.execute("UPDATE chats SET used = ? WHERE id = ?", (now, _number(chat))), chat)
            if message.role == "user":
                db.execute("UPDATE chats SET title = ? WHERE id = ? AND NOT named AND title = ''", (title_of(message.text), chat))
            number = _insert(db, chat, message.parent, replace(message, created=message.created or now), index=index)
            db.execute("UPDATE chats SET tip = ? WHERE id = ?", (number, chat))
        return number

    def update(self, chat: int, message: ChatMessage, *, index: bool = True) -> None:
        """Replaces a reply that has grown."""
        with self._writing() as db:
            columns = _columns(message)
            setting = ", ".join(f"{name} = :{name}" for name in columns)
            given = {**columns, "indexed": index, "id": message.id, "chat": _number(chat)}
            _changed(db.execute(f"UPDATE messages SET {setting}, indexed = :indexed WHERE id = :id AND chat = :chat", given), chat)
            if index:
                _index(db, message.id, message.text)

    def end_with(self, chat: int, message: int | None) -> None:
        """The conversation now ends with this message; None: before its first."""
        with self._writing() as db:
            _changed(db.execute("UPDATE chats SET tip = ?, used = ? WHERE id = ?", (message, time.time(), _number(chat))), chat)

    def keep_chunks(self, chat: int, names: Iterable[str]) -> None:
        """Writes down the names of KV chunks that hold the chat's text, for its deletion."""
        with self._writing() as db:
            if db.execute("SELECT 1 FROM chats WHERE id = ?", (_number(chat),)).fetchone() is None:
                raise _unknown(chat)
            db.executemany("INSERT OR IGNORE INTO chunks(chat, name) VALUES (?, ?)", [(chat, name) for name in names])

    def chunk_names(self, *, but: Iterable[int] = ()) -> set[str]:
        """The names of all KV chunks of chats, or of all chats but some."""
        with self._reading() as db:
            rows = db.execute("SELECT chat, name FROM chunks").fetchall()
        without = set(but)
        return {name for chat, name in rows if chat not in without}

    def broke_off(self, chats: Iterable[int]) -> bool:
        """Has any of these chats a question without a reply, or a reply without an end? Then it may have KV whose names nobody wrote down."""
        broken = """SELECT 1 FROM messages WHERE chat = ? AND (role = 'assistant' AND state = 'partial' AND finish_reason IS NULL
            OR role = 'user' AND NOT EXISTS (SELECT 1 FROM messages AS replies WHERE replies.parent = messages.id)) LIMIT 1"""
        with self._reading() as db:
            return any(db.execute(broken, (_number(chat),)).fetchone() for chat in chats)

    def search(self, query: str, *, limit: int = 50) -> list[Hit]:
        """Chats with a message, or a title, that has all words of `query`: those found by their title first, then the newest message first.

        Words may go on ("quant" finds quantization); capitals and accents make no difference. Raises InvalidPrompt for lone surrogates.
        """
        words = words_of(query)
        if not words:
            return []
        if not self.read_only:
            self._index_rest()
        with self._reading() as db:
            found: dict[int, int | None] = {}
            folded = [word.casefold() for word in words]
            for chat, title in db.execute("SELECT id, title FROM chats WHERE named ORDER BY used DESC"):
                if len(found) < limit and all(word in title.casefold() for word in folded):
                    found[chat] = None
            matching = db.execute(
                "SELECT chat, id FROM words JOIN messages ON messages.id = words.rowid WHERE words MATCH ? ORDER BY words.rowid DESC",
                (match_of(words),),
            )
            for chat, message in matching:
                if len(found) >= limit:
                    break
                found.setdefault(chat, message)
            hits = []
            for chat, number in found.items():
                summary = self.summary(chat)
                text = summary.title if number is None else db.execute("SELECT text FROM messages WHERE id = ?", (number,)).fetchone()[0]
                hits.append(Hit(summary, number, excerpt(text, words)))
        return hits

    def _index_rest(self) -> None:
        """Indexes replies that broke off with their process, or are being written."""
        with self._reading() as db:
            rest = db.execute("SELECT id, text FROM messages WHERE NOT indexed").fetchall()
        if rest:
            with self._writing() as db:
                for number, text in rest:
                    _index(db, number, text)
                    db.execute("UPDATE messages SET indexed = 1 WHERE id = ?", (number,))

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


def _insert_chat(db: sqlite3.Connection, record: ChatRecord) -> tuple[int, dict[int, int]]:
    given = (record.title, record.named, record.pinned, record.created, record.used)
    chat = _inserted(db.execute("INSERT INTO chats(title, named, pinned, created, used) VALUES (?, ?, ?, ?, ?)", given))
    numbers: dict[int, int] = {}
    for message in record.messages:
        parent = None if message.parent is None else numbers[message.parent]
        numbers[message.id] = _insert(db, chat, parent, message, index=True)
    if record.tip is not None:
        db.execute("UPDATE chats SET tip = ? WHERE id = ?", (numbers[record.tip], chat))
    return chat, numbers


def _summary(row: tuple[Any, ...]) -> Summary:
    number, title, named, pinned, created, used, model, messages = row
    return Summary(number, title, bool(named), bool(pinned), created, used, model, messages)


def _message(row: tuple[Any, ...]) -> ChatMessage:
    number, parent, role, text, state, created, tokens, tokenizer, model, sampling, finish_reason, left_out, *usage = row
    return ChatMessage(
        role=role,
        text=text,
        id=number,
        parent=parent,
        state=state,
        created=created,
        tokens=unpack_tokens(tokens),
        tokenizer=tokenizer or "",
        model=model or "",
        sampling=load_sampling(sampling),
        finish_reason=finish_reason,
        usage=None if None in usage else Usage(*usage),
        left_out=left_out,
    )


def _columns(message: ChatMessage) -> dict[str, Any]:
    """What can change of a message, by the names of its columns."""
    usage = message.usage
    return {
        "text": message.text,
        "state": message.state,
        "tokens": pack_tokens(message.tokens),
        "tokenizer": message.tokenizer or None,
        "model": message.model or None,
        "sampling": dump_sampling(message.sampling),
        "finish_reason": message.finish_reason,
        "left_out": message.left_out,
        "prompt_tokens": usage and usage.prompt_tokens,
        "cached_tokens": usage and usage.cached_tokens,
        "completion_tokens": usage and usage.completion_tokens,
        "prefill_s": usage and usage.prefill_s,
        "decode_s": usage and usage.decode_s,
        "drafted_tokens": usage and usage.drafted_tokens,
        "accepted_tokens": usage and usage.accepted_tokens,
    }


def _insert(db: sqlite3.Connection, chat: int, parent: int | None, message: ChatMessage, *, index: bool) -> int:
    values = {"chat": chat, "parent": parent, "role": message.role, "created": message.created, "indexed": index, **_columns(message)}
    names = ", ".join(values)
    places = ", ".join(f":{name}" for name in values)
    number = _inserted(db.execute(f"INSERT INTO messages({names}) VALUES ({places})", values))
    db.execute("UPDATE chats SET messages = messages + 1, model = coalesce(?, model) WHERE id = ?", (message.model or None, chat))
    if index:
        _index(db, number, message.text)
    return number


def _index(db: sqlite3.Connection, number: int, text: str) -> None:
    db.execute("INSERT OR REPLACE INTO words(rowid, text) VALUES (?, ?)", (number, spaced(text)))


def _inserted(cursor: sqlite3.Cursor) -> int:
    assert cursor.lastrowid is not None
    return cursor.lastrowid


def _changed(cursor: sqlite3.Cursor, chat: int) -> None:
    if cursor.rowcount == 0:
        raise _unknown(chat)


def _number(chat: int) -> int:
    """What SQLite can look up; others are no chat's."""
    if type(chat) is not int or not 0 <= chat < 2**63:
        raise _unknown(chat)
    return chat


def _unknown(chat: object) -> UnknownChat:
    return UnknownChat(f"There is no chat {str(chat)[:40]}.", hint="`qwen2-local chats` lists them.")

"""The chats of one person: every message, found by number and by its words, and really gone once deleted."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from qwen2_local.chats import rows, schema
from qwen2_local.chats.desk import Desk
from qwen2_local.chats.records import ChatMessage, ChatRecord, Hit, Summary, title_of
from qwen2_local.chats.words import excerpt, match_of, words_of


class ChatStore(Desk):
    """Chats in a file, or in memory. Safe to share between threads, and the file between processes. Use it in a `with` block, or `close` it.

    Every method raises BadFile for a damaged file, DoesNotFit on a full disk, UsageError where it is in use for too long or cannot be
    written; what names a chat raises UnknownChat if there is none. Nothing of a call that raises is kept.
    """

    # Chats

    def create(self) -> int:
        """A new chat without messages; its number."""
        now = time.time()
        with self._writing() as db:
            return rows.inserted(db.execute("INSERT INTO chats(title, named, pinned, created, used) VALUES ('', 0, 0, ?, ?)", (now, now)))

    def summaries(self, *, limit: int = -1, offset: int = 0) -> list[Summary]:
        """Chats, without the trash, pinned ones first, then the last used ones first. limit: -1 for all."""
        listed = f"SELECT {rows.SUMMARY} FROM chats WHERE trashed IS NULL ORDER BY pinned DESC, used DESC, id DESC LIMIT ? OFFSET ?"
        with self._reading() as db:
            return [rows.summary(row) for row in db.execute(listed, (limit, offset))]

    def summary(self, chat: int) -> Summary:
        """One chat."""
        with self._reading() as db:
            row = db.execute(f"SELECT {rows.SUMMARY} FROM chats WHERE id = ?", (rows.number(chat),)).fetchone()
        if row is None:
            raise rows.unknown(chat)
        return rows.summary(row)

    def rename(self, chat: int, title: str) -> None:
        """Gives a chat a title of a person's choice; with none, it is taken from the first question again."""
        title = " ".join(title.split())[:200]
        with self._writing() as db:
            first = db.execute("SELECT text FROM messages WHERE chat = ? AND role = 'user' ORDER BY id LIMIT 1", (rows.number(chat),)).fetchone()
            shown = title or (title_of(first[0]) if first else "")
            rows.changed(db.execute("UPDATE chats SET title = ?, named = ? WHERE id = ?", (shown, bool(title), chat)), chat)

    def pin(self, chat: int, pinned: bool = True) -> None:
        """Keeps a chat at the head of the list, or no longer."""
        with self._writing() as db:
            rows.changed(db.execute("UPDATE chats SET pinned = ? WHERE id = ?", (pinned, rows.number(chat))), chat)

    def record(self, chat: int) -> ChatRecord:
        """All of a chat."""
        with self._reading() as db:
            row = db.execute("SELECT title, named, pinned, created, used, tip FROM chats WHERE id = ?", (rows.number(chat),)).fetchone()
            if row is None:
                raise rows.unknown(chat)
            messages = tuple(rows.message(one) for one in db.execute(f"SELECT {rows.MESSAGE} FROM messages WHERE chat = ? ORDER BY id", (chat,)))
        return ChatRecord(row[0], bool(row[1]), bool(row[2]), row[3], row[4], row[5], messages)

    def insert(self, record: ChatRecord) -> tuple[int, dict[int, int]]:
        """Adds a whole chat; its number, and the messages' new ids by their old ones."""
        with self._writing() as db:
            return rows.insert_chat(db, record)

    def insert_all(self, records: Iterable[ChatRecord]) -> list[int]:
        """Adds whole chats, all or none; their numbers."""
        with self._writing() as db:
            return [rows.insert_chat(db, record)[0] for record in records]

    def delete(self, chats: Iterable[int], *, forget: Callable[[Sequence[str]], None]) -> None:
        """Deletes chats for good: their texts are overwritten, in the search index and the write-ahead log as well.

        forget: gets the names of the KV chunks that no other chat has, before the chats go: what fails or crashes there can be done again.
        Backups from before a migration go as well.
        """
        numbers = [(rows.number(chat),) for chat in dict.fromkeys(chats)]
        with self._writing() as db:
            db.execute("CREATE TEMP TABLE IF NOT EXISTS going(chat INTEGER PRIMARY KEY)")
            db.execute("DELETE FROM going")
            db.executemany("INSERT INTO going VALUES (?)", numbers)
            row = db.execute("SELECT chat FROM going WHERE chat NOT IN (SELECT id FROM chats)").fetchone()
            if row is not None:
                raise rows.unknown(row[0])
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
        """Puts a message behind its parent, and the conversation now ends with it; a question takes the chat out of the trash. Its id.

        index: False for a reply that is still being written.
        """
        now = time.time()
        with self._writing() as db:
            rows.changed(db.execute("UPDATE chats SET used = ? WHERE id = ?", (now, rows.number(chat))), chat)
            if message.role == "user":
                # Who goes on with a chat that was deleted elsewhere wants it.
                db.execute("UPDATE chats SET trashed = NULL WHERE id = ? AND trashed IS NOT NULL", (chat,))
                db.execute("UPDATE chats SET title = ? WHERE id = ? AND NOT named AND title = ''", (title_of(message.text), chat))
            number = rows.insert(db, chat, message.parent, replace(message, created=message.created or now), words=index)
            db.execute("UPDATE chats SET tip = ? WHERE id = ?", (number, chat))
        return number

    def update(self, chat: int, message: ChatMessage, *, index: bool = True) -> None:
        """Replaces a reply that has grown."""
        with self._writing() as db:
            columns = rows.columns(message)
            setting = ", ".join(f"{name} = :{name}" for name in columns)
            given = {**columns, "indexed": index, "id": message.id, "chat": rows.number(chat)}
            rows.changed(db.execute(f"UPDATE messages SET {setting}, indexed = :indexed WHERE id = :id AND chat = :chat", given), chat)
            if index:
                rows.index(db, message.id, message.text)

    def end_with(self, chat: int, message: int | None) -> None:
        """The conversation now ends with this message; None: before its first."""
        with self._writing() as db:
            rows.changed(db.execute("UPDATE chats SET tip = ?, used = ? WHERE id = ?", (message, time.time(), rows.number(chat))), chat)

    def keep_chunks(self, chat: int, names: Iterable[str]) -> None:
        """Writes down the names of KV chunks that hold the chat's text, for its deletion."""
        with self._writing() as db:
            if db.execute("SELECT 1 FROM chats WHERE id = ?", (rows.number(chat),)).fetchone() is None:
                raise rows.unknown(chat)
            db.executemany("INSERT OR IGNORE INTO chunks(chat, name) VALUES (?, ?)", [(chat, name) for name in names])

    def chunk_names(self, *, but: Iterable[int] = ()) -> set[str]:
        """The names of all KV chunks of chats, or of all chats but some."""
        with self._reading() as db:
            named = db.execute("SELECT chat, name FROM chunks").fetchall()
        without = set(but)
        return {name for chat, name in named if chat not in without}

    def broke_off(self, chats: Iterable[int]) -> bool:
        """Has any of these chats a question without a reply, or a reply without an end? Then it may have KV whose names nobody wrote down."""
        broken = """SELECT 1 FROM messages WHERE chat = ? AND (role = 'assistant' AND state = 'partial' AND finish_reason IS NULL
            OR role = 'user' AND NOT EXISTS (SELECT 1 FROM messages AS replies WHERE replies.parent = messages.id)) LIMIT 1"""
        with self._reading() as db:
            return any(db.execute(broken, (rows.number(chat),)).fetchone() for chat in chats)

    def search(self, query: str, *, limit: int = 50) -> list[Hit]:
        """Chats with a message, or a title, that has all words of `query`: those found by their title first, then the newest message first.

        Not those in the trash. Words may go on ("quant" finds quantization); capitals and accents make no difference. Raises InvalidPrompt for
        lone surrogates.
        """
        words = words_of(query)
        if not words:
            return []
        if not self.read_only:
            self._index_rest()
        with self._reading() as db:
            trashed = set(self.trashed())
            found: dict[int, int | None] = {}
            folded = [word.casefold() for word in words]
            for chat, title in db.execute("SELECT id, title FROM chats WHERE named AND trashed IS NULL ORDER BY used DESC"):
                if len(found) < limit and all(word in title.casefold() for word in folded):
                    found[chat] = None
            matching = db.execute(
                "SELECT chat, id FROM words JOIN messages ON messages.id = words.rowid WHERE words MATCH ? ORDER BY words.rowid DESC",
                (match_of(words),),
            )
            for chat, message in matching:
                if len(found) >= limit:
                    break
                if chat not in trashed:
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
                    rows.index(db, number, text)
                    db.execute("UPDATE messages SET indexed = 1 WHERE id = ?", (number,))

"""What a person has left lying about: drafts, a chat's options, the trash, what broke off, earlier questions."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from typing import Any

from qwen2_local.chats import attached, rows
from qwen2_local.chats.file import ChatFile
from qwen2_local.errors import UsageError
from qwen2_local.tokens import require_text

_MOST_OPTIONS = 1 << 16
_END_OF_TIME = 1e11
_LOOKED_AT = 10
"""Questions that are looked at for each that is wanted: more repeats than that are rare."""


class Desk(ChatFile):
    """The part of `ChatStore` that is about them."""

    def draft(self, chat: int | None) -> str:
        """What was typed and not sent in a chat; None: in the one that is not there yet."""
        with self._reading() as db:
            if chat is None:
                row = db.execute("SELECT draft FROM unsent").fetchone() or ("",)
            else:
                row = db.execute("SELECT draft FROM chats WHERE id = ?", (rows.number(chat),)).fetchone()
        if row is None:
            raise rows.unknown(chat)
        draft: str = row[0]
        return draft

    def keep_draft(self, chat: int | None, text: str) -> None:
        """Keep what was typed; "" once it was sent. The chat does not count as used by that. Raises InvalidPrompt for lone surrogates."""
        require_text(text, "The draft")
        with self._writing() as db:
            if chat is None:
                db.execute("INSERT OR REPLACE INTO unsent(id, draft) VALUES (0, ?)", (text,))
            else:
                rows.changed(db.execute("UPDATE chats SET draft = ? WHERE id = ?", (text, rows.number(chat))), chat)

    def options(self, chat: int) -> dict[str, Any]:
        """What was kept by `keep_options`; {} for nothing, and for what another version has left unreadable."""
        with self._reading() as db:
            row = db.execute("SELECT options FROM chats WHERE id = ?", (rows.number(chat),)).fetchone()
        if row is None:
            raise rows.unknown(chat)
        try:
            options = json.loads(row[0])
        except ValueError:
            return {}
        return options if isinstance(options, dict) else {}

    def keep_options(self, chat: int, options: Mapping[str, Any]) -> None:
        """Keep with a chat how it is to be answered: an object of JSON, at most 64 KB. Its meaning is the caller's."""
        text = json.dumps(dict(options))
        if len(text) > _MOST_OPTIONS:
            raise UsageError(f"The options of a chat have {len(text):,} characters, more than {_MOST_OPTIONS:,}.")
        with self._writing() as db:
            rows.changed(db.execute("UPDATE chats SET options = ? WHERE id = ?", (text, rows.number(chat))), chat)

    def trash(self, chats: Iterable[int]) -> None:
        """Put chats into the trash: out of all lists and searches at once, but still there until `deletion.purge`."""
        self._mark(chats, time.time())

    def restore(self, chats: Iterable[int]) -> None:
        """Take chats out of the trash again. Raises UnknownChat for those that are gone for good."""
        self._mark(chats, None)

    def trashed(self, *, for_s: float = 0.0) -> list[int]:
        """The chats in the trash, those first that went there first; those that have been there for so many seconds."""
        latest = time.time() - for_s if for_s else _END_OF_TIME
        with self._reading() as db:
            found = db.execute("SELECT id FROM chats WHERE trashed <= ? ORDER BY trashed, id", (latest,))
            return [chat for (chat,) in found]

    def require_listed(self, chat: int) -> None:
        """Raises UnknownChat for a chat in the trash, as for one that is not there: for whoever asks by a number that he was told."""
        with self._reading() as db:
            row = db.execute("SELECT 1 FROM chats WHERE id = ? AND trashed IS NULL", (rows.number(chat),)).fetchone()
        if row is None:
            raise rows.unknown(chat)

    def questions(self, limit: int = 100) -> list[str]:
        """What was asked in any chat, without attached files, the newest first, each once."""
        with self._reading() as db:
            asked = db.execute(
                """SELECT text FROM messages WHERE role = 'user' AND chat NOT IN (SELECT id FROM chats WHERE trashed IS NOT NULL)
                ORDER BY id DESC LIMIT ?""",
                (limit * _LOOKED_AT,),
            )
            found: dict[str, None] = {}
            for (text,) in asked:
                found[attached.split(text)[0]] = None
                if len(found) == limit:
                    break
        return list(found)

    def last_broken(self) -> int | None:
        """The chat that was used last, if it ends with a reply that broke off or with a question that has no reply; else None.

        So it looks after a crash, and also while another process writes a reply.
        """
        last = """SELECT chats.id, role, state, finish_reason FROM chats LEFT JOIN messages ON messages.id = tip
            WHERE trashed IS NULL ORDER BY used DESC, chats.id DESC LIMIT 1"""
        with self._reading() as db:
            row = db.execute(last).fetchone()
        if row is None:
            return None
        chat: int
        chat, role, state, finish_reason = row
        return chat if role == "user" or (role == "assistant" and state == "partial" and finish_reason is None) else None

    def _mark(self, chats: Iterable[int], trashed: float | None) -> None:
        with self._writing() as db:
            for chat in chats:
                rows.changed(db.execute("UPDATE chats SET trashed = ? WHERE id = ?", (trashed, rows.number(chat))), chat)

"""A row of the database, and the plain data that it stands for."""

from __future__ import annotations

import sqlite3
from typing import Any

from qwen2_local.chats.records import ChatMessage, ChatRecord, Summary, dump_sampling, load_sampling, pack_tokens, unpack_tokens
from qwen2_local.chats.words import spaced
from qwen2_local.errors import UnknownChat
from qwen2_local.types import Usage

MESSAGE = """id, parent, role, text, state, created, tokens, tokenizer, model, sampling, finish_reason, left_out,
    prompt_tokens, cached_tokens, completion_tokens, prefill_s, decode_s, drafted_tokens, accepted_tokens"""
SUMMARY = "id, title, named, pinned, created, used, model, messages"


def insert_chat(db: sqlite3.Connection, record: ChatRecord) -> tuple[int, dict[int, int]]:
    """Adds a whole chat; its number, and the messages' new ids by their old ones."""
    given = (record.title, record.named, record.pinned, record.created, record.used)
    chat = inserted(db.execute("INSERT INTO chats(title, named, pinned, created, used) VALUES (?, ?, ?, ?, ?)", given))
    numbers: dict[int, int] = {}
    for one in record.messages:
        parent = None if one.parent is None else numbers[one.parent]
        numbers[one.id] = insert(db, chat, parent, one, words=True)
    if record.tip is not None:
        db.execute("UPDATE chats SET tip = ? WHERE id = ?", (numbers[record.tip], chat))
    return chat, numbers


def summary(row: tuple[Any, ...]) -> Summary:
    """Of a row of SUMMARY."""
    chat, title, named, pinned, created, used, model, messages = row
    return Summary(chat, title, bool(named), bool(pinned), created, used, model, messages)


def message(row: tuple[Any, ...]) -> ChatMessage:
    """Of a row of MESSAGE."""
    own, parent, role, text, state, created, tokens, tokenizer, model, sampling, finish_reason, left_out, *usage = row
    return ChatMessage(
        role=role,
        text=text,
        id=own,
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


def columns(one: ChatMessage) -> dict[str, Any]:
    """What can change of a message, by the names of its columns."""
    usage = one.usage
    return {
        "text": one.text,
        "state": one.state,
        "tokens": pack_tokens(one.tokens),
        "tokenizer": one.tokenizer or None,
        "model": one.model or None,
        "sampling": dump_sampling(one.sampling),
        "finish_reason": one.finish_reason,
        "left_out": one.left_out,
        "prompt_tokens": usage and usage.prompt_tokens,
        "cached_tokens": usage and usage.cached_tokens,
        "completion_tokens": usage and usage.completion_tokens,
        "prefill_s": usage and usage.prefill_s,
        "decode_s": usage and usage.decode_s,
        "drafted_tokens": usage and usage.drafted_tokens,
        "accepted_tokens": usage and usage.accepted_tokens,
    }


def insert(db: sqlite3.Connection, chat: int, parent: int | None, one: ChatMessage, *, words: bool) -> int:
    """Adds a message; its id. words: is it to be found by its words?"""
    values = {"chat": chat, "parent": parent, "role": one.role, "created": one.created, "indexed": words, **columns(one)}
    names = ", ".join(values)
    places = ", ".join(f":{name}" for name in values)
    row = inserted(db.execute(f"INSERT INTO messages({names}) VALUES ({places})", values))
    db.execute("UPDATE chats SET messages = messages + 1, model = coalesce(?, model) WHERE id = ?", (one.model or None, chat))
    if words:
        index(db, row, one.text)
    return row


def index(db: sqlite3.Connection, message: int, text: str) -> None:
    """What the search index is told of a message."""
    db.execute("INSERT OR REPLACE INTO words(rowid, text) VALUES (?, ?)", (message, spaced(text)))


def inserted(cursor: sqlite3.Cursor) -> int:
    """The number of the row that was added."""
    assert cursor.lastrowid is not None
    return cursor.lastrowid


def changed(cursor: sqlite3.Cursor, chat: int) -> None:
    """Raises UnknownChat where a statement on a chat's row met none."""
    if cursor.rowcount == 0:
        raise unknown(chat)


def number(chat: int) -> int:
    """What SQLite can look up; others are no chat's."""
    if type(chat) is not int or not 0 <= chat < 2**63:
        raise unknown(chat)
    return chat


def unknown(chat: object) -> UnknownChat:
    """The error for a number that is no chat's."""
    return UnknownChat(f"There is no chat {str(chat)[:40]}.", hint="`qwen2-local chats` lists them.")

"""Chats as files, out and in. Whatever comes in may be hostile: it is bounded, and every field is checked.

  json      all of a chat, alternatives, ids and timings too: an object on a line of its own for each chat. What comes in again is the same.
  openai    the conversation as a list of {"role", "content"}, as OpenAI's API takes it. In: also {"messages": [...]}, and contents in parts.
  markdown  the conversation to read, and to write by hand: a heading "## user" before each message.

Alternatives beside the present conversation are in `json` only.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any, Literal, NoReturn, get_args

from qwen2_local.chats.records import ChatMessage, ChatRecord, path_to, sampling_from, sampling_object, title_of
from qwen2_local.errors import BadFile, InvalidSampling
from qwen2_local.formats.strict_json import parse_object
from qwen2_local.types import FinishReason, Role, Usage

Format = Literal["json", "openai", "markdown"]

MOST_BYTES = 64_000_000
"""The largest file that comes in; the longest line of one, too."""

_MOST_VALUES = 4_000_000  # of one line of JSON: a value takes up to 250 bytes of memory, a number 32
_MOST_CHATS = 20_000
_MOST_MESSAGES = 100_000
_MOST_TEXT = 16_000_000
_MOST_TOKENS = 1_000_000
_MARK = "qwen2-local chat"
_VERSION = 1
_HINT = "Nothing was imported. `qwen2-local chats import --help` says what can be."
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_HEADING = re.compile(r"(\\*)## (system|user|assistant)")
_END_OF_TIME = 1e11
_COUNTS = ("prompt_tokens", "cached_tokens", "completion_tokens", "drafted_tokens", "accepted_tokens")


# Out


def conversation(record: ChatRecord) -> list[ChatMessage]:
    """The messages that lead to where the chat is at present."""
    return path_to({message.id: message for message in record.messages}, record.tip)


def to_json(record: ChatRecord) -> str:
    """All of a chat, in one line."""
    places = {message.id: place for place, message in enumerate(record.messages)}
    messages = []
    for message in record.messages:
        plain: dict[str, Any] = {"role": message.role, "text": message.text, "created": message.created}
        plain["parent"] = None if message.parent is None else places[message.parent]
        if message.role == "assistant":
            plain |= {"state": message.state, "finish_reason": message.finish_reason, "model": message.model, "left_out": message.left_out}
            plain |= {"tokens": list(message.tokens), "tokenizer": message.tokenizer}
            plain["sampling"] = None if message.sampling is None else sampling_object(message.sampling)
            plain["usage"] = None if message.usage is None else asdict(message.usage)
        messages.append(plain)
    chat = {"format": _MARK, "version": _VERSION, "title": record.title, "named": record.named, "pinned": record.pinned}
    chat |= {"created": record.created, "used": record.used, "tip": None if record.tip is None else places[record.tip], "messages": messages}
    return json.dumps(chat, ensure_ascii=False, separators=(",", ":"))


def to_openai(record: ChatRecord) -> str:
    """The conversation as a list of messages."""
    return json.dumps([{"role": one.role, "content": one.text} for one in conversation(record)], ensure_ascii=False, indent=2)


def to_markdown(record: ChatRecord) -> str:
    """The conversation for reading. A line of a message that looks like one of our headings gets a backslash, which `from_markdown` takes away."""
    title = " ".join(record.title.split())
    parts = [f"# {title}\n"]
    for message in conversation(record):
        text = "\n".join(f"\\{line}" if _HEADING.fullmatch(line) else line for line in message.text.split("\n"))
        parts.append(f"\n## {message.role}\n\n{text}\n")
    return "".join(parts)


# In


def read(data: bytes, where: str, form: Format | None = None) -> Iterator[ChatRecord]:
    """The chats in a file's bytes, one after the other. form: None tells it from what is there; `where` names the file in errors.

    Raises BadFile for what is damaged, too large, of another kind, or holds what cannot be in a chat; before the first chat or later.
    """
    if len(data) > MOST_BYTES:
        raise BadFile(f"{where} has {len(data):,} bytes, more than {MOST_BYTES:,}.", hint="Export the chats into several files.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadFile(f"{where} is no UTF-8 text (byte {error.start:,}).", hint=_HINT) from None
    form = form or _told(text)
    if form == "markdown":
        yield from_markdown(text, where)
        return
    if not text.strip():
        raise BadFile(f"{where} is empty.", hint=_HINT)
    if text.lstrip().startswith("["):
        given = _parse(f'{{"messages":{text}\n}}', where)
        if len(given) > 1:
            _refuse(where, "more comes after its list")
        yield _from_openai(given, where)
        return
    lines = _objects(text)
    for number, line in enumerate(lines, 1):
        if number > _MOST_CHATS:
            raise BadFile(f"{where} holds more than {_MOST_CHATS:,} chats.", hint="Export them into several files.")
        place = where if len(lines) == 1 else f"{where}, line {number}"
        given = _parse(line, place)
        yield _from_json(given, place) if "format" in given else _from_openai(given, place)


def from_markdown(text: str, where: str) -> ChatRecord:
    """A conversation out of Markdown with a heading before each message."""
    title, messages = "", list[tuple[Role, list[str]]]()
    for line in text.replace("\r\n", "\n").split("\n"):
        heading = _HEADING.fullmatch(line)
        if heading and not heading[1]:
            messages.append((heading[2], []))  # type: ignore[arg-type]
        elif messages:
            messages[-1][1].append(line.removeprefix("\\") if heading else line)
        elif line.startswith("# ") and not title:
            title = line[2:].strip()
    if not messages:
        raise BadFile(f'{where} is no conversation: no line reads "## user".', hint=_HINT)
    # An empty line behind each heading, and one behind each text.
    pairs = []
    for role, lines in messages:
        begin, end = (1 if lines[:1] == [""] else 0), (-1 if len(lines) > 1 and not lines[-1] else None)
        pairs.append((role, "\n".join(lines[begin:end])))
    return _line(pairs, title, where)


def _told(text: str) -> Format:
    return "json" if text.lstrip()[:1] in ("{", "[") else "markdown"


def _objects(text: str) -> list[str]:
    """An object on each line; or one on several lines."""
    lines = [line for line in text.split("\n") if line.strip()]
    return lines if all(line.lstrip().startswith("{") and line.rstrip().endswith("}") for line in lines) else [text]


def _parse(text: str, where: str) -> dict[str, Any]:
    if text.count(",") + text.count("[") + text.count("{") > _MOST_VALUES:
        raise BadFile(f"{where} holds more than {_MOST_VALUES:,} values.", hint=_HINT)
    return parse_object(text.encode(), where)


def _from_openai(given: Mapping[str, Any], where: str) -> ChatRecord:
    pairs: list[tuple[Role, str]] = []
    for number, one in enumerate(_list(given.get("messages"), where, "messages", _MOST_MESSAGES), 1):
        if not isinstance(one, dict):
            _refuse(where, f"message {number} is no object")
        role = one.get("role")
        if not isinstance(role, str) or role not in _ROLES:
            _refuse(where, f"message {number} has the role {str(role)[:40]!r}; there are system, user and assistant")
        if one.get("tool_calls") or one.get("function_call"):
            _refuse(where, f"message {number} calls a tool")
        pairs.append((_ROLES[role], _content(one.get("content"), where, number)))  # type: ignore[arg-type]
    if not pairs:
        _refuse(where, "it holds no messages")
    title = given.get("title", "")
    return _line(pairs, title if isinstance(title, str) else "", where)


def _content(content: Any, where: str, number: int) -> str:
    """A text, or its parts."""
    if isinstance(content, list):
        if not all(isinstance(part, dict) and part.get("type") in ("text", "input_text", "output_text") for part in content):
            _refuse(where, f"message {number} holds more than text")
        content = "".join(_text(part.get("text"), where, f"message {number}") for part in content)
    return _text(content, where, f"message {number}")


def _line(pairs: Iterable[tuple[Role, str]], title: str, where: str) -> ChatRecord:
    """A conversation without alternatives, from now."""
    now = time.time()
    messages = [
        ChatMessage(role, _text(text, where, "a message"), number, number - 1 or None, created=now) for number, (role, text) in enumerate(pairs, 1)
    ]
    if len(messages) > _MOST_MESSAGES:
        _refuse(where, f"it holds more than {_MOST_MESSAGES:,} messages")
    _check_order(messages, where)
    first = next((one.text for one in messages if one.role == "user"), "")
    named = " ".join(_text(title, where, "the title").split())[:200]
    return ChatRecord(named or title_of(first), bool(named), False, now, now, len(messages), tuple(messages))


def _from_json(given: Mapping[str, Any], where: str) -> ChatRecord:
    if given.get("format") != _MARK:
        _refuse(where, f"its format is {str(given.get('format'))[:40]!r}, not {_MARK!r}")
    if given.get("version") != _VERSION:
        _refuse(where, f"its version is {str(given.get('version'))[:40]}, and this program reads version {_VERSION}")
    messages: list[ChatMessage] = []
    for number, one in enumerate(_list(given.get("messages"), where, "messages", _MOST_MESSAGES), 1):
        if not isinstance(one, dict):
            _refuse(where, f"message {number} is no object")
        messages.append(_message(one, number, f"{where}, message {number}"))
    _check_order(messages, where)
    tip = given.get("tip")
    place = None if tip is None else _whole(tip, where, "tip", len(messages) - 1) + 1
    title = " ".join(_text(given.get("title"), where, "title").split())[:200]
    created, used = (_number(given.get(name), where, name, _END_OF_TIME) for name in ("created", "used"))
    return ChatRecord(title, _flag(given, "named", where), _flag(given, "pinned", where), created, used, place, tuple(messages))


def _message(given: Mapping[str, Any], number: int, where: str) -> ChatMessage:
    role, parent = given.get("role"), given.get("parent")
    if not isinstance(role, str) or role not in get_args(Role):
        _refuse(where, f"its role is {str(role)[:40]!r}")
    ours: dict[str, Any] = {"role": role, "id": number, "text": _text(given.get("text"), where, "text")}
    # Parents come first, so there can be no circle.
    ours["parent"] = None if parent is None else _whole(parent, where, "parent", number - 2) + 1
    ours["created"] = _number(given.get("created"), where, "created", _END_OF_TIME)
    if role != "assistant":
        return ChatMessage(**ours)
    state, reason = given.get("state", "whole"), given.get("finish_reason")
    if state not in ("whole", "partial"):
        _refuse(where, "its state is neither whole nor partial")
    if reason is not None and reason not in get_args(FinishReason):
        _refuse(where, f"its finish_reason is {str(reason)[:40]!r}")
    tokens = _list(given.get("tokens", []), where, "tokens", _MOST_TOKENS)
    if not all(type(token) is int and 0 <= token < 2**31 for token in tokens):
        _refuse(where, "its tokens are no ids")
    ours |= {"state": state, "finish_reason": reason, "tokens": tuple(tokens)}
    ours |= {name: _text(given.get(name, ""), where, name, 200) for name in ("tokenizer", "model")}
    ours["left_out"] = _whole(given.get("left_out", 0), where, "left_out", _MOST_MESSAGES)
    if given.get("sampling") is not None:
        try:
            ours["sampling"] = sampling_from(given["sampling"])
        except InvalidSampling as error:
            _refuse(where, f"its sampling is none: {error.what}")
    if given.get("usage") is not None:
        ours["usage"] = _usage(given["usage"], where)
    return ChatMessage(**ours)


def _usage(given: Any, where: str) -> Usage:
    if not isinstance(given, dict):
        _refuse(where, "its usage is no object")
    prompt, cached, completion, drafted, accepted = (_whole(given.get(name, 0), where, name, 2**31) for name in _COUNTS)
    prefill_s, decode_s = (_number(given.get(name, 0), where, name, 1e9) for name in ("prefill_s", "decode_s"))
    return Usage(prompt, cached, completion, prefill_s, decode_s, drafted, accepted)


def _check_order(messages: list[ChatMessage], where: str) -> None:
    if any(message.role == "system" and message.parent is not None for message in messages):
        _refuse(where, "a system message comes after others; it can only be the first")


def _text(value: Any, where: str, name: str, most: int = _MOST_TEXT) -> str:
    if not isinstance(value, str):
        _refuse(where, f"{name} is no text")
    if len(value) > most:
        _refuse(where, f"{name} has {len(value):,} characters, more than {most:,}")
    try:
        value.encode()
    except UnicodeEncodeError:
        _refuse(where, f"{name} holds half a character (a lone surrogate)")
    return value


def _list(value: Any, where: str, name: str, most: int) -> list[Any]:
    if not isinstance(value, list):
        _refuse(where, f"{name} is no list")
    if len(value) > most:
        _refuse(where, f"{name} has {len(value):,} entries, more than {most:,}")
    return value


def _whole(value: Any, where: str, name: str, most: int) -> int:
    if type(value) is not int or not 0 <= value <= most:
        _refuse(where, f"{name} is {str(value)[:40]}, which is out of range")
    return value


def _number(value: Any, where: str, name: str, most: float) -> float:
    if type(value) not in (int, float) or not 0 <= value <= most:
        _refuse(where, f"{name} is {str(value)[:40]}, which is out of range")
    return float(value)


def _flag(given: Mapping[str, Any], name: str, where: str) -> bool:
    value = given.get(name, False)
    if type(value) is not bool:
        _refuse(where, f"{name} is neither true nor false")
    return value


def _refuse(where: str, why: str) -> NoReturn:
    raise BadFile(f"{where} cannot be imported: {why}.", hint=_HINT)

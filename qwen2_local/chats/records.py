"""What is kept of chats, as plain data."""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any, Literal

from qwen2_local.chats.attached import split
from qwen2_local.errors import InvalidSampling
from qwen2_local.sanitize import clean_line
from qwen2_local.types import FinishReason, Role, Sampling, Usage

State = Literal["whole", "partial"]
"""Partial: a reply that was stopped, broke off, or is being written right now."""

_TITLE = 60


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """A message of a chat. Those with one parent are alternatives of each other: edits of a question, or replies to the same.

    id, parent: numbers of the store; parent None begins a conversation. created: seconds since 1970, UTC.
    Of replies only: tokens, the ids that the model wrote, empty where they are not known or do not give `text`; tokenizer: the identity of
    the tokenizer whose ids they are; model: its name; sampling as it was asked for; finish_reason: None if it broke off, or is still being written;
    left_out: how many messages before it the model did not see, as the context was too small.
    """

    role: Role
    text: str
    id: int = 0
    parent: int | None = None
    state: State = "whole"
    created: float = 0.0
    tokens: tuple[int, ...] = field(default=(), repr=False)
    tokenizer: str = field(default="", repr=False)
    model: str = ""
    sampling: Sampling | None = None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    left_out: int = 0


@dataclass(frozen=True, slots=True)
class Summary:
    """A chat in a list. named: the title was given by a person, not taken from the first question. created, used: seconds since 1970, UTC.

    messages: how many, all alternatives counted. model: which wrote the last reply.
    """

    id: int
    title: str
    named: bool
    pinned: bool
    created: float
    used: float
    model: str
    messages: int


@dataclass(frozen=True, slots=True)
class ChatRecord:
    """A whole chat: all that an export holds. Parents come before their children; ids matter only among the messages.

    tip: the id of the message with which the conversation ends at present; None: it has none.
    """

    title: str
    named: bool
    pinned: bool
    created: float
    used: float
    tip: int | None
    messages: tuple[ChatMessage, ...]


@dataclass(frozen=True, slots=True)
class Hit:
    """A chat that was found: its newest message with the words, and a line around them; message None where the title has them."""

    chat: Summary
    message: int | None
    excerpt: str


def path_to(messages: Mapping[int, ChatMessage], tip: int | None) -> list[ChatMessage]:
    """The conversation that ends with the message `tip`, from its beginning on."""
    path = []
    while tip is not None:
        path.append(messages[tip])
        tip = path[-1].parent
    return path[::-1]


def title_of(question: str) -> str:
    """A title from the first question: its first line, cut between words to at most 60 characters. Attached files give none."""
    line = next((line for line in map(str.strip, clean_line_by_line(split(question)[0])) if line), "")
    if len(line) <= _TITLE:
        return line
    head = line[:_TITLE].rpartition(" ")[0]
    return (head if len(head) > _TITLE // 2 else line[: _TITLE - 1]).rstrip() + "…"


def clean_line_by_line(text: str) -> list[str]:
    """The lines of `text`, each fit for a terminal."""
    return [re.sub(r"\s+", " ", clean_line(line)) for line in text[:4096].splitlines()]


def pack_tokens(tokens: tuple[int, ...]) -> bytes | None:
    """Ids as little-endian int32; None for none."""
    return _little(array("i", tokens)).tobytes() if tokens else None


def unpack_tokens(data: bytes | None) -> tuple[int, ...]:
    """The reverse; no ids where the bytes are damaged."""
    if not data or len(data) % 4:
        return ()
    ids = array("i")
    ids.frombytes(data)
    return tuple(_little(ids))


def _little(ids: array[int]) -> array[int]:
    import sys

    if sys.byteorder == "big":
        ids = ids[:]
        ids.byteswap()
    return ids


def sampling_object(sampling: Sampling) -> dict[str, Any]:
    """A sampling as an object for JSON: what differs from the default."""
    plain = {one.name: getattr(sampling, one.name) for one in fields(Sampling)}
    given = {name: value for name, value in plain.items() if value != getattr(_DEFAULT, name)}
    if "logit_bias" in given:
        given["logit_bias"] = {str(token): bias for token, bias in given["logit_bias"].items()}
    return given


def sampling_from(given: object) -> Sampling:
    """The reverse. Raises InvalidSampling for what is none, with a name that is not known as well."""
    if not isinstance(given, dict):
        raise InvalidSampling("A sampling is no object.", hint="See the documentation of `Sampling`.")
    unknown = set(given) - {one.name for one in fields(Sampling)}
    if unknown:
        raise InvalidSampling(f"A sampling has no {min(unknown)[:40]!r}.", hint="It may come from a newer version of this program.")
    values = dict(given)
    if "logit_bias" in values:
        bias = values["logit_bias"]
        if not isinstance(bias, dict) or not all(isinstance(token, str) and re.fullmatch("[0-9]{1,10}", token) for token in bias):
            raise InvalidSampling("logit_bias does not map token ids to numbers.", hint="See the documentation of `Sampling`.")
        values["logit_bias"] = {int(token): value for token, value in bias.items()}
    return Sampling(**values)


def dump_sampling(sampling: Sampling | None) -> str | None:
    """A sampling as text for the database."""
    return None if sampling is None else json.dumps(sampling_object(sampling), sort_keys=True)


@lru_cache(maxsize=64)
def load_sampling(text: str | None) -> Sampling | None:
    """The reverse; None for what is none: an older or newer program may have written it."""
    try:
        return None if text is None else sampling_from(json.loads(text))
    except (ValueError, TypeError, InvalidSampling):
        return None


_DEFAULT = Sampling()

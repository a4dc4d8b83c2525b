"""A conversation as a model reads it: messages become ids once, replies are the ids that were written, and a policy says what is left out."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Literal, NamedTuple, Protocol

from qwen2_local import chatml
from qwen2_local.chats import ChatMessage
from qwen2_local.errors import ContextOverflow
from qwen2_local.tokens import Tokenizer
from qwen2_local.types import Message

Overflow = Literal["error", "drop_oldest", "keep_ends"]
"""What to do when a conversation outgrows the context. error: raise ContextOverflow. drop_oldest: the model no longer sees the oldest turns
after the system message. keep_ends: it still sees the first turn, and the latest. `Chat.left_out` counts what it does not see."""

_RESERVE = 512
_HIDDEN = 64
_ENDLESS = 1 << 62

Ids = list[int]


class Reader(Protocol):
    """What is needed of a model to know what it reads; `Qwen2` says what each is."""

    @property
    def tokenizer(self) -> Tokenizer: ...  # noqa: D102
    @property
    def default_system(self) -> str | None: ...  # noqa: D102
    @property
    def longest(self) -> int: ...  # noqa: D102


class _Turn(NamedTuple):
    """The ids of a message. text, tokens: of the message as it was, by identity: it may have grown meanwhile."""

    text: str
    tokens: tuple[int, ...]
    ids: Ids


class Turns:
    """The messages of one chat in the ids of one model. From any thread. `before` is always the messages before a reply, oldest first."""

    def __init__(self, model: Reader) -> None:
        self._model = model
        self._known: dict[int, _Turn] = {}
        self._lock = threading.Lock()

    def prompt(self, before: Sequence[ChatMessage], overflow: Overflow, opening: Ids, max_tokens: int | None) -> tuple[Ids, int]:
        """The ids for a reply that begins with `opening`, and how many messages are left out. Raises ContextOverflow."""
        turns, unseen = self.seen(before, overflow, len(opening), max_tokens)
        prompt = [*chain.from_iterable(turns), *opening]
        longest = self._model.longest
        if len(prompt) >= longest:
            hint = "Start a new chat, `branch` from an earlier turn, load the model with a larger context, or name a policy: see `Chat.overflow`."
            if overflow != "error":
                hint = "Ask something shorter, or load the model with a larger context."
            what = f"The conversation has {len(prompt):,} tokens, but the context holds {longest:,}, prompt and reply together."
            raise ContextOverflow(what, hint=hint)
        return prompt, unseen

    def seen(self, before: Sequence[ChatMessage], overflow: Overflow, opening: int, max_tokens: int | None = None) -> tuple[list[Ids], int]:
        """The ids of the messages that the model sees when it replies, and how many it does not. opening: tokens that the reply begins with."""
        system, exchanges = self._exchanges(before)
        unseen = 0
        if overflow != "error":
            longest = self._model.longest
            room = longest - min(max_tokens or _RESERVE, longest // 2) - _count(system) - opening
            exchanges, unseen = _shortened(exchanges, overflow, left_out(before), room)
        return [*system, *chain.from_iterable(exchanges)], unseen

    def saw(self, reply: ChatMessage, before: Sequence[ChatMessage], overflow: Overflow) -> list[Ids]:
        """The ids of the messages that the model saw when it wrote `reply`."""
        system, exchanges = self._exchanges(before)
        exchanges, _ = _shortened(exchanges, overflow, reply.left_out, _ENDLESS)
        return [*system, *chain.from_iterable(exchanges)]

    def reply(self, message: ChatMessage) -> Sequence[int]:
        """The ids of a reply's text: those that were written, or others that mean the same."""
        return self._written(message) or self._model.tokenizer.encode(message.text)

    def begun(self, reply: ChatMessage) -> ChatMessage:
        """A reply that is to go on, with its ids; without the half character that it was cut in, as the model writes that again."""
        tokenizer = self._model.tokenizer
        tokens = self._written(reply)
        if not tokens:
            return replace(reply, tokens=tuple(tokenizer.encode(reply.text)))
        text = reply.text
        while tokens and text.endswith("\N{REPLACEMENT CHARACTER}"):
            tokens = tokens[:-1]
            text = tokenizer.decode(tokens)
        return replace(reply, text=text, tokens=tokens)

    def renumber(self, numbers: Mapping[int, int]) -> None:
        """Messages have other ids now: the new by the old."""
        with self._lock:
            self._known = {numbers.get(number, number): turn for number, turn in self._known.items()}

    def _exchanges(self, before: Sequence[ChatMessage]) -> tuple[list[Ids], list[list[Ids]]]:
        """The system message, if there is one, and whole exchanges: a question and what came of it."""
        system: list[Ids] = []
        if before and before[0].role == "system":
            system, before = [self._turn(before[0])], before[1:]
        elif self._model.default_system is not None:
            system = [chatml.turn(self._model.tokenizer, Message("system", self._model.default_system))]
        exchanges: list[list[Ids]] = []
        for message in before:
            if message.role == "user" or not exchanges:
                exchanges.append([])
            exchanges[-1].append(self._turn(message))
        return system, exchanges

    def _turn(self, message: ChatMessage) -> Ids:
        """The ids of a message that is followed by others."""
        known = self._known.get(message.id)
        if known is not None and known.text is message.text and known.tokens is message.tokens:
            return known.ids
        tokenizer = self._model.tokenizer
        own = self._written(message)
        if own:
            ids = [*chatml.open_reply(tokenizer), *own, *chatml.close_reply(tokenizer)]
        else:
            ids = chatml.turn(tokenizer, Message(message.role, message.text))
        if message.id:
            with self._lock:
                self._known[message.id] = _Turn(message.text, message.tokens, ids)
        return ids

    def _written(self, message: ChatMessage) -> tuple[int, ...]:
        """The ids that were written, if they mean the reply's text to this model: the file of a stranger may say anything."""
        tokenizer = self._model.tokenizer
        if message.tokenizer != tokenizer.identity:
            return ()
        return message.tokens if ids_of(tokenizer, message.tokens, message.text) == message.tokens else ()


def ids_of(tokenizer: Tokenizer, tokens: tuple[int, ...], text: str) -> tuple[int, ...]:
    """The ids of `tokens` that give exactly `text`; none if there are no such. The last ones may have been hidden: of a stop string, say."""
    pieces = [tokenizer.token_bytes(token) for token in tokens]
    for length in range(len(tokens), max(-1, len(tokens) - _HIDDEN), -1):
        # A control token has no bytes, and no place in a text.
        if all(pieces[:length]) and b"".join(pieces[:length]).decode(errors="replace") == text:
            return tokens[:length]
    return ()


def left_out(messages: Sequence[ChatMessage]) -> int:
    """How many messages the model did not see when it wrote the last reply among these."""
    return next((one.left_out for one in reversed(messages) if one.role == "assistant"), 0)


def _count(turns: Sequence[Ids]) -> int:
    return sum(map(len, turns))


def _shortened(exchanges: list[list[Ids]], policy: Overflow, before: int, room: int) -> tuple[list[list[Ids]], int]:
    """The exchanges that the model sees, and how many messages it does not.

    What was left out before stays so, and once there is no room any more, a quarter becomes free at once: the prompt's beginning
    stays the same over many turns, and need not be computed anew for each.
    """
    head, rest = (exchanges[:1], exchanges[1:]) if policy == "keep_ends" and len(exchanges) > 1 else ([], exchanges)
    gone, start, total = 0, 0, sum(map(_count, exchanges))

    def drop() -> None:
        nonlocal gone, start, total
        gone, total, start = gone + len(rest[start]), total - _count(rest[start]), start + 1

    while start < len(rest) - 1 and gone < before:
        drop()
    if total > room:
        while start < len(rest) - 1 and total > room * 3 // 4:
            drop()
    return [*head, *rest[start:]], gone

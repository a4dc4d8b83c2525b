"""A reply's tokens for people: their texts, how likely each was, and what else could have come.

What asks the model takes its time, so it is for threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qwen2_local.sanitize import clean
from qwen2_tui.widgets.tokenflow import Piece

if TYPE_CHECKING:
    from qwen2_local.chat import Chat
    from qwen2_local.tokens import Tokenizer
    from qwen2_tui.model import Model

_ALTERNATIVES = 10
STEPS = ((0.9, "sure"), (0.6, "likely"), (0.3, "open"), (0.1, "doubtful"), (0.0, "unlikely"))
"""From which probability on a token is shown how."""


@dataclass(frozen=True, slots=True)
class Alternative:
    """What could have come in a token's place. text: the reply up to there with this token; None where no reply can go on from that."""

    label: str
    probability: float
    text: str | None


@dataclass(frozen=True, slots=True)
class Scored:
    """A reply's tokens. prompt: the ids before them. texts: to show. marks: which are control tokens. probabilities: empty until they are known."""

    prompt: tuple[int, ...]
    ids: tuple[int, ...]
    texts: tuple[str, ...]
    marks: tuple[bool, ...]
    probabilities: tuple[float, ...] = ()

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """With the names of their styles."""
        steps = map(step, self.probabilities) if self.probabilities else [""] * len(self.texts)
        return tuple(Piece(text, f"{name} mark" if mark else name, mark) for text, name, mark in zip(self.texts, steps, self.marks, strict=True))

    @property
    def words(self) -> str:
        """What is to be said of the whole."""
        if not self.probabilities:
            return f"{len(self.ids):,} tokens · reading their probabilities …"
        mean = math.fsum(math.log(max(one, 1e-30)) for one in self.probabilities) / len(self.ids)
        unlikely = sum(one < 0.5 for one in self.probabilities)
        return f"{len(self.ids):,} tokens · {unlikely:,} of them below 50 % · perplexity {math.exp(-mean):.2f}"


def tokens_of(model: Model, chat: Chat, turn: int) -> Scored:
    """The tokens of the reply `turn`, the mark that ended it included if it came to its end. Raises as `Chat.ids`."""
    from qwen2_local import chatml

    prompt, message = chat.prompt(turn), chat.messages[turn]
    ids = chat.ids(turn)[len(prompt) :]
    # Behind the reply's own are a mark and a newline that close the turn; the model wrote the mark alone, and only where it ended by itself.
    closing = len(chatml.close_reply(model.tokenizer))
    ids = ids[: len(ids) - closing + (1 if message.state == "whole" and message.finish_reason in (None, "stop") else 0)]
    control = set(model.tokenizer.special.values())
    return Scored(prompt, ids, tuple(texts_of(model.tokenizer, ids, lambda raw: "·")), tuple(token in control for token in ids))


def scored(model: Model, tokens: Scored) -> Scored:
    """With their probabilities. The model reads the whole once more, so it takes as long as that."""
    score = model.score_ids((*tokens.prompt, *tokens.ids), len(tokens.prompt))
    return replace(tokens, probabilities=tuple(math.exp(min(one, 0.0)) for one in score.logprobs))


def alternatives(model: Model, tokens: Scored, place: int) -> tuple[Alternative, ...]:
    """The likeliest tokens in the place of that number, likeliest first."""
    before = tokens.ids[:place]
    stream = model.write((*tokens.prompt, *before), max_tokens=1, logprobs=_ALTERNATIVES, persist=False)
    top = next((piece.top for piece in stream if piece.top), ())
    begun = b"".join(map(model.tokenizer.token_bytes, before))
    found = []
    for token, logprob in top:
        raw = model.tokenizer.token_bytes(token)
        try:
            text = (begun + raw).decode() if raw else None
        except UnicodeDecodeError:
            text = None
        found.append(Alternative(clean(visible(texts_of(model.tokenizer, [token], hexadecimal)[0])), math.exp(min(logprob, 0.0)), text))
    return tuple(found)


def hexadecimal(raw: bytes) -> str:
    """Bytes that are no character by themselves."""
    return f"‹{raw.hex(' ')}›"


def visible(text: str) -> str:
    """A token's text with its spaces and newlines to be seen."""
    return f"“{text}”".replace("\n", "↵").replace("\t", "⇥")


def step(probability: float) -> str:
    """The name of the style for a probability."""
    return next(name for least, name in STEPS if probability >= least)


def percent(probability: float) -> str:
    """ "62.1 %"; what is very small is said to be."""
    return f"{100 * probability:.1f} %" if probability >= 0.0005 else "< 0.1 %"


def texts_of(tokenizer: Tokenizer, ids: Sequence[int], part: Callable[[bytes], str] = lambda raw: "") -> list[str]:
    """A text for each token: control tokens by name; a character of several tokens is with its last one, the others show `part` of their bytes."""
    marks = {number: name for name, number in tokenizer.special.items()}
    texts: list[str] = []
    held = b""
    for token in ids:
        raw = tokenizer.token_bytes(token)
        if token in marks or not raw:
            if held:
                texts[-1] += "\N{REPLACEMENT CHARACTER}"
            texts.append(marks.get(token, ""))
            held = b""
            continue
        held += raw
        try:
            texts.append(held.decode())
            held = b""
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data":
                texts.append(held[: error.start].decode() + part(raw[error.start - len(held) :]))
                held = held[error.start :]
            else:
                texts.append(held.decode(errors="replace"))
                held = b""
    return texts

"""Plain data that passes between the floors. No behaviour beyond checking itself."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from qwen2_local.errors import InvalidSampling

Role = Literal["system", "user", "assistant"]
FinishReason = Literal["stop", "length", "context", "cancelled"]
"""Why a reply ended: a stop token or string; `max_tokens`; the context is full; the caller."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


class LogitBias(Mapping[int, float]):
    """An immutable mapping of token ids to what is added to their logits. Unlike a dict it can be hashed."""

    __slots__ = ("_of",)

    def __init__(self, of: Mapping[int, float] | None = None) -> None:
        self._of = dict(of or {})

    def __getitem__(self, token: int) -> float:
        return self._of[token]

    def __iter__(self) -> Iterator[int]:
        return iter(self._of)

    def __len__(self) -> int:
        return len(self._of)

    def __hash__(self) -> int:
        return hash(frozenset(self._of.items()))

    def __repr__(self) -> str:
        return repr(self._of)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. One meaning on every backend (`sampling.py` says it).

    temperature: 0 is greedy. top_k: 0 is off. top_p: 1 is off. min_p: least probability, as a part of the likeliest token's; 0 is off.
    repetition_penalty: 1 is off; it counts every token of the sequence, prompt included, as Hugging Face's does.
    presence_penalty, frequency_penalty: 0 is off; taken from the logits of the reply's own tokens, once and for each time they occurred,
    as OpenAI's. penalty_window: all three look at so many of the latest tokens of prompt and reply; None: at all.
    logit_bias: added to the logits of these token ids. seed: None draws one.
    Raises InvalidSampling for values out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_window: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=LogitBias)

    def __post_init__(self) -> None:
        _require("temperature", self.temperature, 0, 100)
        _require("top_p", self.top_p, 0, 1, above=True)
        _require("top_k", self.top_k, 0, 1_000_000, whole=True)
        _require("repetition_penalty", self.repetition_penalty, 0, 100, above=True)
        _require("min_p", self.min_p, 0, 1)
        _require("presence_penalty", self.presence_penalty, -2, 2)
        _require("frequency_penalty", self.frequency_penalty, -2, 2)
        if self.seed is not None:
            _require("seed", self.seed, 0, 2**64 - 1, whole=True)
        if self.penalty_window is not None:
            _require("penalty_window", self.penalty_window, 1, 10_000_000, whole=True)
        if type(self.logit_bias) is not LogitBias:
            if not isinstance(self.logit_bias, Mapping):
                raise InvalidSampling("logit_bias is no mapping.", hint="It maps token ids to numbers from -100 to 100.")
            object.__setattr__(self, "logit_bias", LogitBias(self.logit_bias))
        if len(self.logit_bias) > _MOST_BIASED:
            raise InvalidSampling(f"logit_bias names {len(self.logit_bias):,} tokens.", hint=f"It may name {_MOST_BIASED:,}.")
        for token, bias in self.logit_bias.items():
            _require("logit_bias's token", token, 0, 2**31 - 1, whole=True)
            _require(f"logit_bias[{token}]", bias, -100, 100)


_MOST_BIASED = 4096


def _require(name: str, value: float, low: float, high: float, *, above: bool = False, whole: bool = False) -> None:
    number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value > high or value < low or (above and value == low):
        kind, start = "whole number" if whole else "number", "above" if above else "from"
        raise InvalidSampling(f"{name} is {value!r}, but has to be a {kind} {start} {low} to {high:,}.", hint="See `qwen2-local run --help`.")


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of a reply as it streams: `text` is whole characters, possibly empty; `token` the id behind it.

    logprob: the token's log-probability, where asked for; top: (id, log-probability) of the likeliest, likeliest first.
    """

    text: str
    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """What a reply cost. Counts are tokens; times are seconds of wall clock.

    cached_tokens: of the prompt, those whose keys and values were there already. drafted_tokens, accepted_tokens: proposed by speculation,
    and right.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    prefill_s: float
    decode_s: float
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens per second after the first one; 0 where there was no second."""
        return (self.completion_tokens - 1) / self.decode_s if self.completion_tokens > 1 and self.decode_s > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished reply.

    tokens: its ids, those of a stop string included. logprobs: (log-probability, likeliest ids with theirs) of each, where asked for.
    chunks: names under which the KV cache keeps it.
    """

    text: str
    finish_reason: FinishReason
    usage: Usage
    tokens: tuple[int, ...] = field(repr=False)
    logprobs: tuple[tuple[float, tuple[tuple[int, float], ...]], ...] = field(default=(), repr=False)
    chunks: tuple[str, ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class Score:
    """How likely a text was. logprobs: natural logarithms, of each token but the first; tokens: the ids they belong to.

    greedy: was every one of them the likeliest?
    """

    tokens: tuple[int, ...] = field(repr=False)
    logprobs: tuple[float, ...] = field(repr=False)
    greedy: bool

    def __repr__(self) -> str:
        return f"Score(logprob={self.logprob:.6g}, perplexity={self.perplexity:.6g}, greedy={self.greedy}, tokens={len(self.tokens)})"

    @property
    def logprob(self) -> float:
        """Of the whole."""
        return math.fsum(self.logprobs)

    @property
    def perplexity(self) -> float:
        """e to the mean of the negative log-probabilities."""
        return math.exp(-self.logprob / len(self.logprobs))

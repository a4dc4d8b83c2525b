"""Plain data that passes between the floors. No behaviour beyond checking itself."""

from __future__ import annotations

import math
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


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. One meaning on every backend (`sampling.py` is the reference).

    temperature: 0 is greedy. top_k: 0 is off. top_p: 1 is off. repetition_penalty: 1 is off; it counts every token of the
    sequence, prompt included, as Hugging Face's does. seed: None draws one.
    Raises InvalidSampling for values out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _require("temperature", self.temperature, 0, 100)
        _require("top_p", self.top_p, 0, 1, above=True)
        _require("top_k", self.top_k, 0, 1_000_000, whole=True)
        _require("repetition_penalty", self.repetition_penalty, 0, 100, above=True)
        if self.seed is not None:
            _require("seed", self.seed, 0, 2**64 - 1, whole=True)


def _require(name: str, value: float, low: float, high: float, *, above: bool = False, whole: bool = False) -> None:
    number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value > high or value < low or (above and value == low):
        kind, start = "whole number" if whole else "number", "above" if above else "from"
        raise InvalidSampling(f"{name} is {value!r}, but has to be a {kind} {start} {low} to {high:,}.", hint="See `qwen2-local run --help`.")


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of a reply as it streams: `text` is whole characters, possibly empty; `token` the id behind it."""

    text: str
    token: int


@dataclass(frozen=True, slots=True)
class Usage:
    """What a reply cost. Counts are tokens; times are seconds of wall clock."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    prefill_s: float
    decode_s: float

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens per second after the first one; 0 where there was no second."""
        return (self.completion_tokens - 1) / self.decode_s if self.completion_tokens > 1 and self.decode_s > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished reply."""

    text: str
    finish_reason: FinishReason
    usage: Usage
    tokens: tuple[int, ...] = field(repr=False)

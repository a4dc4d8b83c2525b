"""Plain data between an engine and its callers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qwen2_local.types import FinishReason, Sampling

if TYPE_CHECKING:
    from qwen2_local.grammar import Constraint


@dataclass(frozen=True, slots=True)
class Request:
    """What to generate.

    stops: ids that end the reply, and are no part of it. limit: ids from here on are never chosen. max_tokens: None fills the context.
    constraint: which tokens may follow; used up by this request. logprobs: None for no log-probabilities, else of the chosen token and so
    many of the likeliest. lookup: draft tokens from what the sequence itself says. persist: its KV may go to the disk, else to memory only.
    """

    prompt: tuple[int, ...]
    sampling: Sampling
    stops: frozenset[int]
    limit: int
    max_tokens: int | None = None
    constraint: Constraint | None = None
    logprobs: int | None = None
    lookup: bool = False
    persist: bool = True


@dataclass(frozen=True, slots=True)
class Prefilled:
    """Progress of reading the prompt: tokens done (cached ones included) of all."""

    done: int
    total: int
    cached: int


@dataclass(frozen=True, slots=True)
class Token:
    """A token of the reply; a stop token is not one. logprob, top: as in `backends.base.Chosen`, where asked for."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of a reply, with seconds spent before the first token (from its admission on) and after it.

    drafted, accepted: tokens that were proposed by speculation, and how many of them were right. chunks: names under which the KV cache
    keeps its sequence, as `KvCache.names` gives them.
    """

    reason: FinishReason
    prefill_s: float
    decode_s: float
    drafted: int = 0
    accepted: int = 0
    chunks: tuple[str, ...] = ()


Event = Prefilled | Token | Finished

"""What a backend is: token ids in, token ids or logits out. It knows sequences and their KV, and nothing of text, chats or files' trust.

A backend is used from one thread (the engine's owner thread) except `cancel`, which any thread may call.
Adding one: a module with a class of this shape, and a line in `backends/__init__.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.uint32]
"""Which ids may be chosen: bit i % 32 of word i // 32 belongs to id i. [ceil(ids / 32)]; ids past its end may not."""


@dataclass(frozen=True, slots=True)
class BackendInfo:
    """What was loaded.

    context: the most tokens that one sequence can hold without YaRN; yarn_context: with it, 0 where the model has none (`Layout.yarn`).
    kv_bytes_per_token: of one sequence. notes: sentences a user should see once (safe mode, say).
    """

    name: str
    version: str
    architecture: str
    context: int
    vocabulary: int
    layers: int
    kv_bytes_per_token: int
    yarn_context: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Layout:
    """How the memory for KV is laid out: so many sequences, each of at most `context` tokens.

    yarn: positions are stretched (YaRN, Peng et al., 2023) for contexts past the model's own; it changes short texts as well.
    """

    sequences: int
    context: int
    yarn: bool = False


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """What a backend has to know of a model beyond its files. `loading` decides it; a backend trusts it.

    identity: a hash of the weights, for the fingerprint. adapter: a LoRA of the backend's own format; adapter_identity: its hash.
    context, yarn_context: the longest that a layout will ever be, without YaRN and with it (0: never with it); for `BackendInfo`.
    yarn_factor, yarn_original: what `Layout.yarn` switches on. A model whose own files say YaRN is always stretched, and has yarn_context 0.
    kv_bits: 16, or 8 for a KV of half the size and a little noise. safe: without code for special processors, where a library has any.
    """

    identity: str
    context: int
    adapter: Path | None = None
    adapter_identity: str = ""
    kv_bits: int = 16
    yarn_context: int = 0
    yarn_factor: float = 0.0
    yarn_original: int = 32768
    safe: bool = False


_NONE = np.empty(0, np.int32)


@dataclass(frozen=True, slots=True)
class Choice:
    """How to choose the token after a token of a row; a resolved `types.Sampling`. `sampling.py` says what each means, and in what order.

    limit: only ids below it may be chosen (a vocabulary is padded past its tokenizer). uniform: in [0, 1), the token's random number.
    penalized [n] int32: ids under the repetition penalty, each once. counted [m], counts [m] int32: ids under the presence and frequency
    penalties, each once, and how often each occurred. logit_bias: added to the logits of these ids.
    mask: called once when the logits are there (it may have been computed meanwhile, on another thread); None allows every id.
    top_logprobs: None for no log-probabilities, else give the chosen token's and those of so many of the likeliest.
    """

    limit: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    uniform: float = 0.0
    penalized: npt.NDArray[np.int32] = field(default_factory=lambda: _NONE)
    counted: npt.NDArray[np.int32] = field(default_factory=lambda: _NONE)
    counts: npt.NDArray[np.int32] = field(default_factory=lambda: _NONE)
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    mask: Callable[[], Mask] | None = None
    top_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class Chosen:
    """A chosen token. Log-probabilities are the model's own, over the ids below the limit, before anything of `Choice` changed them.

    top: (id, log-probability) of the likeliest, likeliest first.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Row:
    """Tokens to append to one sequence in a step.

    choose: n choices ask for a token after each of the last n tokens (none of them is appended): one in decoding, several where drafted
    tokens are verified. targets: as many as `tokens`, and ask how likely each was as the token after its place; only ids below `limit`
    count. logits: give the logits, of the last token ("last", [1, vocabulary]) or of all ("all", [len(tokens), vocabulary]).
    """

    sequence: int
    tokens: Sequence[int]
    choose: Sequence[Choice] = ()
    targets: Sequence[int] = ()
    limit: int = 0
    logits: str = ""


@dataclass(frozen=True, slots=True)
class Scores:
    """How likely each of a row's `targets` was. logprobs [n] float64; greedy [n] bool: was it the likeliest?"""

    logprobs: npt.NDArray[np.float64]
    greedy: npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class RowResult:
    """What came of a row: a chosen token for each choice, in order; scores and float32 logits, or None where not asked for."""

    chosen: tuple[Chosen, ...] = ()
    scores: Scores | None = None
    logits: npt.NDArray[np.float32] | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """The KV of `tokens` consecutive tokens of a sequence, as bytes whose meaning is the backend's own."""

    tokens: int
    data: bytes | memoryview


class Backend(Protocol):
    """A loaded model on one device."""

    @property
    def info(self) -> BackendInfo:
        """What was loaded."""
        ...

    @property
    def layout(self) -> Layout:
        """How the KV memory is laid out now."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hexadecimal. Chunks exported under it may be imported under the same one, and no other.

        It covers weights, adapter, RoPE and YaRN, the KV's type and format, whatever else changes the numbers, and the library's version;
        not how many sequences there are, nor their context.
        """
        ...

    @property
    def step_tokens(self) -> int:
        """The most tokens that one `step` takes, all rows together: the engine slices prefill by it."""
        ...

    def arrange(self, layout: Layout) -> None:
        """Forget all sequences, and lay the KV memory out anew. Raises DoesNotFit (the layout is then as before, the sequences are gone)."""
        ...

    def open(self) -> int:
        """A new empty sequence. Raises BackendError when all are in use."""
        ...

    def step(self, rows: Sequence[Row]) -> list[RowResult]:
        """Append each row's tokens to its sequence, in one batch; results in the order of the rows.

        Raises Cancelled when `cancel` was called meanwhile, or since the step before; BackendError on NaN logits, where no token may come
        next, or from a failing library. Every sequence is then as before the step, so that it can be made again, row by row; only one
        whose KV was lost goes on raising.
        """
        ...

    def fork(self, sequence: int, length: int) -> int:
        """A new sequence that begins with the first `length` tokens of another. Raises BackendError when all are in use."""
        ...

    def trim(self, sequence: int, length: int) -> None:
        """Forget all but the first `length` tokens of a sequence."""
        ...

    def free(self, sequence: int) -> None:
        """Give a sequence and its KV back."""
        ...

    def export_kv(self, sequence: int, ranges: Sequence[tuple[int, int]]) -> list[Chunk]:
        """The KV of ranges (from, up to) of a sequence's tokens, exact. Ascending, none overlapping."""
        ...

    def import_kv(self, sequence: int, chunks: Sequence[Chunk]) -> None:
        """Append the KV of tokens that were exported behind the same tokens, under the same fingerprint.

        Raises BackendError for data of a wrong size or form; the sequence is then as before.
        """
        ...

    def cancel(self) -> None:
        """Stop the step under way; where there is none, the next one ends as it begins. Callable from any thread; returns at once."""
        ...

    def close(self) -> None:
        """Give everything back. Idempotent."""
        ...

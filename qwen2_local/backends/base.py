"""What a backend is: token ids in, token ids or logits out. It knows sequences and their KV, and nothing of text, chats or files' trust.

A backend is used from one thread (the engine's owner thread) except `cancel`, which any thread may call.
Adding one: a module with a class of this shape, and a line in `backends/__init__.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class BackendInfo:
    """What was loaded. `kv_bytes_per_token` is for one sequence; `notes` are sentences a user should see once (safe mode, say)."""

    name: str
    version: str
    architecture: str
    context: int
    vocabulary: int
    layers: int
    kv_bytes_per_token: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Choice:
    """How to choose the token after a row; a resolved `types.Sampling`.

    uniform: in [0, 1), the row's random number. penalized: ids under the repetition penalty (each once). limit: only ids below it
    may be chosen (a vocabulary is padded past its tokenizer).
    """

    limit: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    penalized: Sequence[int] = ()
    uniform: float = 0.0


@dataclass(frozen=True, slots=True)
class Row:
    """Tokens to append to one sequence in a step.

    choose: choose the token after the last one (it is not appended). logits: also give the logits, of the last token
    ("last", shape [1, vocabulary]) or of all ("all", [len(tokens), vocabulary]).
    """

    sequence: int
    tokens: Sequence[int]
    choose: Choice | None = None
    logits: str = ""


@dataclass(frozen=True, slots=True)
class RowResult:
    """What came of a row: the chosen token, the float32 logits, or None where not asked for."""

    token: int | None = None
    logits: npt.NDArray[np.float32] | None = None


class Backend(Protocol):
    """A loaded model on one device."""

    @property
    def info(self) -> BackendInfo:
        """What was loaded."""
        ...

    @property
    def step_tokens(self) -> int:
        """The most tokens that one `step` takes, all rows together: the engine slices prefill by it."""
        ...

    def open(self) -> int:
        """A new empty sequence. Raises BackendError when all are in use."""
        ...

    def step(self, rows: Sequence[Row]) -> list[RowResult]:
        """Append each row's tokens to its sequence, in one batch; results in the order of the rows.

        Raises Cancelled when `cancel` was called meanwhile (the sequences' lengths are then as before the step),
        BackendError on NaN logits or a failing library.
        """
        ...

    def trim(self, sequence: int, length: int) -> None:
        """Forget all but the first `length` tokens of a sequence."""
        ...

    def free(self, sequence: int) -> None:
        """Give a sequence and its KV back."""
        ...

    def cancel(self) -> None:
        """Stop the step under way, if any. Callable from any thread; returns at once."""
        ...

    def close(self) -> None:
        """Give everything back. Idempotent."""
        ...

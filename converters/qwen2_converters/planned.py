"""What a conversion will write, as plain data: tensors, where their rows come from, and what they become."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qwen2_converters.target import Target
from qwen2_local.formats.config import Qwen2Config


@dataclass(frozen=True, slots=True)
class Rows:
    """`count` rows of the checkpoint's tensor `source`, from row `first` on; rows of zeros where that is None. A vector is one row.

    Rows of the source that are shorter than the planned tensor's end in zeros.
    """

    source: str | None
    first: int
    count: int


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor of the output file. type: as the format calls it ("Q4_0"; "BF16", "U32"). shape: the row's length last."""

    name: str
    type: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One matrix or vector. rows: where it comes from, in order; of stacked experts, none spans two.

    parts: what is written, one; or weight, scales and biases for MLX.
    """

    shape: tuple[int, ...]
    rows: tuple[Rows, ...]
    parts: tuple[Part, ...]

    @property
    def row_count(self) -> int:
        """Rows in all, those of stacked experts together."""
        return math.prod(self.shape[:-1])

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts)


@dataclass(frozen=True, slots=True)
class Plan:
    """All that will be written.

    config: of the model as written, which differs from the checkpoint's where its FFN is padded or its context stretched.
    nbytes: of all tensors. disk: bytes to have free, headers and companion files included.
    """

    target: Target
    config: Qwen2Config
    tensors: tuple[PlannedTensor, ...]
    nbytes: int
    disk: int

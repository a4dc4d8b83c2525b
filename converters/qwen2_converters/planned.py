"""What a conversion will write, as plain data: tensors, where their rows come from, and what they become."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qwen2_converters.target import Target


@dataclass(frozen=True, slots=True)
class Rows:
    """`count` rows of the checkpoint's tensor `source`, from row `first` on. A vector is one row."""

    source: str
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
    """One matrix or vector. rows: where it comes from, in order. parts: what is written, one; or weight, scales and biases for MLX."""

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
    """All that will be written. nbytes: of all tensors. disk: bytes to have free, headers and companion files included."""

    target: Target
    tensors: tuple[PlannedTensor, ...]
    nbytes: int
    disk: int

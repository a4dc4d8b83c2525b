"""How an output is written: its files, where each tensor goes in them, and how a block of rows is encoded. `blocks` does the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from qwen2_converters.planned import Plan, PlannedTensor

Buffer: TypeAlias = "npt.NDArray[np.uint8]"


@dataclass(frozen=True, slots=True)
class Block:
    """Some whole rows of one tensor, from row `first` of the output on. file, dtype: where they come from and what they are, F32 after a merge."""

    tensor: PlannedTensor
    first: int
    rows: int
    file: Path
    dtype: str


Encode: TypeAlias = Callable[[Block, Buffer], list[Buffer]]
"""From a block and its bytes in the checkpoint, which it must not change, to its bytes in each part of the output. Raises BadFile.

Called from many threads at once."""


@dataclass(frozen=True, slots=True)
class WeightFile:
    """A file of tensors in an output. name: in the output's folder. header: its first bytes. offsets: of each part. size: in bytes, of all."""

    name: str
    header: bytes
    offsets: dict[str, int]
    size: int


@dataclass(frozen=True, slots=True)
class Job:
    """How to write one output. weights: how many a block may have; one row at least.

    finish: writes what lies beside the weights into the folder, over what is there. Called when all tensors are in their places.
    """

    plan: Plan
    files: tuple[WeightFile, ...]
    encode: Encode
    weights: int
    finish: Callable[[Path], None]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a part of an output lies: an open file, and the offset in it in bytes."""

    handle: int
    offset: int


class Ledger(Protocol):
    """Remembers which pieces of an output are written. A piece is one `Rows` of the plan; they are counted in its order."""

    @property
    def finished(self) -> frozenset[int]:
        """Those that an earlier run has finished."""

    def note(self, piece: int, nbytes: int) -> None:
        """A piece is written, `nbytes` of the output."""

    def sync(self) -> None:
        """Returns when all that was noted will survive a crash."""


@dataclass(frozen=True, slots=True)
class Output:
    """A job under way. places: of each part, by name."""

    job: Job
    places: dict[str, Place]
    ledger: Ledger

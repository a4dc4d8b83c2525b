"""What a pull tells while it is carried out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Step:
    """How far a pull is, in bytes. name: the file, or the model that is converted; done, total: of the phase."""

    phase: Literal["fetching", "verifying", "checking", "converting", "publishing", "hashing"]
    name: str
    done: int
    total: int
    file_done: int = 0
    file_total: int = 0


OnProgress = Callable[[Step], None]

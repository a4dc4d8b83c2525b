"""A checkpoint whose weights are still on their way: what a conversion asks of whoever fetches them."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol


class Arrivals(Protocol):
    """Fetches the shards of a checkpoint while it is converted, in the order of their names.

    A shard that is not there yet is a stub from the start: a file of the final size with the final header, and holes instead of weights.
    So the checkpoint can be checked and planned at once. A shard is told as consumed once nothing of it is needed any more, even after a
    crash; it may then be a stub again. Both methods are called on the thread that converts.
    """

    @property
    def identity(self) -> str:
        """Says which bytes will have arrived in the end: a hub id and its commit, say. A conversion is only resumed from the same."""

    def wait(self, file: Path) -> None:
        """Returns when the shard `file` is whole and verified. Raises what keeps it from being so; the work done so far is then kept."""

    def consumed(self, file: Path) -> None:
        """The shard `file` is not needed any more. Told without `wait`, and before the first one, if an earlier run has finished with it."""

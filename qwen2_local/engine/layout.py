"""Which KV layout the requests at hand need. Pure: numbers in, a layout out.

One request at a time gets one long sequence, where forks and exports are cheap; several get sequences side by side, each as long as the
longest of them needs, as many as the memory holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qwen2_local.backends.base import Layout

_ROUND = 256


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a layout may be.

    tokens: of all sequences together, at most. context, yarn_context: of one sequence, at most. usual: tokens that a single sequence has
    room for where nothing asks for more. parallel: sequences at most.
    """

    tokens: int
    context: int
    yarn_context: int
    usual: int
    parallel: int

    def single(self, need: int, *, yarn: bool = False) -> Layout:
        """For one request alone."""
        most = self.yarn_context if yarn else self.context
        return Layout(1, min(most, max(_round(need), 0 if yarn else self.usual)), yarn)

    def several(self, needs: Sequence[int], at_least: int) -> Layout | None:
        """For the first n of these requests: as many as go, `at_least` so many; None where those do not fit side by side.

        There is room for as many sequences as memory allows at that length: others will come.
        """
        for count in range(min(self.parallel, len(needs)), max(at_least, 2) - 1, -1):
            context = min(self.context, _round(max(needs[:count])))
            if count * context <= self.tokens:
                sequences = min(self.parallel, self.tokens // context)
                return Layout(sequences, min(self.context, self.tokens // sequences))
        return None


def _round(tokens: int) -> int:
    return -(-tokens // _ROUND) * _ROUND

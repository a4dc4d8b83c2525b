"""A score under way: how likely each token of a text is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qwen2_local.backends.base import Row, RowResult, Scores
from qwen2_local.engine.reply import Mailbox
from qwen2_local.engine.work import Work
from qwen2_local.errors import Cancelled


class Scoring(Work):
    """All tokens of a text but the first, each scored as the one after those before it."""

    kept = False

    def __init__(self, tokens: Sequence[int], limit: int, mailbox: Mailbox[Scores], *, yarn: bool) -> None:
        """tokens: at least 2. limit: ids from here on are out of the distribution."""
        super().__init__(list(tokens[:-1]), mailbox)
        self.yarn = yarn
        self._targets = tokens[1:]
        self._limit = limit
        self._done = Scores(np.empty(0, np.float64), np.empty(0, np.bool_))

    @property
    def need(self) -> int:
        """All tokens that are computed."""
        return len(self.tokens)

    @property
    def reusable(self) -> int:
        """Those that are scored: of all others the logits are wanted."""
        return len(self._done.logprobs)

    def placed(self) -> None:
        """What has to be computed again is scored again."""
        super().placed()
        done = self.sequence.length
        self._done = Scores(self._done.logprobs[:done], self._done.greedy[:done])

    def row(self, count: int, drafts: Sequence[int]) -> Row:
        """The next tokens, and which came after each."""
        start = self.sequence.length
        return Row(self.sequence.number, self.tokens[start : start + count], targets=self._targets[start : start + count], limit=self._limit)

    def take(self, result: RowResult, drafts: Sequence[int]) -> bool:
        """Scores of one more slice."""
        new = result.scores
        assert new is not None
        self._done = Scores(np.concatenate((self._done.logprobs, new.logprobs)), np.concatenate((self._done.greedy, new.greedy)))
        return self.pending == 0

    def finish(self, chunks: tuple[str, ...]) -> None:
        """The scores of all."""
        self.mailbox.put(self._done)

    def stop(self, chunks: tuple[str, ...]) -> None:
        """There is no score of a part."""
        self.mailbox.put(Cancelled("Stopped."))

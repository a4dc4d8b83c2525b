"""A score under way: how likely the tokens of a text are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qwen2_local.backends.base import Row, RowResult, Scores
from qwen2_local.engine.reply import Mailbox
from qwen2_local.engine.work import Work
from qwen2_local.errors import Cancelled


class Scoring(Work):
    """The tokens of a text from number `first` on, each scored as the one after those before it."""

    kept = False

    def __init__(self, tokens: Sequence[int], limit: int, mailbox: Mailbox[Scores], *, first: int, yarn: bool) -> None:
        """tokens: at least 2. limit: ids from here on are out of the distribution. first: at least 1, and below their number."""
        super().__init__(list(tokens[:-1]), mailbox)
        self.yarn = yarn
        self._targets = tokens[1:]
        self._limit = limit
        self._unscored = first - 1
        """So many tokens are only read."""
        self._done = Scores(np.empty(0, np.float64), np.empty(0, np.bool_))

    @property
    def need(self) -> int:
        """All tokens that are computed."""
        return len(self.tokens)

    @property
    def reusable(self) -> int:
        """Those that are only read, and those that are scored: of all others the logits are wanted."""
        return self._unscored + len(self._done.logprobs)

    def placed(self) -> None:
        """What has to be computed again is scored again."""
        super().placed()
        done = max(0, self.sequence.length - self._unscored)
        self._done = Scores(self._done.logprobs[:done], self._done.greedy[:done])

    def row(self, count: int, drafts: Sequence[int]) -> Row:
        """The next tokens, and which came after each, where that is wanted of any."""
        start = self.sequence.length
        stop = start + count
        targets = self._targets[start:stop] if stop > self._unscored else ()
        return Row(self.sequence.number, self.tokens[start:stop], targets=targets, limit=self._limit)

    def take(self, result: RowResult, drafts: Sequence[int]) -> bool:
        """Scores of one more slice."""
        if (new := result.scores) is not None:
            # What came before them in the slice was only read.
            wanted = slice(-(self.sequence.length - self.reusable), None)
            self._done = Scores(np.concatenate((self._done.logprobs, new.logprobs[wanted])), np.concatenate((self._done.greedy, new.greedy[wanted])))
        return self.pending == 0

    def finish(self, chunks: tuple[str, ...]) -> None:
        """The scores of all that were wanted."""
        self.mailbox.put(self._done)

    def stop(self, chunks: tuple[str, ...]) -> None:
        """There is no score of a part."""
        self.mailbox.put(Cancelled("Stopped."))

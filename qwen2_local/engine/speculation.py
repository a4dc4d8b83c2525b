"""Drafts of the next tokens, and whether they pay.

Drafted tokens are computed together with the last one, in a single step; those that equal what would have been chosen anyway stay, so a reply is
the same with and without (Leviathan et al., 2023). A step with drafts takes longer than one without: what they cost and what they bring is
measured, and where they do not pay there are none.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol

from qwen2_local.backends.base import Backend, Choice, Layout, Row
from qwen2_local.engine.common import common
from qwen2_local.errors import DoesNotFit

_SLICE = 64
"""Tokens that a draft model reads at once: a cancel waits for it."""

_log = logging.getLogger("qwen2_local.engine")


class Drafter(Protocol):
    """Something that guesses how a text goes on."""

    def propose(self, tokens: Sequence[int], length: int, most: int) -> Sequence[int]:
        """About `length` tokens that may follow, at most `most`; none where it has no idea. `tokens` only grows from call to call, for one text."""
        ...


class Lookup:
    """Guesses that a run of tokens goes on as it did the last time it occurred in the same text (prompt lookup: Saxena, 2023)."""

    _RUN = 5
    """Shorter ones come again by chance too often: where steps with drafts are dear, each try in vain is felt."""

    _SURE = 8
    """Of so many it is nearly always a copy, which goes on: a step with many drafts costs little more than one with few."""

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}
        self._indexed = self._RUN

    def propose(self, tokens: Sequence[int], length: int, most: int) -> Sequence[int]:
        """What followed the last tokens when they came before: `length` of them, or after a longer run as many as may be."""
        run, after = self._RUN, self._after
        for end in range(self._indexed, len(tokens)):
            after[tuple(tokens[end - run : end])] = end
        self._indexed = max(self._indexed, len(tokens))
        start = after.get(tuple(tokens[-run:]))
        if start is None:
            return ()
        sure = start >= self._SURE and tokens[start - self._SURE : start] == tokens[-self._SURE :]
        return tokens[start : start + (most if sure else min(length, most))]


class DraftModel:
    """A smaller model of the same vocabulary, with a sequence of its own. On the engine's owner thread."""

    def __init__(self, backend: Backend, vocabulary: int) -> None:
        """vocabulary: ids below it mean the same to both."""
        self._backend: Backend | None = backend
        self._choice = Choice(min(vocabulary, backend.info.vocabulary))
        self._limit = self._choice.limit
        self._sequence = backend.open()
        self._longest = backend.info.context
        self._known: list[int] = []
        """What is in its KV."""

    def propose(self, tokens: Sequence[int], length: int, most: int) -> Sequence[int]:
        """Its own greedy reply. It reads a long text slice by slice, one per call, and proposes nothing until it has caught up."""
        backend, most = self._backend, min(length, most)
        if backend is None:
            return ()
        if len(tokens) + most > backend.layout.context < self._longest:
            self._grow(backend, len(tokens) + most)
        most = min(most, backend.layout.context - len(tokens))
        if most < 1:
            return ()
        known = common(self._known, tokens[: len(tokens) - 1])
        if known < len(self._known):
            backend.trim(self._sequence, known)
            del self._known[known:]
        behind = list(tokens[known : known + min(_SLICE, backend.step_tokens)])
        if max(behind) >= self._limit:
            return ()
        if known + len(behind) < len(tokens):
            self._step(backend, behind, ())
            return ()
        drafts = [self._step(backend, behind, (self._choice,))]
        while len(drafts) < most:
            drafts.append(self._step(backend, drafts[-1:], (self._choice,)))
        return drafts

    def close(self) -> None:
        """Give the model back; from then on it proposes nothing."""
        backend, self._backend = self._backend, None
        if backend is not None:
            backend.close()

    def _grow(self, backend: Backend, need: int) -> None:
        """Room for a longer text, which is read anew; where there is no memory for it, the room that there was."""
        try:
            backend.arrange(Layout(1, min(self._longest, max(need, 2 * backend.layout.context))))
        except DoesNotFit:
            self._longest = backend.layout.context
        self._sequence = backend.open()
        self._known.clear()

    def _step(self, backend: Backend, tokens: list[int], choose: Sequence[Choice]) -> int:
        (result,) = backend.step([Row(self._sequence, tokens, choose)])
        self._known += tokens
        return result.chosen[0].token if choose else -1


class Payoff:
    """Are the drafts of one drafter worth it? In units of a step without any."""

    MOST = 16
    """Tokens of a draft."""

    _FIRST = 4
    _PAUSE, _LONGEST_PAUSE = 16, 512

    def __init__(self) -> None:
        self.length = self._FIRST
        """Tokens to draft next."""
        self._balance = 0.0
        self._pause = self._PAUSE
        self._off_for = 0

    def wanted(self) -> bool:
        """Is it time to draft? Asked once for each step."""
        self._off_for -= self._off_for > 0
        return not self._off_for

    def took(self, drafted: int, stood: int, cost: float) -> None:
        """A step with drafts is over: how many stood, and its time over that of a step without."""
        self.length = min(4 * drafted, self.MOST) if stood == drafted else stood + 1
        self._balance = 0.7 * self._balance + (1 + stood - cost)
        if self._balance < -1:
            self._off_for, self._pause = self._pause, min(2 * self._pause, self._LONGEST_PAUSE)
            self._balance, self.length = 0.0, self._FIRST
        elif self._balance > 1:
            self._pause = self._PAUSE


class Speculation:
    """That of one request. drafted, accepted: tokens so far."""

    def __init__(self, drafters: Sequence[tuple[Drafter, Payoff]]) -> None:
        """drafters: the first that is wanted and proposes something is taken."""
        self._drafters = drafters
        self.drafted = self.accepted = 0

    def propose(self, tokens: Sequence[int], most: int) -> tuple[Sequence[int], Payoff | None]:
        """At most `most` drafted tokens, fewer or none where they do not pay; and whose payoff it is if they do."""
        for drafter, payoff in self._drafters:
            if payoff.wanted() and (drafts := drafter.propose(tokens, payoff.length, min(most, Payoff.MOST))):
                return drafts, payoff
        return (), None


class Speculator:
    """Speculation for an engine: its draft model, what that has paid so far, and how long a step takes without drafts."""

    def __init__(self, draft: DraftModel | None) -> None:
        self._draft = draft
        # Kept from request to request: a model that guesses badly does so in the next one, too. Whether a text repeats itself is its own affair.
        self._draft_payoff = Payoff()
        self._payoff: Payoff | None = None
        """Of the drafts that are being computed."""
        self._plain_s = 0.0
        self._plain_known = 0
        self._proposing_s = 0.0

    def begin(self, *, lookup: bool) -> Speculation | None:
        """For a new request; None where nothing drafts."""
        drafters: list[tuple[Drafter, Payoff]] = []
        if lookup:
            drafters.append((Lookup(), Payoff()))
        if self._draft is not None:
            drafters.append((self._draft, self._draft_payoff))
        return Speculation(drafters) if drafters else None

    def drafts(self, speculation: Speculation, tokens: Sequence[int], most: int) -> Sequence[int]:
        """Tokens to compute behind the last one. A draft model that fails is given up, and its request goes on without."""
        if most < 1 or self._plain_known < 2:
            return ()
        started = time.perf_counter()
        try:
            drafts, self._payoff = speculation.propose(tokens, most)
            return drafts
        except Exception:
            _log.exception("The draft model failed; replies go on without it.")
            self.close()
            return ()
        finally:
            self._proposing_s = time.perf_counter() - started

    def took(self, speculation: Speculation, drafted: int, stood: int, seconds: float) -> None:
        """A step for one who decodes alone is over."""
        if not drafted or self._payoff is None:
            self._plain_s = (3 * self._plain_s + seconds) / 4 if self._plain_known else seconds
            self._plain_known += 1
            return
        speculation.drafted += drafted
        speculation.accepted += stood
        # What is far beyond its tokens one by one may be the work of others on a busy machine: once it is forgiven, twice in a row it is not.
        step, proposing = min(seconds / self._plain_s, 1.9 + drafted), min(self._proposing_s / self._plain_s, drafted)
        self._payoff.took(drafted, stood, step + proposing)

    def close(self) -> None:
        """Give the draft model back."""
        draft, self._draft = self._draft, None
        if draft is not None:
            with suppress(Exception):
                draft.close()

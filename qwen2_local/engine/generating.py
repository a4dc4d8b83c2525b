"""A reply under way: how each token is chosen, and what its caller hears of it."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence

import numpy as np

from qwen2_local.backends.base import Choice, Chosen, Mask, Row, RowResult
from qwen2_local.engine.events import Event, Finished, Prefilled, Request, Token
from qwen2_local.engine.reply import Mailbox
from qwen2_local.engine.work import Work
from qwen2_local.sampling import Window, uniform
from qwen2_local.types import FinishReason

_GUESS = 512
"""Tokens of a reply that room is made for at first; it grows when there are more."""


class Generation(Work):
    """A `Request` under way."""

    def __init__(self, request: Request, mailbox: Mailbox[Event], room: int, *, yarn: bool) -> None:
        """room: tokens that the context leaves for the reply, at least 1."""
        super().__init__(list(request.prompt), mailbox)
        self.yarn, self.persist = yarn, request.persist
        self._request = request
        self._prompt = len(request.prompt)
        self._most = room if request.max_tokens is None else min(room, request.max_tokens)
        self._full: FinishReason = "context" if self._most == room else "length"
        self._reason: FinishReason | None = None
        self._cached: int | None = None
        self._first = 0.0
        s = request.sampling
        self._seed = s.seed if s.seed is not None else secrets.randbits(64)
        self._window = Window(request.prompt, s)
        self._constraint = request.constraint
        self._mask_error: Exception | None = None
        counts = s.repetition_penalty != 1.0 or s.presence_penalty or s.frequency_penalty
        # Where it is the same for every token.
        self._fixed = None if s.temperature > 0 or counts or request.constraint else self._choice(0)

    @property
    def need(self) -> int:
        """Room for what is known, and for half as much again of a reply whose length is not."""
        return len(self.tokens) + min(self.left, max(_GUESS, len(self.tokens) // 2))

    @property
    def reusable(self) -> int:
        """All but the last, which is computed in any case: its logits are wanted."""
        return len(self.tokens) - 1

    @property
    def left(self) -> int:
        """How many tokens of the reply may still come."""
        return self._most - (len(self.tokens) - self._prompt)

    @property
    def most_drafts(self) -> int:
        """None before the first token of the reply, and none behind the last."""
        return self.left - 1 if len(self.tokens) > self._prompt else 0

    def drafts(self, drafts: Sequence[int]) -> Sequence[int]:
        """Up to the first that ends the reply or cannot be chosen."""
        request = self._request
        count = 0
        for draft in drafts:
            if draft in request.stops or draft >= request.limit:
                break
            count += 1
        if count and self._constraint is not None:
            count = min(count, self._constraint.allowed(drafts[:count]))
        return drafts[:count]

    def placed(self) -> None:
        """The first time, its caller hears how much of the prompt is known."""
        super().placed()
        if self._cached is None:
            self._cached = self.sequence.length
            self._tell_progress()

    def row(self, count: int, drafts: Sequence[int]) -> Row:
        """With choices where it reaches the end of what is known."""
        held = self.sequence
        if count == 1 and not drafts and held.length == len(self.tokens) - 1:  # as nearly always
            return Row(held.number, (self.tokens[-1],), self._choices(drafts))
        stop = held.length + count
        tokens = self.tokens[held.length : stop]
        tokens.extend(drafts)
        return Row(held.number, tokens, self._choices(drafts) if stop == len(self.tokens) else ())

    def take(self, result: RowResult, drafts: Sequence[int]) -> bool:
        """Tokens go to the caller as far as drafts were right, and one beyond."""
        if self._mask_error is not None:
            raise self._mask_error
        if len(self.tokens) == self._prompt:
            self._tell_progress()
        for index, chosen in enumerate(result.chosen):
            self._reason = self._add(chosen)
            if self._reason is not None:
                return True
            if index == len(drafts) or drafts[index] != chosen.token:
                return False
        return False

    def finish(self, chunks: tuple[str, ...]) -> None:
        """Why it ended was told by `take`."""
        assert self._reason is not None
        self._end(self._reason, chunks)

    def stop(self, chunks: tuple[str, ...]) -> None:
        """What came until now stands."""
        self._end("cancelled", chunks)

    def _tell_progress(self) -> None:
        assert self._cached is not None
        self.mailbox.put(Prefilled(self.sequence.length, self._prompt, self._cached))

    def _end(self, reason: FinishReason, chunks: tuple[str, ...]) -> None:
        now = time.perf_counter()
        first = self._first or now
        began = self.began or now
        drafted, accepted = (self.speculation.drafted, self.speculation.accepted) if self.speculation else (0, 0)
        self.mailbox.end(Finished(reason, first - began, now - first, drafted, accepted, chunks))

    def _add(self, chosen: Chosen) -> FinishReason | None:
        """One more token. Why it is the last, or the one before was."""
        token = chosen.token
        self._first = self._first or time.perf_counter()
        if token in self._request.stops:
            return "stop"
        self.mailbox.put(Token(token, chosen.logprob, chosen.top))
        self.tokens.append(token)
        if self._fixed is None:
            self._window.add(token)
            if self._constraint is not None:
                self._constraint.accept(token)
                if self._constraint.ended:
                    return "stop"
        return None if self.left else self._full

    def _choices(self, drafts: Sequence[int]) -> tuple[Choice, ...]:
        """How to choose the next token, and the one behind each draft."""
        if self._fixed is not None:
            return (self._fixed,) * (1 + len(drafts))
        position = len(self.tokens)
        choices = [self._choice(position, ahead=bool(drafts))]
        for draft in drafts:
            position += 1
            self._window.add(draft)
            if self._constraint is not None:
                self._constraint.accept(draft)
            choices.append(self._choice(position, ahead=True))
        if drafts:
            self._window.drop(len(drafts))
            if self._constraint is not None:
                self._constraint.rollback(len(drafts))
        return tuple(choices)

    def _choice(self, position: int, *, ahead: bool = False) -> Choice:
        """ahead: the constraint moves on before the mask is wanted."""
        request = self._request
        number = uniform(self._seed, position) if request.sampling.temperature > 0 else 0.0
        mask = None
        if self._constraint is not None:
            mask = self._mask
            if ahead:
                now = mask()
                mask = lambda: now  # noqa: E731
        return self._window.choice(request.limit, number, mask=mask, top_logprobs=request.logprobs)

    def _mask(self) -> Mask:
        """The constraint's. Its errors wait for `take`: raised here, within a step, they would end all who are in it."""
        assert self._constraint is not None
        try:
            return self._constraint.mask()
        except Exception as error:
            self._mask_error = error
            return np.full(-(-self._request.limit // 32), 0xFFFFFFFF, np.uint32)

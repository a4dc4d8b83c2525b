"""A backend without a model, for tests of the engine: what comes next is a function of the tokens in its KV, so wrong KV shows in the reply.

It writes down what it was told, checks that it is used from one thread and as the Protocol says, and waits or fails on demand.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Callable, Sequence

import numpy as np

from qwen2_local.backends.base import BackendInfo, Choice, Chosen, Chunk, Layout, Row, RowResult, Scores
from qwen2_local.errors import BackendError, Cancelled
from qwen2_local.sampling import choose

VOCABULARY = 1000

Rule = Callable[[Sequence[int]], int]


def counting(tokens: Sequence[int]) -> int:
    """The token after `n` is `n + 1`."""
    return tokens[-1] + 1


def scrambled(tokens: Sequence[int]) -> int:
    """Any token, by all tokens before it."""
    return int.from_bytes(hashlib.sha256(np.asarray(tokens, np.int32).tobytes()).digest()[:4], "little") % VOCABULARY


def noise(tokens: Sequence[int]) -> np.ndarray:
    """Logits [VOCABULARY] of any shape, by the last four tokens; four of them stand out, so that runs come again."""
    seed = int.from_bytes(hashlib.sha256(np.asarray(tokens[-4:], np.int32).tobytes()).digest()[:8], "little")
    logits = np.random.default_rng(seed).standard_normal(VOCABULARY).astype(np.float32)
    logits[[(tokens[-1] * 7 + n) % VOCABULARY for n in range(4)]] += 6
    return logits


class Scripted:
    """rule: the next token, where all that is asked for is the likeliest. logits: instead, what to sample from, as a model does."""

    def __init__(
        self,
        *,
        context: int = 256,
        step_tokens: int = 32,
        yarn_context: int = 0,
        usual: int | None = None,
        rule: Rule = counting,
        logits: Callable[[Sequence[int]], np.ndarray] | None = None,
        most_tokens: int | None = None,
        vocabulary: int = VOCABULARY,
    ) -> None:
        """usual: the context it begins with. most_tokens: a layout of more in all does not fit."""
        self.info = BackendInfo("scripted", "1", "qwen2", context, vocabulary, 1, 1, yarn_context)
        self.layout = Layout(1, usual or context)
        self.step_tokens = step_tokens
        self.rule = rule
        self.logits = logits
        self.most_tokens = most_tokens
        self.sequences: dict[int, list[int]] = {}
        self.steps: list[tuple[int, tuple[int, ...]]] = []
        """Of every row that was begun: tokens already there, tokens that came."""
        self.batches: list[int] = []
        """Of every step that was begun: how many rows."""
        self.choices: list[Choice | None] = []
        """Of every row: how its last token's successor was to be chosen."""
        self.trims: list[int] = []
        self.forks: list[int] = []
        self.exported: list[tuple[int, int]] = []
        self.imported: list[int] = []
        self.layouts: list[Layout] = []
        self.opened = 0
        self.closed = 0
        self.fail: dict[int, BaseException] = {}
        """By number of the step: what it raises."""
        self.faulty: dict[int, BaseException] = {}
        """By token: what a step raises that is to append it."""
        self.can_export = True
        self.hold_from: int | None = None
        """Steps from this number on wait for `go`, or for a cancel."""
        self.held = threading.Semaphore(0)
        """Released once for each step that begins to wait."""
        self.go = threading.Semaphore(0)
        self._cancelled = threading.Event()
        self._thread = threading.get_ident()

    @property
    def fingerprint(self) -> str:
        """Depends on what changes the numbers."""
        return f"{'ab' if self.layout.yarn else 'aa'}{self.info.vocabulary:04x}"

    def arrange(self, layout: Layout) -> None:
        """Forget everything."""
        self._check()
        from qwen2_local.errors import DoesNotFit

        self.sequences.clear()
        assert layout.sequences >= 1
        assert layout.context <= (self.info.yarn_context if layout.yarn else self.info.context)
        if self.most_tokens is not None and layout.sequences * layout.context > self.most_tokens:
            raise DoesNotFit("Too many tokens.")
        self.layout = layout
        self.layouts.append(layout)

    def open(self) -> int:
        """The lowest number that is free is not reused, so that tests see who is who."""
        self._check()
        if len(self.sequences) >= self.layout.sequences:
            raise BackendError("All sequences are in use.")
        number, self.opened = self.opened, self.opened + 1
        self.sequences[number] = []
        return number

    def step(self, rows: Sequence[Row]) -> list[RowResult]:
        """One batch. Where it fails, everything is as before."""
        self._check()
        lengths = {row.sequence: len(self.sequences[row.sequence]) for row in rows}
        try:
            return self._step(rows)
        except BaseException:
            for row in rows:
                del self.sequences[row.sequence][lengths[row.sequence] :]
            raise
        finally:
            self._cancelled.clear()

    def _step(self, rows: Sequence[Row]) -> list[RowResult]:
        number = len(self.batches)
        self.batches.append(len(rows))
        assert 0 < sum(len(row.tokens) for row in rows) <= self.step_tokens
        assert len({row.sequence for row in rows}) == len(rows)
        for row in rows:
            present = self.sequences[row.sequence]
            self.steps.append((len(present), tuple(row.tokens)))
            self.choices.append(row.choose[-1] if row.choose else None)
            assert row.tokens
            assert len(row.choose) <= len(row.tokens)
            assert len(present) + len(row.tokens) <= self.layout.context
        if number in self.fail:
            raise self.fail[number]
        for row in rows:
            for token in row.tokens:
                if token in self.faulty:
                    raise self.faulty[token]
        if self._cancelled.is_set():
            raise Cancelled("Stopped.")
        if self.hold_from is not None and number >= self.hold_from:
            self.held.release()
            while not self.go.acquire(timeout=0.005):
                if self._cancelled.is_set():
                    raise Cancelled("Stopped.")
        return [self._row(row) for row in rows]

    def _row(self, row: Row) -> RowResult:
        present = self.sequences[row.sequence]
        before = len(present)
        present.extend(row.tokens)
        first = len(present) - len(row.choose)
        chosen = tuple(self._choose(present[: first + index + 1], choice) for index, choice in enumerate(row.choose))
        if not row.targets:
            return RowResult(chosen)
        expected = [self.rule(present[: before + index + 1]) for index in range(len(row.tokens))]
        greedy = np.array([target == one for target, one in zip(row.targets, expected, strict=True)])
        return RowResult(chosen, Scores(np.where(greedy, math.log(0.5), -10.0 - np.asarray(row.tokens)), greedy))

    def _choose(self, tokens: list[int], choice: Choice) -> Chosen:
        if self.logits is not None:
            return choose(self.logits(tokens), choice)
        return Chosen(self.rule(tokens) % choice.limit)

    def fork(self, sequence: int, length: int) -> int:
        """A copy of a start."""
        start = self.sequences[sequence][:length]
        assert len(start) == length
        self.forks.append(length)
        number = self.open()
        self.sequences[number] = start
        return number

    def trim(self, sequence: int, length: int) -> None:
        """Cut."""
        self._check()
        assert 0 <= length <= len(self.sequences[sequence])
        self.trims.append(length)
        del self.sequences[sequence][length:]

    def free(self, sequence: int) -> None:
        """Give back."""
        self._check()
        del self.sequences[sequence]

    def export_kv(self, sequence: int, ranges: Sequence[tuple[int, int]]) -> list[Chunk]:
        """Each chunk holds all tokens up to its end, as KV does in its way."""
        self._check()
        if not self.can_export:
            raise BackendError("KV cannot be exported.")
        present = self.sequences[sequence]
        chunks = []
        for start, end in ranges:
            assert 0 <= start < end <= len(present)
            self.exported.append((start, end))
            chunks.append(Chunk(end - start, json.dumps([self.fingerprint, start, present[:end]]).encode()))
        return chunks

    def import_kv(self, sequence: int, chunks: Sequence[Chunk]) -> None:
        """Only behind the same tokens, under the same fingerprint."""
        self._check()
        present = list(self.sequences[sequence])
        for chunk in chunks:
            try:
                fingerprint, start, tokens = json.loads(bytes(chunk.data))
            except ValueError:
                raise BackendError("No KV of mine.") from None
            assert fingerprint == self.fingerprint
            assert start == len(present)
            assert tokens[:start] == present, "KV of other tokens"
            assert len(tokens) == start + chunk.tokens
            assert len(tokens) <= self.layout.context
            present = tokens
            self.imported.append(chunk.tokens)
        self.sequences[sequence] = present

    def cancel(self) -> None:
        """From any thread."""
        self._cancelled.set()

    def close(self) -> None:
        """Once."""
        self._check()
        self.closed += 1

    def _check(self) -> None:
        assert threading.get_ident() == self._thread, "used from another thread than the one that made it"
        assert not self.closed

"""A thousand random things done to sequences: each still holds exactly the tokens it should."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import numpy as np
import pytest

from qwen2_local.backends.base import Chunk, Layout, Row
from qwen2_local.backends.llamacpp import LlamaCpp
from qwen2_local.errors import BackendError, ContextOverflow
from tests.support import tiny

CLOSE = 4e-2
"""Other batches round otherwise, in a KV cache of 16 bits; the logits spread by about 4, and those of other tokens differ by more than 1."""
LIMIT = 60


class Walk:
    """A backend, and what should be in it."""

    def __init__(self, backend: LlamaCpp, seed: int) -> None:
        self.backend, self.chance = backend, random.Random(seed)
        self.texts: dict[int, list[int]] = {}
        self.chunks: dict[tuple[int, ...], list[Chunk]] = {}

    def any(self) -> int:
        return self.chance.choice(list(self.texts))

    def open(self) -> None:
        if len(self.texts) < self.backend.layout.sequences:
            self.texts[self.backend.open()] = []
        else:
            with pytest.raises(BackendError, match="in use"):
                self.backend.open()

    def free(self) -> None:
        sequence = self.any()
        self.backend.free(sequence)
        del self.texts[sequence]

    def step(self, most: int = 12) -> None:
        chosen = self.chance.sample(list(self.texts), self.chance.randint(1, len(self.texts)))
        rows = [Row(one, [self.chance.randrange(tiny.VOCABULARY) for _ in range(self.chance.randint(1, most))]) for one in chosen]
        if any(len(self.texts[row.sequence]) + len(row.tokens) > LIMIT for row in rows):
            with pytest.raises(ContextOverflow):
                self.backend.step(rows)
            return
        self.backend.step(rows)
        for row in rows:
            self.texts[row.sequence] += row.tokens

    def decode(self) -> None:
        self.step(1)

    def fail(self) -> None:
        rows = [Row(self.any(), [1, 2, tiny.VOCABULARY])]
        with pytest.raises((BackendError, ContextOverflow)):
            self.backend.step(rows)

    def trim(self) -> None:
        sequence = self.any()
        length = self.chance.randint(0, len(self.texts[sequence]))
        self.backend.trim(sequence, length)
        del self.texts[sequence][length:]

    def fork(self) -> None:
        sequence = self.any()
        length = self.chance.randint(0, len(self.texts[sequence]))
        if len(self.texts) < self.backend.layout.sequences:
            self.texts[self.backend.fork(sequence, length)] = self.texts[sequence][:length]

    def export(self) -> None:
        sequence = self.any()
        text = self.texts[sequence]
        marks = sorted({0, len(text), *(self.chance.randint(0, len(text)) for _ in range(2))})
        self.chunks[tuple(text)] = self.backend.export_kv(sequence, list(itertools.pairwise(marks)))

    def put_in(self) -> None:
        if not self.chunks:
            return
        whole = self.chance.choice(list(self.chunks))
        sequence = self.any()
        at = 0
        self.backend.trim(sequence, 0)
        self.texts[sequence] = []
        for chunk in self.chunks[whole]:
            self.backend.import_kv(sequence, [chunk])
            at += chunk.tokens
            self.texts[sequence] = list(whole[:at])

    def arrange(self) -> None:
        if self.chance.random() < 0.2:
            self.backend.arrange(Layout(self.chance.choice([1, 1, 2, 5]), LIMIT))
            self.texts = {}

    def check(self) -> None:
        """Another token after each: the logits are those of a fresh computation of its text."""
        texts, self.texts = {sequence: text for sequence, text in self.texts.items() if len(text) < LIMIT}, {}
        here = self.backend.step([Row(sequence, [7], logits="last") for sequence in texts]) if texts else []
        self.backend.arrange(self.backend.layout)
        for text, result in zip(texts.values(), here, strict=True):
            fresh = self.backend.open()
            np.testing.assert_allclose(result.logits, self.backend.step([Row(fresh, [*text, 7], logits="last")])[0].logits, atol=CLOSE)
            self.backend.free(fresh)


@pytest.mark.parametrize("sequences", [1, 4])
@pytest.mark.parametrize("seed", range(10))
def test_each_sequence_holds_its_tokens(tiny_gguf: Path, sequences: int, seed: int) -> None:
    backend = LlamaCpp.load(tiny_gguf, layout=Layout(sequences, LIMIT), threads=1)
    walk = Walk(backend, seed)
    for number in range(100):
        if not walk.texts:
            walk.open()
        kinds = (walk.open, walk.free, walk.step, walk.step, walk.decode, walk.fail, walk.trim, walk.fork, walk.export, walk.put_in, walk.arrange)
        walk.chance.choice(kinds)()
        if number % 20 == 19:
            walk.check()
    backend.close()

"""Laws of the KV cache: whatever was saved, deleted or evicted, in any order, what is found is the KV of a true beginning of the prompt."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from qwen2_local.kvcache import CHUNK, KvCache, Sizes, chain, record
from tests.support.kv import PROMPT, known, save

FINGERPRINTS = ("ab" * 32, "cd" * 32)
FILE = record.size_of(chain.links("", PROMPT[:CHUNK])[0], CHUNK * 32)

tokens = st.lists(st.integers(0, 2), max_size=40)
prompts = st.builds(
    lambda length, edit, more: [*PROMPT[:length], *edit, *PROMPT[length + 1 : length + 1 + more]],
    st.sampled_from([0, 1, 15, 16, 17, 100, 255, 256, 257, 300, 511, 512, 700]),
    st.lists(st.integers(0, 2), max_size=3),
    st.sampled_from([0, 1, 20, 255, 256, 300]),
)
"""Prompts that share beginnings of all lengths, on and off the borders."""


def cut(prompt: list[int]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [(tuple(prompt[:start]), tuple(prompt[start : start + CHUNK])) for start in range(0, len(prompt), CHUNK)]


def common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class Conversations(RuleBasedStateMachine):
    """Two caches on one folder, against a plain set: (fingerprint, tokens before a link, its tokens) of all that is stored."""

    @initialize(memory=st.sampled_from([0, 0, 20_000, 10**7]), files=st.sampled_from([1, 3, 10**6, 10**6]))
    def begin(self, memory: int, files: int) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.budget = files * FILE
        path = Path(self.folder.name) / "kv"
        self.caches = [KvCache(path, budget=self.budget, memory=size) for size in (memory, 0)]
        # With little room less is kept than the set says, and memory may keep what another cache has replaced.
        self.exact = files == 10**6 and memory == 0
        self.kept: set[tuple[str, tuple[int, ...], tuple[int, ...]]] = set()
        self.saved: list[tuple[str, list[int]]] = []

    @rule(which=st.integers(0, 1), fingerprint=st.sampled_from(FINGERPRINTS), prompt=prompts)
    def saves(self, which: int, fingerprint: str, prompt: list[int]) -> None:
        cache = self.caches[which]
        assert save(cache, fingerprint, prompt) == cache.names(fingerprint, prompt)
        self.saved.append((fingerprint, prompt))
        for before, link in cut(prompt):
            replaced = {(fingerprint, before, link[:count]) for count in range(1, len(link))}
            self.kept = (self.kept - replaced) | {(fingerprint, before, link)}
        if self.exact:
            assert cache.missing(fingerprint, prompt) == []

    @rule(which=st.integers(0, 1), fingerprint=st.sampled_from(FINGERPRINTS), prompt=prompts)
    def finds(self, which: int, fingerprint: str, prompt: list[int]) -> None:
        found = known(self.caches[which], fingerprint, prompt)
        assert found <= max((common(prompt, other) for owner, other in self.saved if owner == fingerprint), default=0)
        if self.exact:
            assert found == self.expected(fingerprint, prompt)

    @rule(fingerprint=st.sampled_from(FINGERPRINTS), prompt=prompts)
    def deletes(self, fingerprint: str, prompt: list[int]) -> None:
        names = self.caches[0].names(fingerprint, prompt)
        for cache in self.caches:
            cache.delete(names)
        self.kept -= {(fingerprint, before, link) for before, link in cut(prompt)}
        assert not names or len(self.caches[1].missing(fingerprint, prompt)) == len(names)

    @rule()
    def clears(self) -> None:
        for cache in self.caches:
            cache.clear()
            assert cache.sizes() == Sizes(0, 0)
        self.saved, self.kept = [], set()

    @rule(which=st.integers(0, 1))
    def reopens(self, which: int) -> None:
        self.caches[which].close()
        self.caches[which] = KvCache(Path(self.folder.name) / "kv", budget=self.budget, memory=0)

    @invariant()
    def the_budget_is_kept(self) -> None:
        if hasattr(self, "caches"):
            assert self.caches[0].sizes().disk <= self.budget

    def expected(self, fingerprint: str, prompt: list[int]) -> int:
        for before, link in cut(prompt):
            if (fingerprint, before, link) not in self.kept:
                beside = (other for owner, place, other in self.kept if (owner, place) == (fingerprint, before))
                return len(before) + max((common(link, other) for other in beside), default=0)
        return len(prompt)

    def teardown(self) -> None:
        for cache in getattr(self, "caches", []):
            cache.close()
        if hasattr(self, "folder"):
            self.folder.cleanup()


Conversations.TestCase.settings = settings(max_examples=12, stateful_step_count=20, deadline=None)
TestConversations = Conversations.TestCase


@given(a=prompts, b=prompts)
def test_names_are_equal_exactly_as_far_as_tokens_are(a: list[int], b: list[int]) -> None:
    alike = common(a, b)
    ours, theirs = chain.links("f", a), chain.links("f", b)
    for one, other in zip(ours, theirs, strict=False):
        assert (one.name == other.name) == (one.end == other.end <= alike)
    assert all(chain.is_name(one.name) for one in ours)


@given(a=prompts, b=prompts)
def test_a_sketch_never_promises_too_little(a: list[int], b: list[int]) -> None:
    for one, other in zip(chain.links("f", a), chain.links("f", b), strict=False):
        if one.parent == other.parent:
            ((_, most),) = chain.closest([other.name], one)
            assert chain.common(one.packed, other.packed) <= most


@given(prompt=prompts)
@settings(max_examples=20)
def test_beginnings_are_the_names_of_all_shorter_links(prompt: list[int]) -> None:
    for one in chain.links("f", prompt)[-1:]:
        shorter = {chain.links("f", prompt[:end])[-1].name for end in range(one.start + 1, one.end)}
        assert one.beginnings() == shorter


@given(a=tokens, b=tokens)
def test_common_beginnings(a: list[int], b: list[int]) -> None:
    assert chain.common(chain.pack(a), chain.pack(b)) == common(a, b)

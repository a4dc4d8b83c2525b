"""Scores, and replies that are bound to a form."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest

from qwen2_local.engine import Token
from qwen2_local.errors import BackendError, Cancelled, ContextOverflow, UsageError
from qwen2_local.kvcache import KvCache
from tests.support.engines import Harness, cached, end, request, tokens
from tests.support.scripted import VOCABULARY, noise

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def make() -> Iterator[Callable[..., Harness]]:
    made: list[Harness] = []

    def one(**settings) -> Harness:
        made.append(Harness(**{"context": 1024, **settings}))
        return made[-1]

    yield one
    for harness in made:
        harness.backend.go.release(10_000)
        harness.engine.close()


# Scores


def test_each_token_but_the_first_has_a_score(make: Callable[..., Harness]) -> None:
    scores = make().engine.score([1, 2, 3, 9, 10], VOCABULARY)
    assert scores.greedy.tolist() == [True, True, False, True]
    assert scores.logprobs[0] == math.log(0.5)
    assert scores.logprobs[2] == -13.0


def test_a_long_text_is_scored_slice_by_slice(make: Callable[..., Harness]) -> None:
    harness = make(step_tokens=32)
    text = [number % 1000 if number % 7 else 5 for number in range(900)]
    scores = harness.engine.score(text, VOCABULARY)
    assert scores.greedy.tolist() == [text[index + 1] == text[index] + 1 for index in range(899)]
    assert max(len(part) for _, part in harness.backend.steps) == 32


@pytest.mark.parametrize("first", [1, 2, 20, 31, 32, 33, 64, 65, 140, 198, 199])
@pytest.mark.parametrize("known", [0, 10, 64, 120, 200])
def test_what_is_only_read_is_neither_scored_nor_computed_twice(make: Callable[..., Harness], first: int, known: int) -> None:
    text = [number % 1000 if number % 7 else 5 for number in range(200)]
    whole = make(step_tokens=32).engine.score(text, VOCABULARY)
    harness = make(step_tokens=32)
    if known:
        harness.run(*text[:known], max_tokens=1)
    done = len(harness.backend.steps)
    scores = harness.engine.score(text, VOCABULARY, first)
    assert scores.greedy.tolist() == whole.greedy.tolist()[first - 1 :]
    assert scores.logprobs.tolist() == whole.logprobs.tolist()[first - 1 :]
    assert sum(len(part) for _, part in harness.backend.steps[done:]) == 199 - min(first - 1, known)


@pytest.mark.parametrize("first", [1, 310, 321])
def test_a_score_takes_nothing_from_the_conversation_that_it_reads(make: Callable[..., Harness], first: int) -> None:
    cache = KvCache(None)
    harness = make(step_tokens=64, kv=cache, parallel=1)
    said = list(range(320))
    with harness.held():  # so that the score comes right behind the reply, before its KV was saved
        reply = harness.engine.submit(request(*range(300), max_tokens=20))
        harness.backend.held.acquire()
        thread = threading.Thread(target=harness.engine.score, args=([*said, 1, 2, 3], VOCABULARY, first))
        thread.start()
        while not harness.engine._inbox.qsize():
            time.sleep(0.001)
    assert tokens(reply) == said[300:]
    thread.join()
    assert cached(harness.run(*said, 1, 2)) == len(said) - 1
    cache.close()


def test_scores_and_replies_go_side_by_side(make: Callable[..., Harness]) -> None:
    harness = make(step_tokens=32)
    texts = [[number * 50 + n // 2 for n in range(150)] for number in range(3)]
    results: dict[int, list[bool]] = {}

    def score(number: int) -> None:
        results[number] = harness.engine.score(texts[number], VOCABULARY).greedy.tolist()

    threads = [threading.Thread(target=score, args=(number,)) for number in range(3)]
    reply = harness.engine.submit(request(1, max_tokens=100))
    for thread in threads:
        thread.start()
    assert tokens(reply) == list(range(2, 102))
    for thread in threads:
        thread.join()
    assert results == {number: [index % 2 == 1 for index in range(149)] for number in range(3)}
    assert len(harness.backend.sequences) <= 1, "a scored text is not kept"


def test_a_text_as_long_as_the_context_can_be_scored(make: Callable[..., Harness]) -> None:
    harness = make(context=256)
    assert len(harness.engine.score(list(range(256)), VOCABULARY).logprobs) == 255
    with pytest.raises(ContextOverflow):
        harness.engine.score(list(range(258)), VOCABULARY)


@pytest.mark.parametrize("text", [[], [1]])
def test_too_little_to_score_is_an_error(make: Callable[..., Harness], text: list[int]) -> None:
    with pytest.raises(UsageError, match="two tokens"):
        make().engine.score(text, VOCABULARY)


def test_a_failure_while_scoring_is_told(make: Callable[..., Harness]) -> None:
    harness = make()
    harness.backend.fail[0] = RuntimeError("device lost")
    with pytest.raises(BackendError, match="device lost"):
        harness.engine.score([1, 2, 3], VOCABULARY)
    assert harness.engine.score([1, 2, 3], VOCABULARY).greedy.all()


def test_a_close_while_scoring_ends_it(make: Callable[..., Harness]) -> None:
    harness = make()
    harness.backend.hold_from = 0
    caught: list[BaseException] = []

    def score() -> None:
        try:
            harness.engine.score([1, 2, 3], VOCABULARY)
        except Cancelled as error:
            caught.append(error)

    thread = threading.Thread(target=score)
    thread.start()
    harness.backend.held.acquire()
    harness.engine.close()
    thread.join(5)
    assert len(caught) == 1
    with pytest.raises(UsageError, match="closed"):
        harness.engine.score([1, 2, 3], VOCABULARY)


# Log-probabilities


def test_log_probabilities_come_with_the_tokens(make: Callable[..., Harness]) -> None:
    harness = make(logits=noise)
    events = [event for event in harness.run(1, 2, 3, max_tokens=5, logprobs=3) if isinstance(event, Token)]
    logits = noise([1, 2, 3]).astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum())
    assert events[0].logprob == pytest.approx(logprobs.max(), abs=1e-5)
    assert [token for token, _ in events[0].top] == np.argsort(-logprobs)[:3].tolist()
    assert all(len(event.top) == 3 for event in events)
    assert [event.id for event in events] == tokens(harness.run(1, 2, 3, max_tokens=5)), "they change nothing"


# A form


class Alternating:
    """Even, odd, even ... tokens, and after `length` of them the end. As `grammar.Constraint`."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.accepted: list[int] = []

    def mask(self) -> np.ndarray:
        """Which tokens may come."""
        words = np.full(-(-VOCABULARY // 32), 0x55555555, np.uint32)
        return words << np.uint32(len(self.accepted) % 2)

    def accept(self, token: int) -> None:
        """It came."""
        assert token % 2 == len(self.accepted) % 2
        self.accepted.append(token)

    def rollback(self, count: int) -> None:
        """It did not."""
        del self.accepted[len(self.accepted) - count :]

    def allowed(self, drafts: Sequence[int]) -> int:
        """How many of these could come."""
        fit = [draft % 2 == (len(self.accepted) + index) % 2 for index, draft in enumerate(drafts)]
        return fit.index(False) if False in fit else len(fit)

    @property
    def ended(self) -> bool:
        """Is it over?"""
        return len(self.accepted) >= self.length


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 3}, {"repetition_penalty": 1.2}])
@pytest.mark.parametrize("lookup", [False, True])
def test_a_constraint_decides_what_may_come_and_when_it_ends(make: Callable[..., Harness], sampling: dict, lookup: bool) -> None:
    constraint = Alternating(60)
    events = make(logits=noise).run(*([4, 5, 6, 7] * 10), max_tokens=None, constraint=constraint, lookup=lookup, **sampling)
    assert [token % 2 for token in tokens(events)] == [0, 1] * 30
    assert end(events) == "stop"
    assert constraint.accepted == tokens(events)


def test_drafts_do_not_change_what_a_constraint_lets_through(make: Callable[..., Harness]) -> None:
    plain, drafted = (
        make(logits=noise).run(*([4, 5, 6, 7] * 10), max_tokens=100, constraint=Alternating(200), lookup=lookup) for lookup in (False, True)
    )
    assert tokens(plain) == tokens(drafted)


def test_max_tokens_ends_a_form_before_its_end(make: Callable[..., Harness]) -> None:
    assert end(make(logits=noise).run(1, max_tokens=5, constraint=Alternating(60))) == "length"


def test_a_constraint_that_fails_ends_its_own_reply_alone(make: Callable[..., Harness]) -> None:
    harness = make(logits=noise)
    bad = Alternating(60)
    bad.mask = lambda: 1 / 0  # type: ignore[method-assign]
    alone = tokens(harness.run(1, max_tokens=50))
    with harness.held():
        good = harness.engine.submit(request(1, max_tokens=50))
        failing = harness.engine.submit(request(2, max_tokens=50, constraint=bad))
        harness.backend.held.acquire()
    assert tokens(good) == alone
    with pytest.raises(BackendError, match="ZeroDivisionError"):
        list(failing)

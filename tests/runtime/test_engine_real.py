"""The engine over real backends, with the guide: batched, cancelled, with and without a KV cache, each reply is the one it gives alone.

Floats depend on how many tokens are computed together, so replies may part where the two likeliest tokens are closer than that difference. It
is measured in the same run: the most by which a token's log-probability, at places where both runs have read the same, differs.

More requests at once with `QWEN2_LOCAL_ALL_POINTS=1 python -m pytest tests/runtime/test_engine_real.py`.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from qwen2_local.backends import NAMES
from qwen2_local.chatml import render
from qwen2_local.engine import Engine, Event, Finished, Prefilled, Request, Token
from qwen2_local.kvcache import KvCache
from qwen2_local.loading import Opened, open_model
from qwen2_local.types import Message, Sampling

pytestmark = pytest.mark.timeout(600)

QUESTIONS = (
    "What is GGUF?",
    "What is MLX?",
    "How do I pull a model?",
    "Which models can I run?",
    "What does quantization mean?",
    "How do I stop a reply?",
    "Wie installiere ich ein Modell?",
    "What is the KV cache for? Explain it in a few sentences.",
    "Can I use it without a network?",
    "Who are you?",
)
COUNTS = {"llama.cpp": (200, 60), "mlx": (30, 16)} if os.environ.get("QWEN2_LOCAL_ALL_POINTS") else {"llama.cpp": (60, 60), "mlx": (16, 16)}
"""Requests, and tokens of each at most: MLX is slow on a processor."""


@pytest.fixture(scope="module", params=NAMES)
def opened(request: pytest.FixtureRequest) -> Opened:
    return open_model("guide", backend=request.param, context=2048)


@pytest.fixture
def engines(opened: Opened) -> Iterator:
    made: list[Engine] = []

    def make(**settings) -> Engine:
        made.append(Engine(opened.plan.load, **settings))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def prompt_of(opened: Opened, *texts: str) -> tuple[int, ...]:
    """A chat: texts by turns of user and assistant."""
    messages = [Message("assistant" if turn % 2 else "user", text) for turn, text in enumerate(texts)]
    return tuple(render(opened.tokenizer, messages, default_system=opened.default_system))


def request_of(opened: Opened, prompt: Sequence[int], most: int | None = 40, **more) -> Request:
    sampling = more.pop("sampling", Sampling())
    return Request(tuple(prompt), sampling, opened.stops, opened.tokenizer.size, most, logprobs=2, **more)


def tokens(events: Sequence[Event]) -> list[Token]:
    return [event for event in events if isinstance(event, Token)]


def cached(events: Sequence[Event]) -> int:
    return next(event.cached for event in events if isinstance(event, Prefilled))


class Partings:
    """Compares replies, and keeps how far their floats differ and how close the likeliest two were where they parted."""

    def __init__(self) -> None:
        self.float_difference = 0.0
        self.margins: list[float] = []
        self.compared = 0

    def compare(self, alone: Sequence[Event], other: Sequence[Event]) -> None:
        """A reply against the one that it gives alone; it may be a beginning of it where it was cancelled."""
        ours, theirs = tokens(alone), tokens(other)
        self.compared += 1
        for one, two in zip(ours, theirs, strict=False):
            if one.id != two.id:
                self.margins.append(one.top[0][1] - one.top[1][1])
                return
            assert one.logprob is not None
            assert two.logprob is not None
            self.float_difference = max(self.float_difference, abs(one.logprob - two.logprob))
        end = other[-1]
        assert isinstance(end, Finished)
        if end.reason != "cancelled" and len(theirs) != len(ours):
            longer = max(ours, theirs, key=len)[min(len(ours), len(theirs))]
            self.margins.append(longer.top[0][1] - longer.top[1][1])

    def check(self) -> None:
        """No reply parted where it was not a tie. The two likeliest may each be off, in opposite directions."""
        assert self.float_difference < 0.1
        assert all(margin <= 2 * self.float_difference for margin in self.margins), (self.margins, self.float_difference)


@pytest.fixture(scope="module")
def alone(opened: Opened) -> dict[tuple[int, ...], list[Event]]:
    """Replies to many chats, each one computed by itself, from nothing."""
    count, most = COUNTS[opened.plan.backend]
    random_ = random.Random(0)
    replies: dict[tuple[int, ...], list[Event]] = {}
    engine = Engine(opened.plan.load, parallel=1)
    while len(replies) < count:
        texts = [random_.choice(QUESTIONS) for _ in range(random_.choice((1, 1, 3)))]
        prompt = prompt_of(opened, *texts[:-1], f"{texts[-1]} ({random_.randrange(1000)})")
        if prompt in replies:
            continue
        engine._scheduler.fail_all(RuntimeError("nothing may be known from the one before"))
        replies[prompt] = list(engine.generate(request_of(opened, prompt, most)))
        assert cached(replies[prompt]) == 0
    engine.close()
    return replies


@pytest.mark.parametrize("with_kv", [False, True])
def test_batched_and_cancelled_each_reply_is_the_one_it_gives_alone(opened: Opened, alone: dict, engines, tmp_path: Path, with_kv: bool) -> None:
    _, most = COUNTS[opened.plan.backend]
    kv = KvCache(tmp_path, budget=1 << 30) if with_kv else None
    engine = engines(kv=kv, kv_memory=opened.kv_memory)
    random_ = random.Random(1)
    partings = Partings()
    prompts = list(alone)
    random_.shuffle(prompts)
    running: list[tuple[tuple[int, ...], object, int]] = []
    while prompts or running:
        while prompts and len(running) < 12:
            prompt = prompts.pop()
            after = random_.randrange(most) if random_.random() < 0.2 else -1
            running.append((prompt, engine.submit(request_of(opened, prompt, most)), after))
        prompt, reply, after = running.pop(random_.randrange(len(running)))
        events: list[Event] = []
        for event in reply:
            events.append(event)
            if len(events) == after:
                reply.cancel()
        partings.compare(alone[prompt], events)
    partings.check()
    assert partings.compared == len(alone)
    engine.close()
    if kv is not None:
        kv.close()


def test_only_what_is_new_of_a_chat_is_computed(opened: Opened, engines, tmp_path: Path) -> None:
    kv = KvCache(tmp_path, budget=1 << 30)
    engine = engines(kv=kv)
    first = prompt_of(opened, *[text for text in QUESTIONS for _ in range(2)], QUESTIONS[0])
    assert len(first) > 256
    said = [*first]
    events = list(engine.generate(request_of(opened, said, 30)))
    said += [token.id for token in tokens(events)]
    # The reply's last token, or its stop, was never computed on.
    turn = [*said, *first[-20:]]
    second = list(engine.generate(request_of(opened, turn, 30)))
    assert cached(second) in (len(said), len(said) - 1)
    edited = [*said[: len(first) - 30], *first[-20:]]
    assert cached(list(engine.generate(request_of(opened, edited, 5)))) == len(first) - 30
    branch = [*said, *first[-10:]]
    back = list(engine.generate(request_of(opened, branch, 5)))
    assert cached(back) in (len(said), len(said) - 1), "the branch came back from the cache"
    engine.close()
    again = engines(kv=kv)
    reopened = list(again.generate(request_of(opened, turn, 30)))
    assert cached(reopened) >= len(turn) - 1
    partings = Partings()
    partings.compare(second, reopened)
    partings.check()
    again.close()
    kv.close()


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.7, top_p=0.9, repetition_penalty=1.05, seed=5)], ids=["greedy", "seeded"])
def test_lookup_gives_the_same_reply(opened: Opened, engines, sampling: Sampling) -> None:
    _, most = COUNTS[opened.plan.backend]
    prompt = prompt_of(opened, "Please repeat: one two three four five six seven, one two three four five six seven.")
    plain, drafted = engines(), engines()
    alone = list(plain.generate(request_of(opened, prompt, most, sampling=sampling)))
    reply = list(drafted.generate(request_of(opened, prompt, most, sampling=sampling, lookup=True)))
    partings = Partings()
    partings.compare(alone, reply)
    if sampling.temperature == 0.0:
        partings.check()
    else:
        assert not partings.margins


def test_a_model_drafts_for_itself(opened: Opened, engines) -> None:
    prompt = prompt_of(opened, QUESTIONS[0])
    alone = list(engines().generate(request_of(opened, prompt, 20)))
    drafted = list(engines(draft=opened.plan.load).generate(request_of(opened, prompt, 20)))
    partings = Partings()
    partings.compare(alone, drafted)
    partings.check()
    end = drafted[-1]
    assert isinstance(end, Finished)
    assert end.accepted > 0


def test_a_cancel_takes_effect_soon_in_a_long_prompt(opened: Opened, engines) -> None:
    engine = engines()
    prompt = (prompt_of(opened, *QUESTIONS[:9]) * 20)[:1900]
    list(engine.generate(request_of(opened, prompt[:5], 1)))
    reply = engine.submit(request_of(opened, prompt))
    next(reply)
    time.sleep(0.05)
    before = time.perf_counter()
    reply.cancel()
    end = list(reply)[-1]
    assert isinstance(end, Finished)
    assert end.reason == "cancelled"
    assert time.perf_counter() - before < 1.0, "0.3 s where the machine has nothing else to do"


def test_scores_are_the_log_probabilities_of_the_tokens(opened: Opened, engines) -> None:
    engine = engines()
    prompt = prompt_of(opened, QUESTIONS[0])
    said = tokens(list(engine.generate(request_of(opened, prompt, 12))))
    scores = engine.score([*prompt, *(token.id for token in said)], opened.tokenizer.size)
    assert len(scores.logprobs) == len(prompt) + len(said) - 1
    for token, logprob, greedy in zip(said, scores.logprobs[len(prompt) - 1 :], scores.greedy[len(prompt) - 1 :], strict=True):
        assert logprob == pytest.approx(token.logprob, abs=0.02)
        assert greedy

"""Speculation: the same tokens as without, ends met exactly, and off where it does not pay."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

import pytest

from qwen2_local.engine.speculation import DraftModel, Lookup, Payoff, Speculation, Speculator
from tests.support.engines import Harness, cached, end, finished, request, tokens
from tests.support.scripted import VOCABULARY, Scripted, noise

pytestmark = pytest.mark.timeout(60)


def cycle(tokens_: Sequence[int]) -> int:
    """Text that comes again and again, with a change here and there."""
    last, count = tokens_[-1], len(tokens_)
    return 77 if count % 41 == 0 else (last + 1) % 12


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Harness]]:
    made: list[Harness] = []
    # Whether it pays is measured, and a scripted backend takes no time.
    monkeypatch.setattr(Payoff, "wanted", lambda self: True)

    def one(**settings) -> Harness:
        made.append(Harness(**{"context": 4096, "rule": cycle, **settings}))
        return made[-1]

    yield one
    for harness in made:
        harness.engine.close()


def both(make: Callable[..., Harness], prompt: Sequence[int], *, draft: Callable[[], Scripted] | None = None, settings: dict, **more):
    """The events of a request without and with speculation."""
    plain = make(**settings).run(*prompt, **more)
    drafted = make(draft=draft, **settings).run(*prompt, lookup=draft is None, **more)
    return plain, drafted


@pytest.mark.parametrize("most", [1, 2, 3, 5, 17, 100, 101, 102, 103, 104])
def test_lookup_gives_the_same_tokens_and_meets_the_end_exactly(make: Callable[..., Harness], most: int) -> None:
    plain, drafted = both(make, range(30), settings={}, max_tokens=most)
    assert tokens(drafted) == tokens(plain)
    assert (end(drafted), len(tokens(drafted))) == ("length", most)


def test_lookup_saves_steps(make: Callable[..., Harness]) -> None:
    harness = make()
    events = harness.run(*range(30), max_tokens=200, lookup=True)
    last = finished(events)
    assert last.accepted > 100
    assert last.drafted >= last.accepted
    assert len(harness.backend.batches) == 200 - last.accepted


@pytest.mark.parametrize("stop", [3, 11, 77])
def test_a_stop_token_among_drafts_ends_the_reply(make: Callable[..., Harness], stop: int) -> None:
    prompt = [*range(12), *range(12), *range(12), 0]
    plain, drafted = both(make, prompt, settings={}, max_tokens=100, stops={stop})
    assert tokens(drafted) == tokens(plain)
    assert end(drafted) == end(plain) == "stop"


def test_a_reply_fills_the_context_with_drafts_too(make: Callable[..., Harness]) -> None:
    plain, drafted = both(make, range(30), settings={"context": 256}, max_tokens=None)
    assert tokens(drafted) == tokens(plain)
    assert end(drafted) == "context"
    assert len(tokens(drafted)) == 226


def test_what_was_drafted_and_wrong_is_not_kept(make: Callable[..., Harness]) -> None:
    harness = make()
    said = [*range(30), *tokens(harness.run(*range(30), max_tokens=100, lookup=True))]
    (present,) = map(list, harness.backend.sequences.values())
    assert present == said[: len(present)]
    assert len(present) >= len(said) - 1
    assert cached(harness.run(*said, 5)) == len(present)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("drafter", ["lookup", "itself", "another"])
def test_sampled_replies_are_the_same(make: Callable[..., Harness], seed: int, drafter: str) -> None:
    """Greedy and seeded, with penalties and log-probabilities."""
    random_ = random.Random(seed)

    def draft() -> Scripted:
        return Scripted(context=4096, logits=noise if drafter == "itself" else lambda tokens_: noise([*tokens_[:-1], tokens_[-1] // 2 * 2]))

    sampling = {
        "temperature": random_.choice((0.0, 0.3, 1.0)),
        "top_p": random_.choice((0.8, 1.0)),
        "repetition_penalty": random_.choice((1.0, 1.1)),
        "frequency_penalty": random_.choice((0.0, 0.2)),
        "seed": seed,
    }
    prompt = [random_.randrange(VOCABULARY) for _ in range(20)] * 3
    options = {"settings": {"logits": noise}, "max_tokens": 120, "logprobs": random_.choice((None, 2)), **sampling}
    plain, drafted = both(make, prompt, draft=None if drafter == "lookup" else draft, **options)
    assert [one for one in drafted if hasattr(one, "id")] == [one for one in plain if hasattr(one, "id")]


def test_steps_that_others_share_do_not_tell_what_one_takes_alone(make: Callable[..., Harness], monkeypatch: pytest.MonkeyPatch) -> None:
    harness = make()
    rows: list[int] = []
    monkeypatch.setattr(Speculator, "took", lambda *_: rows.append(harness.backend.batches[-1]))
    with harness.held():
        replies = [harness.engine.submit(request(*range(30 + number), max_tokens=20 + 20 * number, lookup=True)) for number in range(2)]
    for reply in replies:
        list(reply)
    assert 2 in harness.backend.batches
    assert set(rows) == {1}


def test_a_draft_model_that_agrees_saves_steps(make: Callable[..., Harness]) -> None:
    harness = make(draft=lambda: Scripted(context=4096, rule=cycle), step_tokens=64)
    events = harness.run(*range(200), max_tokens=150)
    last = finished(events)
    assert last.accepted > 100
    assert len(tokens(events)) == 150


def test_a_draft_models_smaller_vocabulary_is_kept_to() -> None:
    draft = DraftModel(Scripted(context=100, vocabulary=10), 1000)
    assert list(draft.propose([1, 2, 3], 4, 4)) == [4, 5, 6, 7]
    assert list(draft.propose([1, 2, 500], 4, 4)) == [], "it has no such token"
    assert list(draft.propose([1, 2, 3, 4], 2, 2)) == [5, 6]


def test_a_draft_model_proposes_nothing_past_its_own_context() -> None:
    draft = DraftModel(Scripted(context=10), 1000)
    assert list(draft.propose([1, 2, 3, 4, 5, 6, 7], 8, 8)) == [8, 9, 10]
    assert list(draft.propose(list(range(10)), 8, 8)) == []


def test_a_draft_model_gets_room_for_a_longer_text_where_there_is_memory() -> None:
    roomy, tight = Scripted(context=1000, usual=16), Scripted(context=1000, usual=16, most_tokens=20)
    for backend, drafts in ((roomy, [20, 21, 22]), (tight, [])):
        draft = DraftModel(backend, 1000)
        assert list(draft.propose(list(range(10)), 3, 3)) == [10, 11, 12]
        assert list(draft.propose(list(range(20)), 3, 3)) == drafts
        assert list(draft.propose(list(range(8)), 3, 3)) == [8, 9, 10]
    assert [layout.context for layout in roomy.layouts] == [32]
    assert tight.layouts == []


def test_a_draft_model_reads_a_long_text_slice_by_slice() -> None:
    backend = Scripted(context=1000, step_tokens=512)
    draft = DraftModel(backend, 1000)
    text = list(range(150))
    assert list(draft.propose(text, 3, 3)) == []
    assert list(draft.propose(text, 3, 3)) == []
    assert list(draft.propose(text, 3, 3)) == [150, 151, 152]
    assert max(len(part) for _, part in backend.steps) == 64
    assert list(draft.propose([*text, 150, 151, 9], 2, 2)) == [10, 11]
    assert backend.steps[-2][1] == (9,), "what it had guessed right is not computed again"


def test_a_draft_model_that_fails_costs_no_reply(make: Callable[..., Harness]) -> None:
    made: list[Scripted] = []

    def draft() -> Scripted:
        made.append(Scripted(context=4096, rule=cycle))
        made[0].fail[5] = RuntimeError("device lost")
        return made[0]

    harness = make(draft=draft)
    first = harness.run(*range(30), max_tokens=100)
    assert tokens(first) == tokens(make().run(*range(30), max_tokens=100))
    assert made[0].closed == 1
    assert finished(harness.run(*range(30), max_tokens=100)).drafted == 0


def test_both_models_are_closed(make: Callable[..., Harness]) -> None:
    made: list[Scripted] = []

    def draft() -> Scripted:
        made.append(Scripted(context=4096))
        return made[0]

    harness = make(draft=draft)
    harness.engine.close()
    assert (harness.backend.closed, made[0].closed) == (1, 1)


def test_lookup_finds_the_last_time_a_run_occurred() -> None:
    lookup = Lookup()
    run = [1, 2, 3, 4, 5]
    text = [*run, 6, 7, *run]
    assert list(lookup.propose(text, 2, 2)) == [6, 7]
    text += [9, *run]
    assert list(lookup.propose(text, 3, 3)) == [9, 1, 2]
    text += [8]
    assert list(lookup.propose(text, 3, 3)) == []
    assert list(lookup.propose([*text, *run[1:]], 3, 3)) == []  # too short a run
    assert list(Lookup().propose([1], 3, 3)) == []


def test_after_a_longer_run_lookup_gives_as_much_as_may_be() -> None:
    run = [1, 2, 3, 4, 5, 6, 7, 8]
    behind = list(range(20, 50))
    assert list(Lookup().propose([*run, *behind, *run], 2, 16)) == behind[:16]
    assert list(Lookup().propose([*run, *behind, *run], 2, 3)) == behind[:3]
    assert list(Lookup().propose([*run, *behind, *run[1:]], 2, 16)) == behind[:2]
    assert list(Lookup().propose([*run[3:], *behind, *run], 2, 16)) == behind[:2], "its beginning is the text's"


# Does it pay?


def test_drafts_that_are_right_get_longer() -> None:
    payoff = Payoff()
    for _ in range(5):
        assert payoff.wanted()
        payoff.took(payoff.length, payoff.length, 1.2)
    assert payoff.length == 16


def test_a_wrong_draft_or_two_cost_little_of_a_short_reply() -> None:
    payoff = Payoff()
    payoff.took(payoff.length, 0, 1.4)
    assert payoff.length == 1
    payoff.took(payoff.length, 0, 1.2)
    assert payoff.wanted()


def test_drafts_that_are_wrong_get_short_and_then_rare() -> None:
    payoff = Payoff()
    drafting = 0
    for _ in range(1000):
        if payoff.wanted():
            drafting += 1
            payoff.took(payoff.length, 0, 2.5)
    assert 2 < drafting < 20


def test_drafts_that_cost_more_than_they_bring_are_rare_even_if_right() -> None:
    payoff = Payoff()
    drafting = sum(payoff.wanted() and (payoff.took(4, 3, 6.0) or True) for _ in range(1000))
    assert drafting < 20


def test_where_drafts_come_to_pay_they_come_back() -> None:
    payoff = Payoff()
    for _ in range(300):
        if payoff.wanted():
            payoff.took(payoff.length, 0, 2.5)
    drafting = 0
    for _ in range(1500):
        if payoff.wanted():
            drafting += 1
            payoff.took(payoff.length, payoff.length, 1.5)
    assert drafting > 900


def test_several_at_once_are_not_drafted_for(make: Callable[..., Harness]) -> None:
    harness = make()
    with harness.held():
        replies = [harness.engine.submit(request(*range(30), number, max_tokens=50, lookup=True)) for number in (1, 2)]
        harness.backend.held.acquire()
    events = [list(reply) for reply in replies]
    assert [len(tokens(one)) for one in events] == [50, 50]
    assert all(len(part) == 1 for _, part in harness.backend.steps[4:-30])


LOOP = [1, 2, 3, 4, 5, 6, 7] * 3


def begun(speculator: Speculator, *, lookup: bool = False) -> Speculation:
    """A request of which some steps without drafts are done."""
    speculation = speculator.begin(lookup=lookup)
    assert speculation is not None
    for _ in range(3):
        speculator.took(speculation, 0, 0, 0.01)
    return speculation


def test_one_step_that_a_busy_machine_held_up_switches_nothing_off() -> None:
    speculator = Speculator(None)
    speculation = begun(speculator, lookup=True)
    for drafts in (True, True, False):  # twice is no accident
        drafted = len(speculator.drafts(speculation, LOOP, 2))
        assert bool(drafted) == drafts
        speculator.took(speculation, drafted, drafted, 1.0)


def test_a_draft_model_that_never_pays_is_off_in_the_next_request_too() -> None:
    speculator = Speculator(DraftModel(Scripted(context=4096), 1000))
    first = begun(speculator)
    while drafted := len(speculator.drafts(first, LOOP, 16)):
        speculator.took(first, drafted, 0, 0.05)
    second = begun(speculator, lookup=True)
    assert list(speculator.drafts(second, [9, 8, 7], 16)) == []
    assert len(speculator.drafts(second, LOOP, 16)) > 0, "what looks the text up is another"


def test_a_draft_model_that_pays_is_not_begun_anew_with_short_drafts() -> None:
    speculator = Speculator(DraftModel(Scripted(context=4096), 1000))
    first = begun(speculator)
    for _ in range(4):
        drafted = len(speculator.drafts(first, LOOP, 16))
        speculator.took(first, drafted, drafted, 0.012)
    assert drafted == len(speculator.drafts(begun(speculator), [9, 8, 7], 16)) == 16

"""The engine and many requests at once: batches, layouts by need, fairness, failures, and that none disturbs another."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from qwen2_local.backends.base import Layout
from qwen2_local.engine import Engine, Finished, Prefilled
from qwen2_local.errors import BackendError, DoesNotFit, UsageError
from qwen2_local.kvcache import KvCache
from tests.support.engines import Harness, cached, end, expected, request, tokens
from tests.support.scripted import VOCABULARY, Scripted, scrambled

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def make() -> Iterator[Callable[..., Harness]]:
    made: list[Harness] = []

    def one(**settings) -> Harness:
        made.append(Harness(**{"context": 4096, **settings}))
        return made[-1]

    yield one
    for harness in made:
        harness.backend.go.release(10_000)
        harness.engine.close()


def together(harness: Harness, *requests) -> list:
    """Replies to requests that are all there before the first step is over."""
    with harness.held():
        replies = [harness.engine.submit(one) for one in requests]
        harness.backend.held.acquire()
    return replies


# Batches


def test_requests_that_come_together_are_computed_together(make: Callable[..., Harness]) -> None:
    harness = make()
    replies = together(harness, *(request(100 * number, max_tokens=20) for number in range(5)))
    assert [tokens(reply) for reply in replies] == [[100 * number + n for n in range(1, 21)] for number in range(5)]
    assert max(harness.backend.batches) == 5
    assert len(harness.backend.batches) < 45, "not one after the other"


def test_one_that_comes_later_joins(make: Callable[..., Harness]) -> None:
    harness = make()
    harness.backend.hold_from = 5
    first = harness.engine.submit(request(1, max_tokens=50))
    harness.backend.held.acquire()
    second = harness.engine.submit(request(500, max_tokens=10))
    harness.backend.hold_from = None
    harness.backend.go.release()
    assert tokens(first) == list(range(2, 52))
    assert tokens(second) == list(range(501, 511))
    assert harness.backend.batches[:6] == [1] * 6
    assert 2 in harness.backend.batches


def test_no_more_run_at_once_than_was_said(make: Callable[..., Harness]) -> None:
    harness = make(parallel=3)
    replies = together(harness, *(request(100 * number, max_tokens=10) for number in range(9)))
    assert [tokens(reply)[-1] for reply in replies] == [100 * number + 10 for number in range(9)]
    assert max(harness.backend.batches) == 3


def test_a_step_never_takes_more_than_the_backend_does(make: Callable[..., Harness]) -> None:
    harness = make(step_tokens=4)  # the backend itself looks
    replies = together(harness, *(request(*range(100 * number, 100 * number + 30), max_tokens=10) for number in range(9)))
    assert [tokens(reply)[-1] for reply in replies] == [100 * number + 39 for number in range(9)]


def test_a_backend_of_one_token_a_step_serves_one_at_a_time(make: Callable[..., Harness]) -> None:
    harness = make(step_tokens=1)
    replies = together(harness, request(1, 2, 3), request(500))
    assert [tokens(reply) for reply in replies] == [[4, 5, 6], [501, 502, 503]]
    assert set(harness.backend.batches) == {1}


# Layouts


def test_one_request_has_one_long_sequence_and_several_share_the_memory(make: Callable[..., Harness]) -> None:
    harness = make(context=4096)
    assert harness.engine.layout == Layout(1, 4096)
    harness.run(1, 2, 3)
    assert harness.backend.layouts == []
    for reply in together(harness, *(request(number, max_tokens=100) for number in range(1, 5))):
        list(reply)
    assert harness.backend.layouts == [Layout(8, 512)], "there is room for all who may come"


def test_how_many_there_are_is_bounded_by_memory(make: Callable[..., Harness]) -> None:
    harness = make(context=4096)
    replies = together(harness, *(request(*range(number, number + 900), max_tokens=50) for number in range(6)))
    assert [tokens(reply)[-1] for reply in replies] == [number + 949 for number in range(6)]
    assert harness.backend.layouts[0] == Layout(4, 1024)
    assert max(harness.backend.batches) <= 4


def test_more_memory_makes_room_for_more(make: Callable[..., Harness]) -> None:
    harness = make(context=1024, kv_memory=8192)  # a byte per token
    for reply in together(harness, *(request(*range(number, number + 900), max_tokens=50) for number in range(6))):
        list(reply)
    assert harness.backend.layouts[0] == Layout(8, 1024)


def test_a_running_reply_goes_on_across_a_new_layout_without_being_computed_again(make: Callable[..., Harness]) -> None:
    harness = make(rule=scrambled)
    harness.backend.hold_from = 30
    first = harness.engine.submit(request(*range(40), max_tokens=100))
    harness.backend.held.acquire()
    second = harness.engine.submit(request(7, max_tokens=30))
    harness.backend.hold_from = None
    harness.backend.go.release()
    assert tokens(first) == expected(range(40), scrambled, most=100)
    assert tokens(second) == expected([7], scrambled, most=30)
    assert harness.backend.layouts
    assert sum(start == 0 and len(part) > 1 for start, part in harness.backend.steps) == 1


def test_where_kv_cannot_leave_the_device_it_is_computed_again(make: Callable[..., Harness]) -> None:
    harness = make(rule=scrambled)
    harness.backend.can_export = False
    harness.backend.hold_from = 30
    first = harness.engine.submit(request(*range(40), max_tokens=100))
    harness.backend.held.acquire()
    second = harness.engine.submit(request(7, max_tokens=30))
    harness.backend.hold_from = None
    harness.backend.go.release()
    assert tokens(first) == expected(range(40), scrambled, most=100)
    assert tokens(second) == expected([7], scrambled, most=30)


def test_a_reply_that_outgrows_its_place_gets_a_longer_one(make: Callable[..., Harness]) -> None:
    harness = make(context=4096, rule=scrambled)
    replies = together(harness, *(request(number, max_tokens=None) for number in range(3)), request(9, max_tokens=700))
    for number, reply in enumerate(replies[:3]):
        events = list(reply)
        assert tokens(events) == expected([number], scrambled, most=4095)
        assert end(events) == "context"
    assert tokens(replies[3]) == expected([9], scrambled, most=700)
    contexts = [layout.context for layout in harness.backend.layouts]
    assert contexts == sorted(contexts)
    assert contexts[-1] == 4096


def test_the_first_layout_is_only_where_it_begins(make: Callable[..., Harness]) -> None:
    harness = make(context=4096, usual=512)
    assert harness.engine.layout == Layout(1, 512)
    harness.run(1, 2, 3)
    assert harness.backend.layouts == []
    assert tokens(harness.run(*range(600))) == [600, 601, 602]
    assert harness.engine.layout.context >= 603
    events = harness.run(*range(600), max_tokens=None)
    assert len(tokens(events)) == 4096 - 600


def test_an_idle_engine_goes_back_to_one_long_sequence(make: Callable[..., Harness], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen2_local.engine.scheduler._LINGER_S", 0.05)
    harness = make()
    for reply in together(harness, request(1), request(500)):
        list(reply)
    deadline = time.monotonic() + 5
    while harness.engine.layout.sequences > 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert harness.engine.layout == Layout(1, 4096)
    assert cached(harness.run(500, 501, 502, 9)) == 3, "what was used last has come along"


def test_where_there_is_no_memory_for_several_they_wait(make: Callable[..., Harness]) -> None:
    harness = make(context=1024, kv_memory=100_000, most_tokens=1024)
    replies = together(harness, *(request(*range(number, number + 900), max_tokens=50) for number in range(4)))
    assert [tokens(reply)[-1] for reply in replies] == [number + 949 for number in range(4)]


def test_a_layout_that_cannot_be_changed_back_stays_until_the_next_request(make: Callable[..., Harness], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen2_local.engine.scheduler._LINGER_S", 0.02)
    harness = make()
    real, asked = harness.backend.arrange, []

    def arrange(layout: Layout) -> None:
        asked.append(layout)
        if layout.sequences == 1:
            harness.backend.sequences.clear()
            raise DoesNotFit("Memory is gone.")
        real(layout)

    monkeypatch.setattr(harness.backend, "arrange", arrange)
    for _ in range(2):
        for reply in together(harness, request(1), request(500)):
            list(reply)
        time.sleep(0.3)
        assert [layout.sequences for layout in asked].count(1) == 1
        asked.clear()


def test_a_device_without_memory_is_made_ready_again_when_there_is_some(make: Callable[..., Harness], monkeypatch: pytest.MonkeyPatch) -> None:
    harness = make(rule=scrambled)
    real_arrange, real_open = harness.backend.arrange, harness.backend.open
    gone = ready = True

    def arrange(layout: Layout) -> None:
        nonlocal ready
        ready = not gone
        if gone:
            harness.backend.sequences.clear()
            raise DoesNotFit("Memory is gone, for the layout before as well.")
        real_arrange(layout)

    def open_() -> int:
        if not ready:
            raise BackendError("There is no memory left.")
        return real_open()

    monkeypatch.setattr(harness.backend, "arrange", arrange)
    monkeypatch.setattr(harness.backend, "open", open_)
    with harness.held():
        replies = [harness.engine.submit(request(1, max_tokens=30))]
        harness.backend.held.acquire()
        replies.append(harness.engine.submit(request(2)))  # now that the first one is on the device
    for reply in replies:
        with pytest.raises(BackendError, match="no memory"):
            list(reply)
    with pytest.raises(BackendError, match="no memory"):
        harness.run(3)
    gone = False
    assert tokens(harness.run(3)) == expected([3], scrambled, most=3)


# Fairness


def test_a_long_prompt_does_not_starve_those_who_decode(make: Callable[..., Harness]) -> None:
    harness = make(context=100_000, step_tokens=256)
    harness.backend.hold_from = 10
    writer = harness.engine.submit(request(1, max_tokens=200))
    harness.backend.held.acquire()
    reader = harness.engine.submit(request(*range(20_000)))
    harness.backend.hold_from = None
    harness.backend.go.release()
    list(writer)
    list(reader)
    rows = harness.backend.steps[11:]
    reading = [index for index, (_, part) in enumerate(rows) if len(part) > 1]
    writing = [index for index, (_, part) in enumerate(rows[: reading[-1]]) if len(part) == 1]
    assert len(reading) > 70
    assert len(writing) >= min(len(reading) - 1, 185), "each step that reads also writes"


def test_a_short_prompt_does_not_wait_for_a_long_one(make: Callable[..., Harness]) -> None:
    harness = make(context=100_000)
    long, short = together(harness, request(*range(20_000), max_tokens=1), request(7, 8, 9, max_tokens=1))
    list(short)
    done = max(event.done for event in [next(long) for _ in range(5)] if isinstance(event, Prefilled))
    assert done < 20_000
    assert harness.backend.steps.index((0, (7, 8, 9))) < 10
    list(long)


def test_slices_get_shorter_where_tokens_take_long() -> None:
    from qwen2_local.engine.slices import Slices

    slices = Slices(512)
    assert slices.budget(0) == 512, "nobody waits"
    assert slices.budget(2) == 64, "nothing is known yet"
    slices.took(64, 0.064)
    assert slices.budget(2) == 150
    for _ in range(20):
        slices.took(100, 1.0)
    assert slices.budget(2) == 15
    for _ in range(20):
        slices.took(8, 4.0)
    assert slices.budget(1) == 8
    assert Slices(4).budget(3) == 1


# Cancels and failures


def test_a_cancel_of_one_does_not_disturb_the_others(make: Callable[..., Harness]) -> None:
    harness = make(rule=scrambled)
    replies = together(harness, *(request(number, max_tokens=200) for number in range(6)))
    for reply in replies[::2]:
        for _ in range(10):
            next(reply)
        reply.cancel()
    for number in (1, 3, 5):
        assert tokens(replies[number]) == expected([number], scrambled, most=200)
    for number in (0, 2, 4):
        assert end(list(replies[number])) in ("cancelled", "length")


def test_a_request_that_fails_a_step_fails_alone(make: Callable[..., Harness]) -> None:
    harness = make(rule=scrambled)
    harness.backend.faulty[expected([2], scrambled, most=4)[3]] = RuntimeError("values that are no numbers")
    replies = together(harness, *(request(number, max_tokens=10) for number in range(4)))
    with pytest.raises(BackendError, match="no numbers"):
        list(replies[2])
    for number in (0, 1, 3):
        assert tokens(replies[number]) == expected([number], scrambled, most=10)
    assert cached(harness.run(2, *expected([2], scrambled, most=2), max_tokens=1)) == 0, "nothing of it is trusted"


def test_a_step_that_fails_once_is_made_again_and_costs_nobody_a_reply(make: Callable[..., Harness]) -> None:
    harness = make(rule=scrambled)
    with harness.held():
        replies = [harness.engine.submit(request(number, max_tokens=10)) for number in range(3)]
        harness.backend.held.acquire()
        harness.backend.fail[3] = RuntimeError("device busy")
    assert [tokens(reply) for reply in replies] == [expected([number], scrambled, most=10) for number in range(3)]
    assert harness.backend.batches[3:7] == [3, 1, 1, 1]


def test_a_device_that_is_lost_ends_all_who_are_on_it(make: Callable[..., Harness]) -> None:
    harness = make(parallel=2, rule=scrambled)
    with harness.held():
        replies = [harness.engine.submit(request(number, max_tokens=10)) for number in range(3)]
        harness.backend.held.acquire()
        harness.backend.fail |= dict.fromkeys((3, 4, 5), RuntimeError("device lost"))
    for reply in replies[:2]:
        with pytest.raises(BackendError, match="device lost"):
            list(reply)
    assert tokens(replies[2]) == expected([2], scrambled, most=10)
    assert cached(harness.run(0, *expected([0], scrambled, most=3))) == 0, "nothing of them is trusted"


def test_a_cancel_while_a_step_is_made_again_counts(make: Callable[..., Harness]) -> None:
    harness = make(rule=scrambled)
    harness.backend.hold_from = 0
    replies = [harness.engine.submit(request(number, max_tokens=10)) for number in range(3)]
    harness.backend.held.acquire()
    harness.backend.fail[3] = RuntimeError("device busy")
    harness.backend.hold_from = 5  # of the second of the three, alone
    harness.backend.go.release()
    harness.backend.held.acquire()
    replies[1].cancel()
    harness.backend.hold_from = None
    assert end(list(replies[1])) == "cancelled"
    for number in (0, 2):
        assert tokens(replies[number]) == expected([number], scrambled, most=10)


def test_more_requests_than_may_wait_hold_up_who_brings_them(make: Callable[..., Harness], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen2_local.engine.owner._MOST_UNDER_WAY", 4)
    harness = make(parallel=1)
    harness.backend.hold_from = 0
    replies = [harness.engine.submit(request(number)) for number in range(4)]
    brought = threading.Event()

    def bring() -> None:
        replies.append(harness.engine.submit(request(4)))
        brought.set()

    thread = threading.Thread(target=bring, daemon=True)
    thread.start()
    assert not brought.wait(0.2)
    harness.backend.hold_from = None
    harness.backend.go.release()
    assert brought.wait(5)
    assert [tokens(reply)[0] for reply in replies] == [1, 2, 3, 4, 5]


def test_a_close_lets_go_of_who_is_held_up(make: Callable[..., Harness], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen2_local.engine.owner._MOST_UNDER_WAY", 1)
    harness = make()
    harness.backend.hold_from = 0
    running = harness.engine.submit(request(1))
    caught: list[BaseException] = []

    def bring() -> None:
        try:
            harness.engine.submit(request(2))
        except UsageError as error:
            caught.append(error)

    thread = threading.Thread(target=bring, daemon=True)
    thread.start()
    time.sleep(0.05)
    harness.engine.close()
    thread.join(5)
    assert end(list(running)) == "cancelled"
    # It may have got the place of the one that ended.
    assert not thread.is_alive()


# All together


@pytest.mark.parametrize("seed", range(8))
def test_any_mix_of_requests_gives_each_the_reply_it_gets_alone(make: Callable[..., Harness], tmp_path: Path, seed: int) -> None:
    """Two hundred requests that share beginnings, over all seeds, with cancels, failures, little memory, and with and without a KV cache."""
    random_ = random.Random(seed)
    kv = KvCache(tmp_path if seed % 4 == 1 else None, budget=1 << 24, memory=1 << 24) if seed % 2 else None
    harness = make(context=2048, kv=kv, rule=scrambled, step_tokens=random_.choice((8, 32, 128)), kv_memory=random_.choice((2048, 8192)))
    harness.backend.can_export = seed != 6
    beginnings = [[random_.randrange(VOCABULARY) for _ in range(random_.choice((3, 80, 700)))] for _ in range(4)]
    running = []
    for _ in range(25):
        start = random_.choice(beginnings)
        prompt = [*start[: random_.randint(1, len(start))], *(random_.randrange(VOCABULARY) for _ in range(random_.randrange(5)))]
        stops = {random_.randrange(VOCABULARY) for _ in range(random_.choice((0, 10)))}
        most = random_.choice((1, 3, 30, 300))
        running.append((prompt, stops, most, harness.engine.submit(request(*prompt, stops=stops, max_tokens=most))))
        if random_.random() < 0.2:
            running[-1][3].cancel()
        if random_.random() < 0.1:
            harness.backend.fail[len(harness.backend.batches) + random_.randrange(5)] = RuntimeError("device lost")
        if random_.random() < 0.3:
            time.sleep(0.01)
    for prompt, stops, most, reply in running:
        got = []
        try:
            for event in reply:
                got.append(event)
        except BackendError as error:
            assert "device lost" in str(error)
        wanted = expected(prompt, scrambled, stops=stops, most=most)
        if got and isinstance(got[-1], Finished) and got[-1].reason != "cancelled":
            assert tokens(got) == wanted
        else:
            assert tokens(got) == wanted[: len(tokens(got))]
    harness.engine.close()
    if kv is not None:
        kv.close()


def read(replies: list) -> None:
    """To their ends, good or bad."""
    while replies:
        with suppress(BackendError):
            list(replies.pop(0))


def test_two_thousand_short_requests_leave_nothing_behind() -> None:
    threads = threading.active_count()
    made: list[Scripted] = []

    def load() -> Scripted:
        made.append(Scripted(context=1024, rule=scrambled))
        return made[0]

    kv = KvCache(None, memory=1 << 20)
    engine = Engine(load, kv=kv)
    backend = made[0]
    random_ = random.Random(0)
    replies = []
    for number in range(2000):
        if random_.random() < 0.02:
            backend.fail[len(backend.batches) + 1] = RuntimeError("device lost")
        reply = engine.submit(request(number % 50, number % 7, max_tokens=random_.randint(1, 6)))
        if random_.random() < 0.1:
            reply.cancel()
        if random_.random() < 0.1:
            continue  # forgotten
        replies.append(reply)
        if len(replies) > 20:
            read(replies)
    del reply
    read(replies)
    deadline = time.monotonic() + 10
    while engine._scheduler.busy and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not engine._scheduler.busy
    assert engine._inbox.empty()
    assert engine._under_way._value == 256
    residents = engine._scheduler._prefixes._residents
    assert sorted(held.number for held in residents) == sorted(backend.sequences), "every sequence is one that is kept"
    assert len(residents) <= backend.layout.sequences
    engine.close()
    assert threading.active_count() == threads

"""The engine and one request at a time, with a backend that only counts: order, reuse of the prefix, stopping, failing, closing."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from qwen2_local.backends.base import Row, RowResult
from qwen2_local.engine import Engine, Finished, Prefilled, Token
from qwen2_local.errors import BackendError, ContextOverflow, DoesNotFit, Qwen2LocalError, UsageError
from tests.support.engines import Harness, cached, end, request, tokens
from tests.support.scripted import VOCABULARY, Scripted, counting

pytestmark = pytest.mark.timeout(60)
ROOT = Path(__file__).parents[2]


@pytest.fixture
def make() -> Iterator[Callable[..., Harness]]:
    made: list[Harness] = []

    def one(**settings: Any) -> Harness:
        made.append(Harness(**settings))
        return made[-1]

    yield one
    for harness in made:
        harness.backend.go.release(10_000)
        harness.engine.close()


@pytest.fixture
def harness(make: Callable[..., Harness]) -> Harness:
    return make()


# One reply


def test_a_reply_is_progress_then_tokens_then_its_end(harness: Harness) -> None:
    events = harness.run(5, 6, 7)
    assert events[:2] == [Prefilled(0, 3, 0), Prefilled(3, 3, 0)]
    assert events[2:5] == [Token(8), Token(9), Token(10)]
    assert end(events) == "length"
    assert len(events) == 6


def test_the_last_token_is_not_computed_on(harness: Harness) -> None:
    harness.run(5, 6, 7)
    assert harness.backend.steps == [(0, (5, 6, 7)), (3, (8,)), (4, (9,))]


def test_a_stop_token_ends_the_reply_and_is_no_part_of_it(harness: Harness) -> None:
    events = harness.run(1, stops={4, 77}, max_tokens=None)
    assert tokens(events) == [2, 3]
    assert end(events) == "stop"


def test_a_stop_token_may_come_first(harness: Harness) -> None:
    events = harness.run(1, stops={2})
    assert tokens(events) == []
    assert end(events) == "stop"


def test_a_stop_token_right_after_the_last_one_allowed_is_not_waited_for(harness: Harness) -> None:
    assert end(harness.run(1, stops={5}, max_tokens=3)) == "length"


def test_a_stop_token_in_the_prompt_is_nothing_special(harness: Harness) -> None:
    assert tokens(harness.run(1, 4, 1, stops={4}, max_tokens=2)) == [2, 3]


@pytest.mark.parametrize("most", [None, 6, 100])
def test_a_reply_fills_the_context(make: Callable[..., Harness], most: int | None) -> None:
    harness = make(context=16)
    events = harness.run(*range(10), max_tokens=most)
    assert len(tokens(events)) == 6
    assert end(events) == "context"


def test_a_prompt_that_leaves_room_for_one_token_runs(make: Callable[..., Harness]) -> None:
    assert end(make(context=16).run(*range(15))) == "context"


@pytest.mark.parametrize("length", [16, 17, 5000])
def test_a_prompt_that_fills_the_context_is_refused_with_both_counts(make: Callable[..., Harness], length: int) -> None:
    harness = make(context=16)
    with pytest.raises(ContextOverflow, match=rf"{length:,} tokens.* 16 ") as caught:
        harness.run(*range(length))
    assert caught.value.hint
    assert harness.backend.steps == []


def test_prefill_goes_in_slices_of_the_backends_most(make: Callable[..., Harness]) -> None:
    harness = make(context=1000, step_tokens=200)
    events = harness.run(*range(700), max_tokens=1)
    assert [len(part) for _, part in harness.backend.steps] == [200, 200, 200, 100], "alone: a cancel breaks even a long one off"
    assert [event.done for event in events if isinstance(event, Prefilled)] == [0, 200, 400, 600, 700]
    assert {event.total for event in events if isinstance(event, Prefilled)} == {700}
    assert tuple(token for _, part in harness.backend.steps for token in part) == tuple(range(700))


def test_only_the_last_slice_chooses(make: Callable[..., Harness]) -> None:
    harness = make(step_tokens=10)
    harness.run(*range(25), max_tokens=1)
    assert [choice is not None for choice in harness.backend.choices] == [False, False, True]


def test_times_are_of_this_reply(make: Callable[..., Harness]) -> None:
    (*_, last) = make().run(1)
    assert isinstance(last, Finished)
    assert 0 < last.prefill_s < 5
    assert 0 <= last.decode_s < 5


# Sampling


def test_greedy_asks_for_no_random_number(harness: Harness) -> None:
    harness.run(1, 2)
    assert {(choice.temperature, choice.uniform, choice.limit, len(choice.penalized)) for choice in harness.backend.choices} == {
        (0.0, 0.0, VOCABULARY, 0)
    }


def test_random_numbers_follow_from_seed_and_position_alone(harness: Harness) -> None:
    def numbers(*prompt: int, seed: int | None) -> list[float]:
        before = len(harness.backend.choices)
        harness.run(*prompt, temperature=1.0, seed=seed)
        return [choice.uniform for choice in harness.backend.choices[before:] if choice is not None]

    first = numbers(1, 2, 3, seed=7)
    assert len(set(first)) == 3
    assert numbers(1, 2, 3, seed=7) == first, "the same, though the prompt was cached"
    assert numbers(9, 9, 9, 9, seed=7)[:2] == first[1:], "one position later"
    assert numbers(1, 2, 3, seed=8) != first
    assert numbers(1, 2, 3, seed=None) != numbers(1, 2, 3, seed=None)


def test_the_penalty_counts_prompt_and_reply(harness: Harness) -> None:
    harness.run(3, 5, 3, repetition_penalty=1.1)
    # It writes 4 and 5; each counts once.
    assert [sorted(choice.penalized) for choice in harness.backend.choices] == [[3, 5], [3, 4, 5], [3, 4, 5]]


# Reuse


def test_a_conversation_that_goes_on_computes_only_what_is_new(harness: Harness) -> None:
    assert cached(harness.run(1, 2, 3)) == 0  # writes 4, 5, 6
    events = harness.run(1, 2, 3, 4, 5, 6, 50, 51)
    # 6 was chosen, but nothing was computed from it.
    assert cached(events) == 5
    assert harness.backend.steps[3] == (5, (6, 50, 51))
    assert harness.backend.trims == []
    assert harness.backend.opened == 1


def test_the_same_prompt_again_computes_its_last_token(harness: Harness) -> None:
    first = harness.run(1, 2, 3)
    again = harness.run(1, 2, 3)
    assert cached(again) == 2
    assert tokens(again) == tokens(first)
    assert harness.backend.trims == [2]


def test_what_differs_is_cut_away(harness: Harness) -> None:
    harness.run(1, 2, 3, 4)
    assert cached(harness.run(1, 2, 9)) == 2
    assert harness.backend.trims == [2]
    assert harness.backend.sequences == {0: [1, 2, 9, 10, 11]}


def test_a_prompt_with_another_start_computes_all(harness: Harness) -> None:
    harness.run(1, 2, 3)
    assert cached(harness.run(9, 2, 3)) == 0
    assert harness.backend.sequences == {0: [9, 2, 3, 4, 5]}


def test_progress_starts_at_what_is_cached(harness: Harness) -> None:
    harness.run(1, 2, 3)
    assert harness.run(1, 2, 3, 4, 7)[0] == Prefilled(4, 5, 4)


# Stopping


def test_closing_before_the_first_event_does_nothing(harness: Harness) -> None:
    harness.engine.generate(request(1)).close()
    assert tokens(harness.run(5)) == [6, 7, 8]
    assert harness.backend.steps[0] == (0, (5,))


def test_closing_stops_a_slice_of_prefill_under_way(make: Callable[..., Harness]) -> None:
    harness = make(step_tokens=10)
    harness.backend.hold_from = 1
    reply = harness.engine.generate(request(*range(100)))
    while next(reply) != Prefilled(10, 100, 0):
        pass
    harness.backend.held.acquire()
    reply.close()
    harness.backend.hold_from = None
    events = harness.run(*range(100))
    assert cached(events) == 10, "what was read before stays"
    assert tokens(events) == [100, 101, 102]


def test_closing_stops_a_decode_step_under_way(harness: Harness) -> None:
    harness.backend.hold_from = 2
    reply = harness.engine.generate(request(1, max_tokens=None))
    while next(reply) != Token(3):
        pass
    harness.backend.held.acquire()
    reply.close()
    harness.backend.hold_from = None
    events = harness.run(1, 2, 3, 50)
    assert cached(events) == 2
    assert tokens(events) == [51, 52, 53]


def test_closing_between_steps_stops_too(make: Callable[..., Harness]) -> None:
    harness = make(context=100_000)
    reply = harness.engine.generate(request(1, max_tokens=None))
    while next(reply) != Token(3):
        pass
    reply.close()
    assert tokens(harness.run(500)) == [501, 502, 503]
    assert len(harness.backend.steps) < 50_000


def test_one_that_was_stopped_before_its_turn_leaves_the_sequence_alone(make: Callable[..., Harness]) -> None:
    harness = make(parallel=1)
    harness.run(1, 2, 3)
    harness.backend.hold_from = 3
    running = harness.engine.generate(request(1, 2, 3, 4, 9))
    next(running)
    harness.backend.held.acquire()
    waiting = harness.engine.submit(request(600, 601))
    waiting.cancel()
    harness.backend.hold_from = None
    harness.backend.go.release()
    assert tokens(list(running)) == [10, 11, 12]
    assert cached(harness.run(1, 2, 3, 4, 9, 10, 11, 30)) == 7
    assert list(waiting) == [Finished("cancelled", 0.0, 0.0)]


def test_any_thread_may_cancel(harness: Harness) -> None:
    harness.backend.hold_from = 2
    reply = harness.engine.submit(request(1, max_tokens=None))
    harness.backend.held.acquire()
    threading.Thread(target=reply.cancel).start()
    events = list(reply)
    assert tokens(events) == [2, 3], "what came until then can be read"
    assert end(events) == "cancelled"


def test_a_reply_cannot_be_awaited_on_the_thread_that_computes_it(harness: Harness) -> None:
    refused = []

    def rule(sequence: Sequence[int]) -> int:
        # As the garbage collector may, which runs there, too.
        if not refused:
            with pytest.raises(UsageError, match="the thread that computes it") as caught:
                next(other)
            refused.append(caught)
        return counting(sequence)

    harness.backend.rule = rule
    with harness.held():
        first, other = (harness.engine.submit(request(start)) for start in (1, 600))
    assert tokens(list(first)) == [2, 3, 4]
    assert tokens(list(other)) == [601, 602, 603]
    assert refused


def test_a_cancel_after_the_end_is_nothing(harness: Harness) -> None:
    reply = harness.engine.submit(request(1))
    events = list(reply)
    reply.cancel()
    assert end(events) == "length"
    assert list(reply) == []


def test_a_late_cancel_does_not_hit_the_next_reply(harness: Harness) -> None:
    for _ in range(50):
        reply = harness.engine.generate(request(1, max_tokens=2))
        next(reply)
        reply.close()
        assert tokens(harness.run(5)) == [6, 7, 8]


def test_a_cancel_just_before_a_step_begins_ends_it(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    real, replies = harness.backend.step, []

    def step(rows: Sequence[Row]) -> list[RowResult]:
        if len(harness.backend.batches) == 2:  # the engine has looked for cancels, and the backend has not begun
            harness.backend.hold_from = 2
            replies[0].cancel()
        return real(rows)

    monkeypatch.setattr(harness.backend, "step", step)
    harness.backend.hold_from = 1
    replies.append(harness.engine.submit(request(1, max_tokens=None)))
    harness.backend.held.acquire()
    harness.backend.hold_from = None
    harness.backend.go.release()
    events = list(replies[0])
    assert end(events) == "cancelled"
    assert tokens(events) == [2, 3]
    assert not harness.backend.held.acquire(blocking=False), "the step was not waited for"


def test_a_ctrl_c_that_loses_the_end_does_not_make_the_next_reader_wait_for_ever(harness: Harness) -> None:
    reply = harness.engine.submit(request(1))
    mailbox = reply._mailbox
    real = mailbox.take

    def take() -> Any:
        event = real()
        if isinstance(event, Finished):
            mailbox.take = real
            raise KeyboardInterrupt
        return event

    mailbox.take = take
    with pytest.raises(KeyboardInterrupt):
        list(reply)
    reply.cancel()
    assert end(list(reply)) == "length"


# Readers that dawdle or go away


def test_a_reader_that_dawdles_loses_nothing(harness: Harness) -> None:
    slow = harness.engine.generate(request(1, max_tokens=50))
    got = [next(slow)]
    assert tokens(harness.run(500)) == [501, 502, 503], "it holds up nobody"
    got += list(slow)
    assert tokens(got) == list(range(2, 52))


def test_an_iterator_that_is_forgotten_is_stopped(make: Callable[..., Harness]) -> None:
    harness = make(context=1_000_000)
    reply = harness.engine.generate(request(1, max_tokens=None))
    next(reply)
    del reply
    gc.collect()
    assert tokens(harness.run(500)) == [501, 502, 503]
    assert len(harness.backend.steps) < 100_000


def test_the_garbage_collector_may_stop_a_reply_inside_the_lock(harness: Harness) -> None:
    reply = harness.engine.generate(request(1, max_tokens=None))
    next(reply)
    with harness.engine._lock:
        del reply
    assert tokens(harness.run(500)) == [501, 502, 503]


def test_many_callers_are_served_in_order_each_with_its_own(make: Callable[..., Harness]) -> None:
    harness = make(parallel=1)
    harness.backend.hold_from = 0
    replies = [harness.engine.submit(request(number * 10, max_tokens=5)) for number in range(1, 21)]
    harness.backend.hold_from = None
    harness.backend.go.release()
    results: dict[int, list[int]] = {}

    def read(number: int) -> None:
        results[number] = tokens(list(replies[number - 1]))

    threads = [threading.Thread(target=read, args=(number,), daemon=True) for number in range(1, 21)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert results == {number: [number * 10 + n for n in range(1, 6)] for number in range(1, 21)}
    order = [part[0] // 10 for start, part in harness.backend.steps if start == 0]
    assert order == list(range(1, 21))


# Failures


def test_an_error_of_the_library_becomes_one_of_ours_with_its_cause(harness: Harness) -> None:
    cause = harness.backend.fail[0] = RuntimeError("device lost")
    with pytest.raises(BackendError, match="scripted failed: RuntimeError: device lost") as caught:
        harness.run(1)
    assert caught.value.__cause__ is cause
    assert "doctor" in caught.value.hint


@pytest.mark.parametrize("error", [DoesNotFit("Too much."), BackendError("No numbers.")])
def test_an_error_of_ours_comes_as_it_is(harness: Harness, error: Qwen2LocalError) -> None:
    harness.backend.fail[0] = error
    with pytest.raises(type(error)) as caught:
        harness.run(1)
    assert caught.value is error


@pytest.mark.parametrize("error", [MemoryError(), SystemExit(3), AssertionError()], ids=repr)
def test_nothing_ends_the_owner_thread(harness: Harness, error: BaseException) -> None:
    harness.backend.fail[0] = error
    with pytest.raises(BackendError, match=type(error).__name__):
        harness.run(1)
    assert tokens(harness.run(1)) == [2, 3, 4]


def test_tokens_before_a_failure_arrive(harness: Harness) -> None:
    harness.backend.fail[2] = RuntimeError("device lost")
    reply = harness.engine.generate(request(1))
    got = [next(reply) for _ in range(4)]
    assert tokens(got) == [2, 3]
    with pytest.raises(BackendError):
        next(reply)


def test_after_a_failure_nothing_is_trusted_and_the_next_reply_is_right(harness: Harness) -> None:
    harness.backend.fail[1] = RuntimeError("device lost")
    with pytest.raises(BackendError):
        harness.run(1, 2, 3)
    events = harness.run(1, 2, 3)
    assert cached(events) == 0
    assert tokens(events) == [4, 5, 6]
    assert list(harness.backend.sequences) == [1], "the first sequence was given back"


def test_a_failure_to_give_back_is_no_second_failure(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    harness.backend.fail[0] = RuntimeError("device lost")
    monkeypatch.setattr(harness.backend, "free", lambda sequence: 1 / 0)
    with pytest.raises(BackendError, match="device lost"):
        harness.run(1)
    assert tokens(harness.run(1)) == [2, 3, 4]


# Loading and closing


def test_what_loading_raises_comes_to_the_caller() -> None:
    before = threading.active_count()

    def load() -> Scripted:
        raise DoesNotFit("Too large.", hint="Take a smaller one.")

    with pytest.raises(DoesNotFit, match="Too large"):
        Engine(load)
    assert threading.active_count() == before


def test_what_a_library_raises_in_loading_becomes_an_error_of_ours() -> None:
    def load() -> Scripted:
        raise ImportError("libgomp.so.1: cannot open")

    with pytest.raises(BackendError, match="could not be loaded: ImportError: libgomp") as caught:
        Engine(load)
    assert isinstance(caught.value.__cause__, ImportError)


def test_the_thread_goes_with_the_model() -> None:
    before = threading.active_count()
    harness = Harness()
    assert threading.active_count() == before + 1
    harness.run(1)
    harness.engine.close()
    assert threading.active_count() == before
    assert harness.backend.closed == 1


def test_closing_twice_is_closing_once(harness: Harness) -> None:
    harness.engine.close()
    harness.engine.close()
    assert harness.backend.closed == 1


def test_a_closed_model_says_so(harness: Harness) -> None:
    reply = harness.engine.generate(request(1))
    harness.engine.close()
    for late in (reply, harness.engine.generate(request(1))):
        with pytest.raises(UsageError, match="is closed") as caught:
            next(late)
        assert caught.value.hint


def test_what_was_computed_before_the_close_can_still_be_read(harness: Harness) -> None:
    reply = harness.engine.generate(request(1))
    got = [next(reply)]
    while len(harness.backend.steps) < 3:
        time.sleep(0.001)
    harness.engine.close()
    got += list(reply)
    assert tokens(got) in ([2, 3], [2, 3, 4])


def test_closing_ends_what_runs_and_what_waits_as_cancelled(make: Callable[..., Harness]) -> None:
    harness = make(parallel=1)
    harness.backend.hold_from = 1
    running, waiting = (harness.engine.submit(request(prompt, max_tokens=None)) for prompt in (1, 500))
    harness.backend.held.acquire()
    harness.engine.close()
    assert end(list(running)) == "cancelled"
    assert end(list(waiting)) == "cancelled"
    assert harness.backend.closed == 1
    assert len(harness.backend.steps) == 2


def test_a_failure_in_the_end_answers_who_waits_and_gives_back(make: Callable[..., Harness], monkeypatch: pytest.MonkeyPatch) -> None:
    harness = make(parallel=1)
    harness.backend.hold_from = 1
    replies = [harness.engine.submit(request(prompt, max_tokens=None)) for prompt in (1, 500)]
    harness.backend.held.acquire()
    monkeypatch.setattr(harness.engine._scheduler, "stop_all", lambda: 1 / 0)
    harness.engine.close()
    for reply in replies:
        with pytest.raises(BackendError, match="The engine failed"):
            list(reply)
    assert harness.backend.closed == 1


def test_closing_from_many_threads(harness: Harness) -> None:
    harness.backend.hold_from = 0
    reply = harness.engine.generate(request(1))
    next(reply)
    threads = [threading.Thread(target=harness.engine.close, daemon=True) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()
    assert end(list(reply)) == "cancelled"


def test_a_backend_that_fails_to_close_hurts_nobody(make: Callable[..., Harness], monkeypatch: pytest.MonkeyPatch) -> None:
    harness = make()
    monkeypatch.setattr(harness.backend, "close", lambda: 1 / 0)
    harness.engine.close()


# Processes


def child(code: str) -> subprocess.CompletedProcess[str]:
    start = """
        import os, sys, threading, warnings
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads: that is what this is about
        from qwen2_local.engine import Engine
        from qwen2_local.errors import UsageError
        from tests.support.scripted import Scripted
        from tests.support.engines import request
        engine = Engine(lambda: Scripted(context=100_000))
    """
    command = [sys.executable, "-c", textwrap.dedent(start) + textwrap.dedent(code)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=50, check=False)


def test_a_fork_gets_an_error_and_no_hang() -> None:
    done = child("""
        reply = engine.generate(request(1, max_tokens=None))
        next(reply)
        engine._lock.acquire()  # as another thread may, just when the process forks
        pid = os.fork()
        if pid == 0:
            for iterator in (engine.generate(request(1)), reply):
                try:
                    next(iterator)
                except UsageError as error:
                    print("child:", error, flush=True)
            engine.close()
            os._exit(0)
        engine._lock.release()
        _, status = os.waitpid(pid, 0)
        print("status", status)
        reply.close()
        print([event.id for event in engine.generate(request(500)) if hasattr(event, "id")])
        engine.close()
    """)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert sum("fork" in line for line in lines) == 2
    assert any("spawn" in line for line in lines)
    assert lines[-2:] == ["status 0", "[501, 502, 503]"]


def test_a_program_that_forgets_to_close_still_ends() -> None:
    done = child("""
        reply = engine.generate(request(1, max_tokens=None))
        next(reply)
        print("done")
    """)
    assert (done.stdout, done.stderr, done.returncode) == ("done\n", "", 0)


def test_ctrl_c_reaches_a_reader_who_waits() -> None:
    done = child("""
        import signal, time
        backend = engine._backend
        backend.hold_from = 1
        reply = engine.generate(request(1, max_tokens=None))
        def later():
            backend.held.acquire()
            time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGINT)
        threading.Thread(target=later, daemon=True).start()
        try:
            for event in reply:
                pass
        except KeyboardInterrupt:
            print("stopped")
        backend.hold_from = None
        print([event.id for event in engine.generate(request(1)) if hasattr(event, "id")])
        engine.close()
    """)
    assert done.stderr == ""
    assert done.stdout == "stopped\n[2, 3, 4]\n"
    assert done.returncode != -signal.SIGINT

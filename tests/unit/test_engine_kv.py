"""What the engine computes again and what not: residents, forks, the KV cache. Counted in tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from qwen2_local.backends.base import Chunk, Layout
from qwen2_local.engine import Finished
from qwen2_local.errors import BackendError, ContextOverflow, UsageError
from qwen2_local.kvcache import Disk, KvCache
from tests.support.engines import Harness, cached, end, expected, finished, request, tokens
from tests.support.scripted import scrambled

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def kv(tmp_path: Path) -> Iterator[KvCache]:
    cache = KvCache(tmp_path / "kv", budget=1 << 26, memory=1 << 26)
    yield cache
    cache.close()


@pytest.fixture
def make() -> Iterator[Callable[..., Harness]]:
    made: list[Harness] = []

    def one(**settings) -> Harness:
        made.append(Harness(**{"context": 8192, "rule": scrambled, **settings}))
        return made[-1]

    yield one
    for harness in made:
        harness.backend.go.release(10_000)
        harness.engine.close()


def chat(harness: Harness, turns: int, *, start: Sequence[int] = range(300)) -> list[int]:
    """A conversation: each turn 40 tokens of a user, 60 of a reply; all its tokens."""
    said = list(start)
    for turn in range(turns):
        said += [900 + turn] * 40
        events = harness.run(*said, max_tokens=60)
        said += tokens(events)
    return said


def test_a_second_turn_computes_only_what_is_new(make: Callable[..., Harness], kv: KvCache) -> None:
    harness = make(kv=kv)
    said = chat(harness, 1)
    events = harness.run(*said, 1, 2, 3)
    assert cached(events) == len(said) - 1, "the last token of a reply was never computed on"
    assert tokens(events) == expected([*said, 1, 2, 3], scrambled, most=3)


def test_an_edited_turn_computes_from_the_edit_on(make: Callable[..., Harness], kv: KvCache) -> None:
    harness = make(kv=kv)
    said = chat(harness, 4)
    edited = [*said[:450], 7, 7, 7]
    assert cached(harness.run(*edited)) == 450
    again = harness.run(*said, 5)
    assert cached(again) == len(said) - 1, "the first branch is not lost: it came back from the cache"
    assert tokens(again) == expected([*said, 5], scrambled, most=3)


def test_what_is_known_can_be_asked_before(make: Callable[..., Harness], kv: KvCache) -> None:
    harness = make(kv=kv)
    assert harness.engine.known(range(300)) == 0
    said = chat(harness, 3)
    other = chat(harness, 2, start=range(500, 900))
    steps = len(harness.backend.batches)
    asked = ([*said, 1], [*other, 2], [*said[:350], 7, 7], said[:300], said[:1], [])
    told = [harness.engine.known(prompt) for prompt in asked]
    assert [harness.engine.known(prompt) for prompt in asked] == told, "asking changes nothing"
    assert len(harness.backend.batches) == steps, "and computes nothing"
    assert told == [len(said) - 1, len(other) - 1, 350, 299, 0, 0]
    assert [cached(harness.run(*prompt)) for prompt in asked[:4]] == told[:4], "so it comes"


def test_who_asks_what_is_known_of_a_closed_model_is_told(make: Callable[..., Harness]) -> None:
    harness = make()
    harness.engine.close()
    with pytest.raises(UsageError, match="closed"):
        harness.engine.known([1, 2, 3])


def test_another_chat_in_between_costs_nothing(make: Callable[..., Harness], kv: KvCache) -> None:
    harness = make(kv=kv)
    first = chat(harness, 2)
    second = chat(harness, 2, start=range(500, 900))
    assert cached(harness.run(*first, 1)) == len(first) - 1
    assert cached(harness.run(*second, 1)) == len(second) - 1


def test_without_a_cache_another_chat_costs_all_of_it(make: Callable[..., Harness]) -> None:
    harness = make()
    first = chat(harness, 2)
    chat(harness, 2, start=range(500, 900))
    assert cached(harness.run(*first, 1)) == 0


def test_a_chat_reopened_after_the_close_computes_only_what_is_new(make: Callable[..., Harness], kv: KvCache) -> None:
    harness = make(kv=kv)
    said = chat(harness, 5)
    harness.engine.close()
    again = make(kv=kv)
    events = again.run(*said, 1, 2, 3)
    assert cached(events) == len(said) - 1
    assert tokens(events) == expected([*said, 1, 2, 3], scrambled, most=3)


def test_a_new_process_computes_only_what_is_new(make: Callable[..., Harness], tmp_path: Path) -> None:
    one, other = (KvCache(tmp_path / "shared", budget=1 << 26, memory=1 << 26) for _ in range(2))
    harness = make(kv=one)
    said = chat(harness, 3)
    harness.engine.close()
    one.close()
    assert cached(make(kv=other).run(*said, 1)) == len(said) - 1
    other.close()


def test_only_what_is_new_is_exported(make: Callable[..., Harness], kv: KvCache) -> None:
    harness = make(kv=kv)
    said = chat(harness, 6)
    harness.engine.close()
    exported = harness.backend.exported
    whole = [one for one in exported if one[1] - one[0] == 256]
    assert len(whole) == len(set(whole)) == (len(said) - 1) // 256, "a whole chunk once"
    assert sum(stop - start for start, stop in exported) < len(said) + 6 * 256, "and a tail for each turn at most"


@pytest.mark.parametrize("damaged", [None, 15, 16, 20])
def test_a_long_prompt_comes_back_piece_by_piece(
    make: Callable[..., Harness], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: int | None
) -> None:
    prompt = [n % 1000 for n in range(7000)]
    kv = KvCache(tmp_path / "kv", budget=1 << 26)
    first = make(kv=kv, step_tokens=512)
    said = tokens(first.run(*prompt))
    names = kv.names(first.backend.fingerprint, [*prompt, *said[:-1]])
    first.engine.close()
    kv.close()
    if damaged is not None:
        Disk(tmp_path / "kv").remove(names[damaged])
    kv = KvCache(tmp_path / "kv", budget=1 << 26)
    second = make(kv=kv, step_tokens=512)
    sizes, import_kv = list[int](), second.backend.import_kv

    def note(sequence: int, chunks: Sequence[Chunk]) -> None:
        sizes.append(len(chunks))
        import_kv(sequence, chunks)

    monkeypatch.setattr(second.backend, "import_kv", note)
    events = second.run(*prompt)
    assert tokens(events) == said
    assert cached(events) == (6999 if damaged is None else damaged * 256)
    assert max(sizes) <= 16, "its KV is not in memory twice"
    second.engine.close()
    kv.close()


def test_where_the_last_chunk_does_not_fit_the_others_are_taken(make: Callable[..., Harness], kv: KvCache) -> None:
    long = make(kv=kv)
    long.run(*range(700))
    long.engine.close()
    prompt = range(290)
    short = make(kv=kv, context=300)  # of the second chunk 34 tokens match, and 256 would have to be put in
    events = short.run(*prompt)
    assert tokens(events) == expected(prompt, scrambled, most=3)
    assert cached(events) == 256


def test_a_damaged_chunk_is_computed_again(make: Callable[..., Harness], kv: KvCache, tmp_path: Path) -> None:
    harness = make(kv=kv)
    said = chat(harness, 8)
    harness.engine.close()
    kv.close()
    files = sorted(file for file in (tmp_path / "kv").rglob("*") if file.is_file() and file.stat().st_size > 1000)
    assert len(files) >= 3
    for file in files:
        content = bytearray(file.read_bytes())
        content[-5] ^= 1
        file.write_bytes(content)
    fresh = KvCache(tmp_path / "kv", budget=1 << 26, memory=1 << 26)
    events = make(kv=fresh).run(*said, 1)
    assert tokens(events) == expected([*said, 1], scrambled, most=3)
    assert cached(events) == 0
    fresh.close()


def test_kv_that_the_backend_refuses_is_computed_again(make: Callable[..., Harness], kv: KvCache, monkeypatch: pytest.MonkeyPatch) -> None:
    harness = make(kv=kv)
    said = chat(harness, 3)
    harness.engine.close()
    again = make(kv=kv)

    def refuse(*_: object) -> None:
        raise BackendError("Of a wrong size.")

    monkeypatch.setattr(again.backend, "import_kv", refuse)
    events = again.run(*said, 1)
    assert cached(events) == 0
    assert tokens(events) == expected([*said, 1], scrambled, most=3)


def test_a_backend_that_cannot_export_goes_on_without_a_cache(make: Callable[..., Harness], kv: KvCache) -> None:
    harness = make(kv=kv)
    harness.backend.can_export = False
    said = chat(harness, 2)
    chat(harness, 1, start=range(500, 900))
    events = harness.run(*said, 1)
    assert tokens(events) == expected([*said, 1], scrambled, most=3)
    assert finished(events).chunks == ()


def test_a_long_prompt_that_fails_has_left_what_was_read(make: Callable[..., Harness], kv: KvCache) -> None:
    harness = make(kv=kv, step_tokens=256)
    harness.backend.fail[20] = RuntimeError("device lost")
    prompt = [n % 1000 for n in range(7000)]
    with pytest.raises(BackendError):
        harness.run(*prompt)
    assert cached(harness.run(*prompt)) == 4096, "saved every 2,048 tokens"


def test_of_a_prompt_that_is_still_read_only_whole_chunks_are_saved(make: Callable[..., Harness], kv: KvCache, tmp_path: Path) -> None:
    harness = make(kv=kv, step_tokens=100)
    harness.backend.fail[45] = RuntimeError("device lost")
    prompt = [n % 1000 for n in range(7000)]
    with pytest.raises(BackendError):
        harness.run(*prompt)
    kv.flush()
    known = set(kv.names(harness.backend.fingerprint, prompt))
    stored = Disk(tmp_path / "kv").names()
    assert stored
    assert set(stored) <= known, "those that the reply would have named"


def test_what_is_not_to_persist_is_not_on_the_disk(make: Callable[..., Harness], kv: KvCache, tmp_path: Path) -> None:
    harness = make(kv=kv)
    prompt = range(400)
    harness.run(*prompt, persist=False)
    harness.run(*range(500, 600), persist=False)
    assert cached(harness.run(*prompt, persist=False)) == 399
    harness.engine.close()
    kv.flush()
    assert kv.sizes().disk == 0


def test_the_end_names_the_chunks_of_the_whole_conversation(make: Callable[..., Harness], kv: KvCache) -> None:
    harness = make(kv=kv)
    events = harness.run(*range(600), max_tokens=10)
    names = finished(events).chunks
    assert len(names) == 3
    harness.engine.close()
    kv.flush()
    kv.delete(names)
    assert kv.sizes() == type(kv.sizes())(0, 0)


def test_so_does_the_end_of_one_that_was_cancelled(make: Callable[..., Harness], kv: KvCache) -> None:
    harness = make(kv=kv)
    reply = harness.engine.submit(request(*range(300), max_tokens=None))
    events = [next(reply) for _ in range(20)]
    reply.cancel()
    events += list(reply)
    assert end(events) == "cancelled"
    harness.engine.close()
    kv.flush()
    kv.delete(finished(events).chunks)
    assert kv.sizes() == type(kv.sizes())(0, 0)


def test_and_of_one_that_was_cancelled_while_it_had_no_place(make: Callable[..., Harness], kv: KvCache, tmp_path: Path) -> None:
    harness = make(kv=kv, step_tokens=512)
    waiting: list[int] = []

    def rule(sequence: Sequence[int]) -> int:
        if len(sequence) > 4200 and not waiting:  # from 4,096 on there is no room for the other one beside it
            waiting.append(500 - sequence[0])
            replies[waiting[0]].cancel()
        return scrambled(sequence)

    harness.backend.rule = rule
    prompts = {start: [(start + n) % 1000 for n in range(2500)] for start in (0, 500)}
    with harness.held():
        replies = {start: harness.engine.submit(request(*prompt, max_tokens=2500)) for start, prompt in prompts.items()}
    events = {start: list(reply) for start, reply in replies.items()}
    assert harness.backend.layouts == [Layout(2, 4096), Layout(1, 8192)]
    assert end(events[waiting[0]]) == "cancelled"
    harness.engine.close()
    kv.flush()
    kv.delete(name for one in events.values() for name in finished(one).chunks)
    assert Disk(tmp_path / "kv").names() == []


def test_what_is_to_be_forgotten_is_nowhere_afterwards(make: Callable[..., Harness], kv: KvCache) -> None:
    harness = make(kv=kv)
    harness.run(*range(500, 900))
    names = finished(harness.run(*range(300), max_tokens=10)).chunks
    harness.engine.forget(names)
    assert cached(harness.run(*range(300))) == 0, "neither on the device nor in the cache"
    harness.engine.forget(names)
    harness.engine.close()
    kv.flush()
    assert not set(names[:1]) & set(finished(make(kv=kv).run(*range(500, 900))).chunks)
    with pytest.raises(UsageError):
        harness.engine.forget(names)


def test_what_is_forgotten_is_not_saved_later(make: Callable[..., Harness], kv: KvCache) -> None:
    harness = make(kv=kv)
    names = finished(harness.run(*range(300), max_tokens=10)).chunks
    harness.engine.forget(names)
    harness.engine.close()
    kv.flush()
    assert kv.sizes() == type(kv.sizes())(0, 0)


class Broken:
    """A KV cache with a fault of its own."""

    def __getattr__(self, name: str):
        if name in ("find", "missing", "save"):
            raise RuntimeError("broken")
        return lambda *_: ()


def test_a_kv_cache_that_fails_costs_no_reply(make: Callable[..., Harness]) -> None:
    harness = make(kv=Broken())
    for start in (0, 400, 0):
        prompt = range(start, start + 300)
        assert tokens(harness.run(*prompt)) == expected(prompt, scrambled, most=3)


@pytest.mark.parametrize("method", ["trim", "fork", "import_kv", "export_kv"])
def test_a_backend_that_fails_between_steps_loses_no_sequence(
    make: Callable[..., Harness], kv: KvCache, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    harness = make(kv=kv)
    real = getattr(harness.backend, method)
    failing = [True]

    def fail(*arguments):
        if failing[0]:
            raise RuntimeError("device lost")
        return real(*arguments)

    monkeypatch.setattr(harness.backend, method, fail)
    for _ in range(4):
        for reply in [harness.engine.submit(request(*range(200), number, *range(300), max_tokens=20)) for number in range(4)]:
            with suppress(BackendError):
                list(reply)
    failing[0] = False
    for number in range(12):
        prompt = (*range(200), number, 5)
        assert tokens(harness.run(*prompt)) == expected(prompt, scrambled, most=3)


# Side by side


def test_requests_with_a_common_beginning_compute_it_once(make: Callable[..., Harness]) -> None:
    harness = make()
    system = list(range(500))
    list(harness.engine.generate(request(*system, 1)))
    with harness.held():
        replies = [harness.engine.submit(request(*system, 10 + number, max_tokens=20)) for number in range(6)]
        harness.backend.held.acquire()
    events = [list(reply) for reply in replies]
    assert [tokens(one) for one in events] == [expected([*system, 10 + number], scrambled, most=20) for number in range(6)]
    assert [cached(one) for one in events] == [500] * 6
    assert harness.backend.forks == [500] * 5


def test_chats_side_by_side_keep_their_places(make: Callable[..., Harness]) -> None:
    harness = make(rule=scrambled)
    said = [[number] * 200 for number in range(4)]
    for _ in range(3):
        with harness.held():
            replies = [harness.engine.submit(request(*one, max_tokens=30)) for one in said]
            harness.backend.held.acquire()
        for one, reply in zip(said, replies, strict=True):
            events = list(reply)
            known = cached(events)
            assert known in (0, len(one) - 2, len(one) - 1)
            one += [*tokens(events), 5]
            last = known
    assert last > 200


# Stretched positions


def test_yarn_is_switched_on_only_for_what_needs_it_and_kv_is_never_shared(make: Callable[..., Harness], kv: KvCache) -> None:
    harness = make(kv=kv, context=1024, yarn_context=4096)
    prompt = [n % 1000 for n in range(1000)]
    harness.run(*prompt)
    assert not harness.engine.layout.yarn
    long = harness.run(*prompt, max_tokens=200)
    assert harness.engine.layout.yarn
    assert harness.engine.layout.context <= 4096
    assert cached(long) == 0, "its positions mean something else"
    assert len(tokens(long)) == 200
    again = harness.run(*prompt)
    assert not harness.engine.layout.yarn
    assert cached(again) == 999, "of the first one"


def test_a_long_and_a_short_request_take_turns(make: Callable[..., Harness]) -> None:
    harness = make(context=1024, yarn_context=4096)
    with harness.held():
        long = harness.engine.submit(request(*(n % 1000 for n in range(2000)), max_tokens=20))
        short = harness.engine.submit(request(5, max_tokens=20))
        harness.backend.held.acquire()
    assert end(list(long)) == "length"
    assert tokens(short) == expected([5], scrambled, most=20)
    assert [layout.yarn for layout in harness.backend.layouts] == [True, False]


def test_what_is_too_long_even_for_yarn_is_refused_with_the_counts(make: Callable[..., Harness]) -> None:
    harness = make(context=1024, yarn_context=2048)
    with pytest.raises(ContextOverflow, match=r"3,000 tokens.* 2,048 "):
        harness.run(*([1] * 3000))
    assert harness.engine.layout == Layout(1, 1024)


def test_a_reply_without_a_limit_does_not_ask_for_yarn(make: Callable[..., Harness]) -> None:
    harness = make(context=1024, yarn_context=2048)
    events = harness.run(*([1] * 1000), max_tokens=None)
    assert end(events) == "context"
    assert isinstance(events[-1], Finished)
    assert len(tokens(events)) == 24

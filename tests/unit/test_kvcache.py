"""The KV cache finds what is known of a prompt: whole chunks, a tail, the beginning of a chunk that goes on otherwise."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from qwen2_local import fit, kvcache
from qwen2_local.backends.base import Chunk
from qwen2_local.kvcache import KvCache
from tests.support.kv import PROMPT, data_of, export, known, save

FP = "ab" * 32


@pytest.fixture(params=["ram", "disk", "both"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[KvCache]:
    """One with RAM only, one that reads all from disk, one as in use."""
    folder = None if request.param == "ram" else tmp_path / "kv"
    cache = KvCache(folder, budget=10**9, memory=0 if request.param == "disk" else 10**8)
    yield cache
    cache.close()


def test_a_second_turn_finds_the_first(cache: KvCache) -> None:
    save(cache, FP, PROMPT[:600])
    assert known(cache, FP, PROMPT[:900]) == 600
    assert cache.missing(FP, PROMPT[:900]) == [(512, 768), (768, 900)]


@pytest.mark.parametrize("length", [10, 300, 599, 600, 900])
def test_asking_how_much_is_known_says_the_same_and_changes_nothing(cache: KvCache, length: int) -> None:
    save(cache, FP, PROMPT[:600])
    assert cache.known(FP, PROMPT[:length]) == known(cache, FP, PROMPT[:length]) == min(length, 600)
    save(cache, FP, [7] * 600)  # the other was used before this one
    before = list(cache._memory._held)
    cache.known(FP, PROMPT[:600])
    assert list(cache._memory._held) == before
    cache.close()
    assert cache.known(FP, PROMPT[:600]) == 0


def test_saving_a_turn_asks_only_for_what_is_new(cache: KvCache) -> None:
    assert cache.missing(FP, PROMPT[:600]) == [(0, 256), (256, 512), (512, 600)]
    save(cache, FP, PROMPT[:600])
    assert cache.missing(FP, PROMPT[:600]) == []
    assert save(cache, FP, PROMPT[:600]) == cache.names(FP, PROMPT[:600]), "all names, though nothing was new"


@pytest.mark.parametrize("edited", [0, 1, 15, 16, 17, 255, 256, 300, 511, 512, 599])
def test_after_an_edit_all_that_is_before_it_is_known(cache: KvCache, edited: int) -> None:
    save(cache, FP, PROMPT[:600])
    other = [*PROMPT[:edited], 7, *PROMPT[edited:600]]
    assert known(cache, FP, other) == edited


def test_a_shorter_prompt_finds_its_part_of_a_longer_one(cache: KvCache) -> None:
    save(cache, FP, PROMPT[:600])
    assert known(cache, FP, PROMPT[:100]) == 100


def test_of_many_branches_the_one_that_matches_longest_is_found(cache: KvCache) -> None:
    for length in range(10, 200, 7):
        save(cache, FP, [*PROMPT[:length], *[1000 + length] * 60])
    for length in range(10, 200, 7):
        assert known(cache, FP, [*PROMPT[:length], *[1000 + length] * 20, 3]) == length + 20
    assert known(cache, FP, PROMPT[:500]) == 199


def test_a_prompt_may_begin_behind_what_a_sequence_holds_already(cache: KvCache) -> None:
    save(cache, FP, PROMPT[:600])
    found = cache.find(FP, PROMPT[:580], 256)
    assert (found.start, found.end) == (256, 580)
    assert [(hit.chunk.tokens, hit.tokens) for hit in found] == [(256, 256), (88, 68)]
    assert not cache.find(FP, PROMPT[:580], 768)
    with pytest.raises(ValueError):
        cache.find(FP, PROMPT, 100)


def test_nothing_is_found_of_another_fingerprint_or_other_tokens(cache: KvCache) -> None:
    save(cache, FP, PROMPT[:600])
    assert not cache.find("cd" * 32, PROMPT[:600])
    assert not cache.find(FP, [1, *PROMPT[:600]])
    assert not cache.find(FP, [])
    assert list(cache.find(FP, [])) == []


def test_a_tail_goes_when_it_has_grown_but_one_of_a_branch_stays(cache: KvCache) -> None:
    save(cache, FP, PROMPT[:300])
    before = cache.sizes()
    branch = [*PROMPT[:290], *range(40)]
    save(cache, FP, branch)
    save(cache, FP, PROMPT[:320])
    assert known(cache, FP, PROMPT[:320]) == 320
    assert known(cache, FP, branch) == 330
    assert FP and cache.missing(FP, PROMPT[:300]) == [(256, 300)], "the shorter tail is gone"
    cache.delete(cache.names(FP, branch)[1:])
    save(cache, FP, PROMPT[:512])
    after = cache.sizes()
    assert known(cache, FP, PROMPT[:512]) == 512
    assert (after.disk or after.memory) < 2 * (before.disk or before.memory)


def test_deleted_is_gone_at_once_and_the_rest_stays(cache: KvCache) -> None:
    names = save(cache, FP, PROMPT[:600])
    cache.delete(names[1:])
    assert known(cache, FP, PROMPT[:600]) == 256
    cache.delete([*names, "../../etc/passwd", "", "x" * 16])
    assert known(cache, FP, PROMPT[:600]) == 0
    assert cache.sizes() == kvcache.Sizes(0, 0)


def test_what_waits_to_be_stored_is_deleted_as_well(tmp_path: Path) -> None:
    for _ in range(20):
        cache = KvCache(tmp_path / "kv", budget=10**9)
        names = cache.save(FP, PROMPT, *export(cache, FP, PROMPT))
        cache.delete(names)
        cache.close()
        assert [path for path in (tmp_path / "kv").rglob("*") if path.is_file()] == []


def test_a_new_process_goes_on_where_another_ended(tmp_path: Path) -> None:
    first = KvCache(tmp_path, budget=10**9)
    save(first, FP, PROMPT[:600], flush=False)
    first.close()
    with_less_memory = KvCache(tmp_path, budget=10**9, memory=0)
    assert known(with_less_memory, FP, PROMPT[:700]) == 600
    assert with_less_memory.missing(FP, PROMPT[:600]) == []
    with_less_memory.close()


def test_what_is_not_to_persist_never_reaches_the_disk_until_it_is(tmp_path: Path) -> None:
    cache = KvCache(tmp_path / "kv", budget=10**9)
    save(cache, FP, PROMPT[:600], persist=False)
    assert known(cache, FP, PROMPT[:600]) == 600
    assert not (tmp_path / "kv").exists()
    save(cache, FP, PROMPT[:600])
    cache.close()
    again = KvCache(tmp_path / "kv", budget=10**9)
    assert known(again, FP, PROMPT[:600]) == 600
    again.close()


def test_chunks_are_of_their_owner_only(tmp_path: Path) -> None:
    (tmp_path / "kv").mkdir(mode=0o755)
    cache = KvCache(tmp_path / "kv", budget=10**9, model="7b:q4_0")
    save(cache, FP, PROMPT[:600])
    for path in [tmp_path / "kv", *(tmp_path / "kv").rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    cache.close()


def test_memory_is_bounded_and_the_least_recently_used_goes() -> None:
    size = len(data_of(PROMPT[:256], 256))
    cache = KvCache(None, memory=3 * size)
    save(cache, FP, PROMPT[:768])
    assert known(cache, FP, PROMPT[:768]) == 768
    save(cache, FP, [9] * 256)
    assert known(cache, FP, PROMPT[:768]) == 512, "the end of the path, as an end is no use without its beginning"
    assert cache.sizes().memory <= 3 * size
    save(cache, FP, PROMPT[:768])
    assert known(cache, FP, [9] * 256) == 0
    cache.close()


def test_data_may_be_a_view_that_is_reused() -> None:
    cache = KvCache(None, memory=10**6)
    buffer = bytearray(b"a" * 1000)
    cache.save(FP, PROMPT[:100], [(0, 100)], [Chunk(100, memoryview(buffer))])
    buffer[:] = b"b" * 1000
    (hit,) = cache.find(FP, PROMPT[:100])
    assert bytes(hit.chunk.data) == b"a" * 1000
    cache.close()


def test_chunks_that_do_not_fit_their_ranges_are_refused() -> None:
    cache = KvCache(None)
    for ranges, chunks in (([(0, 100)], [Chunk(99, b"")]), ([(0, 100)], []), ([(0, 99)], [Chunk(99, b"")])):
        with pytest.raises((ValueError, KeyError)):
            cache.save(FP, PROMPT[:100], ranges, chunks)
    cache.close()


def test_a_forked_child_has_no_part_in_it(tmp_path: Path) -> None:
    cache = KvCache(tmp_path, budget=10**9)
    save(cache, FP, PROMPT[:600])
    child = os.fork()
    if not child:
        code = 1
        try:
            assert not cache.find(FP, PROMPT[:600])
            assert cache.missing(FP, PROMPT) == []
            assert cache.save(FP, PROMPT[:100], [], []) == ()
            cache.delete(cache.names(FP, PROMPT[:600]))
            assert cache.flush()
            cache.close()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert known(cache, FP, PROMPT[:600]) == 600
    cache.close()


def test_closed_it_keeps_nothing_more(tmp_path: Path) -> None:
    cache = KvCache(tmp_path, budget=10**9)
    cache.close()
    cache.close()
    cache.save(FP, PROMPT[:10], [(0, 10)], [Chunk(10, b"x")])
    assert cache.sizes().disk == 0


def test_a_small_machine_keeps_less_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN2_LOCAL_HOME", str(tmp_path))
    for gigabytes, most in ((4, 125_000_000), (64, 512 << 20)):
        monkeypatch.setattr(fit, "machine_memory", lambda total=gigabytes * 10**9: fit.Memory(total, total))
        with closing(kvcache.open_default()) as kv:
            assert kv._memory._limit == most

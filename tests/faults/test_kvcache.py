"""Whatever lies in the KV cache's folder, and whatever the disk does: what is found is right, or it is a miss and computed again."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import struct
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen2_local.errors import DoesNotFit
from qwen2_local.kvcache import Disk, KvCache, chain, record, writer
from tests.support.kv import PROMPT, data_of, known, save

FP, OTHER = "ab" * 32, "cd" * 32
TOKENS = PROMPT[:600]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One with 600 tokens in three files."""
    cache = KvCache(tmp_path / "kv", budget=10**9, memory=0)
    save(cache, FP, TOKENS)
    cache.close()
    return tmp_path / "kv"


@pytest.fixture
def cache(folder: Path) -> Iterator[KvCache]:
    """One that reads everything from that folder."""
    cache = KvCache(folder, budget=10**9, memory=0)
    yield cache
    cache.close()


def path_of(folder: Path, number: int, fingerprint: str = FP) -> Path:
    name = chain.links(fingerprint, TOKENS)[number].name
    fp, rest = name.split("/")
    return folder / fp / rest[:2] / rest


# What lies there


def forged(link: chain.Link, **changed: object) -> bytes:
    """A file whose checksum is right, of a link that is not that of its name."""
    other = chain.Link(
        **{"start": link.start, "packed": link.packed, "root": link.root, "parent": link.parent, "own": link.own, "name": link.name, **changed}
    )
    data = data_of(TOKENS[: link.end], link.count)
    return record.head(other, data) + data


def header(link: chain.Link, *, magic: bytes = b"QWEN2KV\0", version: int = 1, count: int = 256, zero: int = 0, length: int = 8192) -> bytes:
    return struct.pack("<8sHHIQ32s32s", magic, version, count, zero, length, link.root, link.parent) + bytes(32) + link.packed


def link(number: int = 1) -> chain.Link:
    return chain.links(FP, TOKENS)[number]


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut in the header": lambda path: path.write_bytes(path.read_bytes()[:50]),
    "cut in the tokens": lambda path: path.write_bytes(path.read_bytes()[:300]),
    "cut by a byte": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "a byte too many": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "zeros, as after a power cut": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a hole in the data": lambda path: path.write_bytes(path.read_bytes()[:2000] + bytes(512) + path.read_bytes()[2512:]),
    "something else": lambda path: path.write_text("<html>" * 2000),
    "another magic": lambda path: path.write_bytes(header(link(), magic=b"QWEN2KX\0") + bytes(8192)),
    "another version": lambda path: path.write_bytes(header(link(), version=2) + bytes(8192)),
    "no tokens": lambda path: path.write_bytes(header(link(), count=0) + bytes(8192)),
    "65,535 tokens": lambda path: path.write_bytes(header(link(), count=65535) + bytes(8192)),
    "a length of 2**63": lambda path: path.write_bytes(header(link(), length=1 << 63) + bytes(8192)),
    "a length of 2 GB, and the file as long": lambda path: (
        path.write_bytes(header(link(), length=2 << 30)),
        os.truncate(path, 120 + 1024 + (2 << 30)),
    ),
    "no checksum": lambda path: path.write_bytes(header(link()) + data_of(TOKENS[:512], 256)),
    "another fingerprint, checksum right": lambda path: path.write_bytes(forged(link(), root=chain.root_of(OTHER))),
    "another parent, checksum right": lambda path: path.write_bytes(forged(link(), parent=bytes(32))),
    "other tokens, checksum right": lambda path: path.write_bytes(forged(link(), packed=link(0).packed)),
    "fewer tokens, checksum right": lambda path: path.write_bytes(forged(link(), packed=link().packed[:-4])),
    "the file of another place": lambda path: path.write_bytes(path_of(path.parents[2], 0).read_bytes()),
    "a link to the file of another place": lambda path: (path.unlink(), path.symlink_to(path_of(path.parents[2], 0))),
    "a link to nowhere": lambda path: (path.unlink(), path.symlink_to(path.parent / "nowhere")),
    "a link to itself": lambda path: (path.unlink(), path.symlink_to(path)),
    "a link to a device": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a folder with things in it": lambda path: (path.unlink(), path.mkdir(), (path / "x").write_text("x")),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "a socket": lambda path: (path.unlink(), bind(path)),
}


def bind(path: Path) -> None:
    # Its full path may be too long for a socket's name.
    where = Path.cwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(path.name)
    finally:
        os.chdir(where)


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_bad_file_is_a_miss_goes_and_is_stored_again(folder: Path, cache: KvCache, kind: str) -> None:
    path = path_of(folder, 1)
    DAMAGE[kind](path)
    assert known(cache, FP, TOKENS) == 256
    assert not os.path.lexists(path), "removed"
    save(cache, FP, TOKENS)
    assert known(cache, FP, TOKENS) == 600


@pytest.mark.parametrize("kind", DAMAGE)
def test_nor_is_a_part_of_a_bad_file_taken(folder: Path, cache: KvCache, kind: str) -> None:
    DAMAGE[kind](path_of(folder, 1))
    assert known(cache, FP, [*TOKENS[:400], 1, 2, 3]) == 256


def test_a_bad_tail_is_a_miss_too(folder: Path, cache: KvCache) -> None:
    path = path_of(folder, 2)
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    assert known(cache, FP, [*TOKENS, 1]) == 512
    assert not path.exists()


@given(place=st.integers(0, 2), at=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_flipped_bit_goes_unseen(folder: Path, cache: KvCache, place: int, at: float, bit: int) -> None:
    path = path_of(folder, place)
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 1 << bit
    path.write_bytes(data)
    assert known(cache, FP, TOKENS) == 256 * place
    save(cache, FP, TOKENS)
    assert known(cache, FP, TOKENS) == 600


@given(junk=st.binary(max_size=400))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_a_miss(folder: Path, cache: KvCache, junk: bytes) -> None:
    path_of(folder, 0).write_bytes(junk)
    assert known(cache, FP, TOKENS) == 0
    save(cache, FP, TOKENS)


def test_a_file_under_a_name_that_promises_more_is_a_miss(folder: Path, cache: KvCache) -> None:
    """A tail's file, renamed as if its tokens were those that are looked for."""
    wanted = chain.links(FP, [*TOKENS[:512], *[5] * 80])[2]
    path = path_of(folder, 2)
    lie = path.with_name(wanted.name.split("/")[1])
    shutil.copy(path, lie)
    assert known(cache, FP, [*TOKENS[:512], *[5] * 90]) == 512
    assert not lie.exists()
    assert path.exists()


@pytest.mark.parametrize("depth", [0, 1])
def test_folders_that_are_links_are_not_followed(folder: Path, tmp_path: Path, depth: int) -> None:
    inner = path_of(folder, 0).parents[depth]
    elsewhere = tmp_path / "elsewhere"
    inner.rename(elsewhere)
    inner.symlink_to(elsewhere)
    before = sorted(elsewhere.rglob("*"))
    cache = KvCache(folder, budget=10**9, memory=0)
    assert known(cache, FP, TOKENS) == 0
    save(cache, FP, PROMPT[:300])
    cache.clear()
    cache.close()
    assert sorted(elsewhere.rglob("*")) == before, "nothing is written or deleted there"


def test_other_things_in_the_folder_are_left_alone(folder: Path, cache: KvCache) -> None:
    mine = [folder / "notes.txt", folder / "0123456789abcdef", path_of(folder, 0).parent / "notes.txt", folder / "photos"]
    mine[3].mkdir()
    for path in mine[:3]:
        path.write_text("mine")
    assert known(cache, FP, TOKENS) == 600
    cache.clear()
    assert known(cache, FP, TOKENS) == 0
    assert all(path.exists() for path in mine)


def test_names_from_a_damaged_database_delete_nothing_else(folder: Path, cache: KvCache, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("")
    cache.delete(["../precious", str(precious), "..", "\0", "a" * 16 + "/../../precious", *(name.upper() for name in cache.names(FP, TOKENS))])
    assert precious.exists()
    assert known(cache, FP, TOKENS) == 600


# What the disk does


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_a_disk_that_refuses_leaves_all_in_memory_with_one_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    notes: list[str] = []
    cache = KvCache(tmp_path / "kv", budget=10**9, tell=notes.append)

    def full(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr("qwen2_local.files.write_all", full)
        save(cache, FP, TOKENS)
        save(cache, FP, PROMPT[:700])
        assert known(cache, FP, PROMPT[:700]) == 700
    assert len(notes) == 1
    assert str(tmp_path / "kv") in notes[0]
    assert [path for path in (tmp_path / "kv").rglob("*") if path.is_file()] == [], "nothing half-written"
    monkeypatch.setattr(writer, "_RETRY_S", 0.0)
    cache._writer._retry = 0.0  # type: ignore[union-attr]
    save(cache, FP, PROMPT[:700])
    cache.close()
    again = KvCache(tmp_path / "kv", budget=10**9, memory=0)
    assert known(again, FP, PROMPT[:700]) == 700, "what could not be stored is, once there is room"
    again.close()


def test_a_fault_of_its_own_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = KvCache(tmp_path / "kv", budget=10**9)

    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(Disk, "write", broken)
        names = save(cache, FP, TOKENS)
        assert known(cache, FP, TOKENS) == 600
        cache.delete(names)
    save(cache, FP, TOKENS)
    assert cache.sizes().disk > 0
    cache.close()


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "kv").write_text("mine")
    notes: list[str] = []
    cache = KvCache(tmp_path / "kv", budget=10**9, tell=notes.append)
    save(cache, FP, TOKENS)
    assert known(cache, FP, TOKENS) == 600
    assert (len(notes), (tmp_path / "kv").read_text()) == (1, "mine")
    cache.close()


def test_a_folder_that_goes_away_under_way(folder: Path, cache: KvCache) -> None:
    assert known(cache, FP, TOKENS) == 600
    found = cache.find(FP, TOKENS)
    shutil.rmtree(folder)
    assert list(found) == []
    assert known(cache, FP, TOKENS) == 0
    save(cache, FP, TOKENS)
    assert known(cache, FP, TOKENS) == 600


def test_what_was_found_and_then_evicted_is_a_miss_or_whole(folder: Path, cache: KvCache) -> None:
    found = iter(cache.find(FP, TOKENS))
    first = next(found)
    cache.clear()
    assert bytes(first.chunk.data) == data_of(TOKENS[:256], 256)
    for hit in found:
        assert bytes(hit.chunk.data)


def test_data_that_is_too_large_for_a_file_is_not_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "_MOST", 1000)
    cache = KvCache(tmp_path / "kv", budget=10**9)
    save(cache, FP, TOKENS)
    assert known(cache, FP, TOKENS) == 600
    cache.close()
    assert Disk(tmp_path / "kv").used() == 0


# The budget


def file_size(count: int = 256) -> int:
    return record.size_of(chain.links(FP, PROMPT[:count])[0], 32 * count)


def test_the_budget_is_kept_and_the_least_recently_used_goes(tmp_path: Path) -> None:
    cache = KvCache(tmp_path, budget=6 * file_size(), memory=0)
    chats = [[number] * 512 for number in range(5)]
    for chat in chats[:3]:
        save(cache, FP, chat)
    assert known(cache, FP, chats[0]) == 512  # used just now
    assert cache.flush()
    for chat in chats[3:]:
        save(cache, FP, chat)
        assert cache.sizes().disk <= 6 * file_size()
    assert [known(cache, FP, chat) for chat in chats] == [512, 0, 0, 512, 512]
    cache.close()


def test_of_a_conversation_the_end_is_evicted_first(tmp_path: Path) -> None:
    cache = KvCache(tmp_path, budget=6 * file_size(), memory=0)
    save(cache, FP, PROMPT[:1024])
    save(cache, FP, [7] * 768)
    assert known(cache, FP, PROMPT[:1024]) == 768
    assert known(cache, FP, [7] * 768) == 768
    cache.close()


@pytest.mark.parametrize(("chunks", "kept"), [(0, 0), (0.5, 0), (1, 256), (2.9, 512)])
def test_a_budget_smaller_than_the_conversation_keeps_its_beginning(tmp_path: Path, chunks: float, kept: int) -> None:
    cache = KvCache(tmp_path, budget=int(chunks * file_size()), memory=0)
    for _ in range(3):
        save(cache, FP, PROMPT[:1024])
        assert known(cache, FP, PROMPT[:1024]) == kept
        assert cache.sizes().disk <= chunks * file_size()
    cache.close()


@pytest.mark.parametrize("jump", [-10 * 365 * 86400, 10 * 365 * 86400])
def test_a_clock_that_jumps_does_not_keep_old_files_for_ever(tmp_path: Path, jump: float, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = KvCache(tmp_path, budget=4 * file_size(), memory=0)
    real = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: real() - int(jump * 1e9))
    for number in range(3):
        save(cache, FP, [number] * 512)
    for path in tmp_path.rglob("*-*"):  # files get the system's own time
        os.utime(path, ns=(time.time_ns(), time.time_ns()))
    monkeypatch.setattr(time, "time_ns", real)
    for number in range(10, 16):
        save(cache, FP, [number] * 512)
        assert known(cache, FP, [number] * 512) == 512, "what is new is kept"
    assert [known(cache, FP, [number] * 512) for number in range(3)] == [0, 0, 0], "what is old goes"
    cache.close()


def test_leftovers_of_crashes_are_swept_but_not_those_that_are_being_written(folder: Path) -> None:
    from qwen2_local import files

    part = path_of(folder, 0).parent
    dead = part / ".qwen2-0123456789abcdef"
    dead.write_bytes(bytes(1000))
    cache = KvCache(folder, budget=10**9, memory=0)
    with files.staging_file(part / "x", overwrite=True) as living:
        save(cache, OTHER, TOKENS)
        assert living.exists()
    assert not dead.exists()
    cache.close()


def test_more_than_can_wait_is_dropped_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen2_local.kvcache.cache._WAITING", 20_000)
    cache = KvCache(tmp_path, budget=10**9)
    save(cache, FP, PROMPT[:1200])
    assert Disk(tmp_path).used() == 2 * file_size()
    save(cache, FP, PROMPT[:1200])
    assert Disk(tmp_path).used() == 4 * file_size(), "the next save stores what is still in memory"
    cache.close()


# Processes


def process(code: str, *arguments: object) -> subprocess.Popen[str]:
    line = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(line, cwd=ROOT, env={"PYTHONPATH": str(ROOT), "PATH": ""}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


EVICTING = """
    import random, sys, time
    from pathlib import Path
    from qwen2_local.kvcache import KvCache
    from tests.support.kv import PROMPT, known, save

    folder, seed, seconds, budget = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
    random = random.Random(seed)
    notes = []
    cache = KvCache(folder, budget=budget, memory=random.choice((0, 30_000)), tell=notes.append)
    end, turns, hits = time.monotonic() + seconds, 0, 0
    while time.monotonic() < end:
        chat = [random.randrange(4), *PROMPT[: random.randrange(1, 900)], random.randrange(3)]
        hits += known(cache, "ab" * 32, chat) > 0
        names = save(cache, "ab" * 32, chat, flush=random.random() < 0.5)
        if random.random() < 0.1:
            cache.delete(names[-1:])
        if random.random() < 0.02:
            cache.clear()
        turns += 1
    cache.close()
    assert not notes, notes
    print(turns, hits)
"""


@pytest.mark.parametrize("chunks", [1, 5, 20])
def test_processes_that_evict_against_each_other_find_nothing_wrong(tmp_path: Path, chunks: int) -> None:
    seconds, budget = float(os.environ.get("KV_SECONDS", "3")), chunks * file_size()
    running = [process(EVICTING, tmp_path / "kv", seed, seconds, budget) for seed in range(3)]
    most = 0
    while any(one.poll() is None for one in running):
        most = max(most, Disk(tmp_path / "kv").used())
        time.sleep(0.01)
    for one in running:
        out, err = one.communicate()
        assert one.returncode == 0, err
        turns, hits = map(int, out.split())
        assert turns > 10
        assert hits > 0
    assert most <= budget + 3 * file_size(), "each may be about to store one"
    assert Disk(tmp_path / "kv").used() <= budget + 2 * file_size()
    assert not list((tmp_path / "kv").rglob(".qwen2-*"))


def test_a_process_that_just_ends_stores_what_it_saved(tmp_path: Path) -> None:
    code = """
        import sys
        from pathlib import Path
        from qwen2_local.kvcache import KvCache
        from tests.support.kv import PROMPT, save
        cache = KvCache(Path(sys.argv[1]), budget=10**9)
        save(cache, "ab" * 32, PROMPT, flush=False)
    """
    assert process(code, tmp_path).communicate(timeout=30) == ("", "")
    cache = KvCache(tmp_path, budget=10**9)
    assert known(cache, FP, PROMPT) == len(PROMPT)
    cache.close()


def test_a_disk_that_hangs_does_not_keep_a_process_from_ending(tmp_path: Path) -> None:
    code = """
        import sys, time
        from pathlib import Path
        from qwen2_local.kvcache import Disk, KvCache, cache as module
        from tests.support.kv import PROMPT, save
        module._CLOSE_S = 0.3
        Disk.write = lambda *_: time.sleep(60)
        cache = KvCache(Path(sys.argv[1]), budget=10**9)
        save(cache, "ab" * 32, PROMPT, flush=False)
    """
    started = time.monotonic()
    assert process(code, tmp_path).communicate(timeout=30) == ("", "")
    assert time.monotonic() - started < 20


def test_full_is_said_with_what_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    disk = Disk(tmp_path, 10**9)
    monkeypatch.setattr("qwen2_local.files.write_all", full)
    with pytest.raises(DoesNotFit, match="disk is full"):
        disk.write(chain.links(FP, TOKENS)[0], b"x")

"""KV taken out of MLX and put back is what it was, to the bit; sequences fork without seeing each other; nothing wrong gets in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen2_local.backends.base import Choice, Chunk, Layout, Row
from qwen2_local.errors import BackendError, ContextOverflow
from tests.support import mlx_models, random_qwen2

mlx = pytest.importorskip("qwen2_local.backends.mlx")

VOCABULARY = 320
TOKENS = [int(n) for n in np.random.RandomState(3).randint(0, VOCABULARY, 120)]


@pytest.fixture(scope="module", params=["dense", "moe"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = random_qwen2.config() if request.param == "dense" else random_qwen2.moe_config()
    return random_qwen2.write_mlx(tmp_path_factory.mktemp("mlx"), config, random_qwen2.weights(config, 2))


@pytest.fixture(params=[16, 8], ids=["16 bit", "8 bit"])
def backend(folder: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    backend = mlx_models.load(folder, context=600, sequences=3, kv_bits=request.param)
    yield backend
    backend.close()


def logits(backend: Any, sequence: int, tokens: list[int]) -> np.ndarray:
    got: np.ndarray = backend.step([Row(sequence, tokens, logits="last")])[0].logits
    return got


def data(chunks: list[Chunk]) -> list[bytes]:
    return [bytes(chunk.data) for chunk in chunks]


@pytest.mark.parametrize("ranges", [[(0, 64)], [(0, 16), (16, 64)], [(0, 1), (1, 2), (2, 63), (63, 64)]])
def test_put_back_it_gives_the_logits_of_a_cold_run_to_the_bit(backend: Any, ranges: list[tuple[int, int]]) -> None:
    sequence = backend.open()
    backend.step([Row(sequence, TOKENS[:64])])
    chunks = backend.export_kv(sequence, ranges)
    assert [chunk.tokens for chunk in chunks] == [stop - start for start, stop in ranges]
    assert [len(chunk.data) for chunk in chunks] == [chunk.tokens * backend.info.kv_bytes_per_token for chunk in chunks]
    cold = logits(backend, sequence, TOKENS[64:])
    backend.arrange(Layout(2, 300))
    backend.open()
    sequence = backend.open()
    backend.import_kv(sequence, chunks)
    assert data(backend.export_kv(sequence, ranges)) == data(chunks)
    np.testing.assert_array_equal(logits(backend, sequence, TOKENS[64:]), cold)


def test_behind_what_is_there_and_past_the_first_room(backend: Any) -> None:
    long = TOKENS * 4
    sequence = backend.open()
    backend.step([Row(sequence, long[:240])])
    backend.step([Row(sequence, long[240:270])])
    chunks = backend.export_kv(sequence, [(240, 256), (256, 270)])
    cold = logits(backend, sequence, long[270:])
    backend.trim(sequence, 240)
    backend.import_kv(sequence, [])
    backend.import_kv(sequence, chunks[:1])
    backend.import_kv(sequence, chunks[1:])
    np.testing.assert_array_equal(logits(backend, sequence, long[270:]), cold)


@pytest.mark.parametrize("wrong", ["short", "long", "other count", "none", "no bytes", "gaps", "second"])
def test_wrong_chunks_change_nothing(backend: Any, wrong: str) -> None:
    sequence = backend.open()
    backend.step([Row(sequence, TOKENS[:20])])
    cold = logits(backend, sequence, TOKENS[20:30])
    backend.trim(sequence, 20)
    (chunk,) = backend.export_kv(sequence, [(0, 20)])
    raw = bytes(chunk.data)
    bad = {
        "short": [Chunk(20, raw[:-1])],
        "long": [Chunk(20, raw + b"\0")],
        "other count": [Chunk(19, raw)],
        "none": [Chunk(0, b"")],
        "no bytes": [Chunk(20, "x" * len(raw))],  # type: ignore[arg-type]
        "gaps": [Chunk(20, memoryview(raw + raw)[::2])],
        "second": [chunk, Chunk(20, raw[:-1])],
    }[wrong]
    with pytest.raises(BackendError, match="chunk"):
        backend.import_kv(sequence, bad)
    np.testing.assert_array_equal(logits(backend, sequence, TOKENS[20:30]), cold)


def test_what_finds_no_room_changes_nothing(backend: Any) -> None:
    backend.arrange(Layout(1, 300))
    sequence = backend.open()
    backend.step([Row(sequence, TOKENS)])
    chunks = backend.export_kv(sequence, [(0, 120)])
    backend.import_kv(sequence, chunks)
    with pytest.raises(ContextOverflow, match=r"360 .* 300"):
        backend.import_kv(sequence, chunks)
    backend.trim(sequence, 240)


@pytest.mark.parametrize("ranges", [[(0, 31)], [(-1, 3)], [(3, 3)], [(5, 4)], [(0, 8), (4, 12)], [(8, 12), (0, 8)]])
def test_ranges_that_are_not_there(backend: Any, ranges: list[tuple[int, int]]) -> None:
    sequence = backend.open()
    backend.step([Row(sequence, TOKENS[:30])])
    with pytest.raises(BackendError):
        backend.export_kv(sequence, ranges)


def test_a_fork_and_its_origin_go_their_own_ways(backend: Any) -> None:
    first, other = backend.open(), backend.open()
    backend.step([Row(first, TOKENS[:50])])
    alone, forked = (logits(backend, first, TOKENS[50:90]), None)
    backend.step([Row(other, TOKENS[:30])])
    fresh = logits(backend, other, TOKENS[::-1][:40])
    backend.free(other)

    backend.trim(first, 50)
    fork = backend.fork(first, 30)
    # Both write past where they part, in turn and together.
    backend.step([Row(fork, TOKENS[::-1][:10])])
    backend.step([Row(first, TOKENS[50:60])])
    backend.trim(fork, 30)
    backend.trim(first, 50)
    forked = logits(backend, fork, TOKENS[::-1][:40])
    np.testing.assert_array_equal(logits(backend, first, TOKENS[50:90]), alone)
    np.testing.assert_allclose(forked, fresh, atol=0 if backend.info.kv_bytes_per_token == 512 else 2e-2)


def test_a_fork_outlives_its_origin(backend: Any) -> None:
    first = backend.open()
    backend.step([Row(first, TOKENS[:50])])
    expected = backend.fork(first, 50)
    cold = logits(backend, expected, TOKENS[50:])
    fork = backend.fork(first, 50)
    backend.free(first)
    backend.free(expected)
    backend.step([Row(backend.open(), TOKENS)])
    np.testing.assert_array_equal(logits(backend, fork, TOKENS[50:]), cold)


def test_forks_that_cannot_be(backend: Any) -> None:
    first = backend.open()
    backend.step([Row(first, TOKENS[:10])])
    for sequence, length in ((first, 11), (first, -1), (2, 0)):
        with pytest.raises(BackendError):
            backend.fork(sequence, length)
    backend.fork(first, 0)
    backend.fork(first, 10)
    with pytest.raises(BackendError, match="in use"):
        backend.fork(first, 10)


def test_arrange_forgets_all_sequences(backend: Any) -> None:
    backend.step([Row(backend.open(), TOKENS)])
    fingerprint = backend.fingerprint
    backend.arrange(Layout(1, 64))
    assert backend.layout == Layout(1, 64)
    assert backend.fingerprint == fingerprint
    with pytest.raises(BackendError, match="not open"):
        backend.step([Row(0, [1])])
    assert backend.open() == 0
    with pytest.raises(ContextOverflow):
        backend.step([Row(0, TOKENS)])
    for layout in (Layout(0, 64), Layout(1, 0), Layout(1, 64, yarn=True)):
        with pytest.raises(BackendError):
            backend.arrange(layout)
    assert backend.layout == Layout(1, 64)
    backend.step([Row(0, TOKENS[:64])])


def test_the_fingerprint_tells_what_changes_the_numbers(folder: Path) -> None:
    ways: list[dict[str, Any]] = [
        {},
        {"identity": "other"},
        {"adapter_identity": "some"},
        {"kv_bits": 8},
        {"yarn_factor": 4.0, "yarn_context": 256, "yarn_original": 64, "yarn": True},
        {"yarn_factor": 2.0, "yarn_context": 256, "yarn_original": 64, "yarn": True},
    ]
    prints = [mlx_models.load(folder, context=64, **way).fingerprint for way in ways]
    assert len(set(prints)) == len(ways)
    assert all(set(it) <= set("0123456789abcdef") for it in prints)
    assert mlx_models.load(folder, context=128, sequences=2, yarn_factor=4.0).fingerprint == prints[0]


def test_a_greedy_step_that_runs_ahead_is_never_taken_for_another(backend: Any) -> None:
    """Whatever happens between two greedy steps, the second gives what it gives with nothing before it."""
    choice = Choice(VOCABULARY)

    def tokens(prompt: list[int], count: int) -> list[int]:
        backend.arrange(Layout(3, 600))
        sequence, fed, got = backend.open(), prompt, []
        for _ in range(count):
            got.append(backend.step([Row(sequence, fed, [choice])])[0].chosen[0].token)
            fed = got[-1:]
        return got

    prompt, other = TOKENS[:20], TOKENS[50:60]
    expected, after_other, bounded = tokens(prompt, 6), tokens([*other, *prompt[10:]], 3), tokens(prompt, 3)
    assert bounded == expected[:3]

    def begin() -> tuple[int, int]:
        backend.arrange(Layout(3, 600))
        sequence = backend.open()
        backend.step([Row(sequence, prompt[:-1])])
        token = backend.step([Row(sequence, prompt[-1:], [choice])])[0].chosen[0].token
        assert token == expected[0]
        return sequence, token

    def next_of(sequence: int, token: int, limit: int = VOCABULARY) -> int:
        return int(backend.step([Row(sequence, [token], [Choice(limit)])])[0].chosen[0].token)

    sequence, token = begin()
    assert next_of(sequence, token) == expected[1]
    # Another history of the same length, with the same last token.
    sequence, token = begin()
    backend.trim(sequence, 0)
    backend.step([Row(sequence, [*other, *prompt[10:]])])
    assert next_of(sequence, after_other[0]) == after_other[1]
    # Other wishes.
    sequence, token = begin()
    limited = next_of(sequence, token, limit=expected[1])
    assert limited < expected[1]
    sequence, token = begin()
    assert int(logits(backend, sequence, [token]).argmax()) == expected[1]
    # Its KV is not that of the sequence.
    sequence, token = begin()
    with pytest.raises(BackendError):
        backend.export_kv(sequence, [(0, 21)])
    backend.import_kv(sequence, backend.export_kv(sequence, [(0, 20)]))
    assert next_of(backend.fork(sequence, 20), token) == expected[1]
    # Two at once, then one of them alone.
    sequence, token = begin()
    second = backend.fork(sequence, 20)
    both = backend.step([Row(sequence, [token], [choice]), Row(second, [token], [choice])])
    assert [one.chosen[0].token for one in both] == expected[1:2] * 2
    assert next_of(second, expected[1]) == expected[2]
    assert next_of(sequence, expected[1]) == expected[2]


def test_greedy_to_the_last_token_of_the_context(backend: Any) -> None:
    backend.arrange(Layout(1, 24))
    sequence, fed = backend.open(), TOKENS[:20]
    for _ in range(5):
        fed = [backend.step([Row(sequence, fed, [Choice(VOCABULARY)])])[0].chosen[0].token]
    with pytest.raises(ContextOverflow):
        backend.step([Row(sequence, fed, [Choice(VOCABULARY)])])

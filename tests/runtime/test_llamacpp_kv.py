"""KV taken out of llama.cpp and put back is what it was: to the bit, in any layout; and nothing wrong gets in."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qwen2_local.backends.base import Chunk, Layout, LoadOptions, Row
from qwen2_local.backends.llamacpp import LlamaCpp
from qwen2_local.errors import BackendError, ContextOverflow
from tests.support import tiny

TOKENS = [int(n) for n in np.random.default_rng(3).integers(0, tiny.VOCABULARY, 120)]
ONE, MANY = Layout(1, 256), Layout(3, 256)
CLOSE = 2e-2
"""Another batch size rounds otherwise, in a KV cache of 16 bits; the logits spread by about 4."""


@pytest.fixture
def backend(tiny_gguf: Path) -> Iterator[LlamaCpp]:
    backend = LlamaCpp.load(tiny_gguf, layout=ONE, threads=1)
    yield backend
    backend.close()


def logits(backend: LlamaCpp, sequence: int, tokens: list[int]) -> np.ndarray:
    result = backend.step([Row(sequence, tokens, logits="last")])[0].logits
    assert result is not None
    return result


def data(chunks: list[Chunk]) -> list[bytes]:
    return [bytes(chunk.data) for chunk in chunks]


@pytest.mark.parametrize("layout", [ONE, MANY])
@pytest.mark.parametrize("ranges", [[(0, 64)], [(0, 16), (16, 64)], [(0, 1), (1, 2), (2, 63), (63, 64)]])
def test_put_back_it_gives_the_logits_of_a_cold_run_to_the_bit(backend: LlamaCpp, layout: Layout, ranges: list[tuple[int, int]]) -> None:
    backend.arrange(layout)
    sequence = backend.open()
    backend.step([Row(sequence, TOKENS[:64])])
    chunks = backend.export_kv(sequence, ranges)
    assert [chunk.tokens for chunk in chunks] == [stop - start for start, stop in ranges]
    cold = logits(backend, sequence, TOKENS[64:])
    backend.free(sequence)
    sequence = backend.open()
    backend.import_kv(sequence, chunks)
    np.testing.assert_array_equal(logits(backend, sequence, TOKENS[64:]), cold)


def test_one_range_after_the_other_is_copied(backend: LlamaCpp) -> None:
    sequence = backend.open()
    backend.step([Row(sequence, TOKENS)])
    tracemalloc.start()
    try:
        chunks = backend.export_kv(sequence, [(start, start + 10) for start in range(0, 120, 10)])
        size, peak = sum(len(chunk.data) for chunk in chunks), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size <= peak < 1.5 * size, "of a long sequence a second copy may be more than there is room for"


@pytest.mark.parametrize("layout", [ONE, MANY])
def test_behind_what_is_there(backend: LlamaCpp, layout: Layout) -> None:
    backend.arrange(layout)
    sequence = backend.open()
    backend.step([Row(sequence, TOKENS[:30])])
    backend.step([Row(sequence, TOKENS[30:80])])
    chunks = backend.export_kv(sequence, [(30, 50), (50, 80)])
    cold = logits(backend, sequence, TOKENS[80:])
    backend.trim(sequence, 30)
    backend.import_kv(sequence, chunks[:1])
    backend.import_kv(sequence, [])
    backend.import_kv(sequence, chunks[1:])
    assert data(backend.export_kv(sequence, [(30, 50), (50, 80)])) == data(chunks)
    np.testing.assert_array_equal(logits(backend, sequence, TOKENS[80:]), cold)


def test_a_range_holds_its_own_tokens_only(backend: LlamaCpp) -> None:
    sequence = backend.open()
    backend.step([Row(sequence, TOKENS)])
    (whole,) = backend.export_kv(sequence, [(0, 120)])
    parts = backend.export_kv(sequence, [(10, 20), (20, 21), (100, 120)])
    rows = np.frombuffer(whole.data, np.uint8).reshape(2 * tiny.LAYERS, 120, -1)
    for part, (start, stop) in zip(parts, [(10, 20), (20, 21), (100, 120)], strict=True):
        assert bytes(part.data) == rows[:, start:stop].tobytes()
        assert len(part.data) == (stop - start) * backend.info.kv_bytes_per_token
    assert backend.export_kv(sequence, []) == []
    # Looking changed nothing.
    assert data(backend.export_kv(sequence, [(0, 120)])) == data([whole])


def test_chunks_move_between_the_layouts(backend: LlamaCpp) -> None:
    sequence, fingerprint = backend.open(), backend.fingerprint
    backend.step([Row(sequence, TOKENS[:64])])
    chunks = backend.export_kv(sequence, [(0, 32), (32, 64)])
    cold = logits(backend, sequence, TOKENS[64:])

    backend.arrange(MANY)
    assert backend.fingerprint == fingerprint
    other, moved = backend.open(), backend.open()
    backend.step([Row(other, TOKENS[::-1])])
    backend.import_kv(moved, chunks)
    assert data(backend.export_kv(moved, [(0, 32), (32, 64)])) == data(chunks)
    np.testing.assert_allclose(logits(backend, moved, TOKENS[64:]), cold, atol=CLOSE)
    grown = backend.export_kv(moved, [(0, 64), (64, 120)])

    backend.arrange(ONE)
    sequence = backend.open()
    backend.import_kv(sequence, grown)
    backend.trim(sequence, 64)
    np.testing.assert_array_equal(logits(backend, sequence, TOKENS[64:]), cold)


@pytest.mark.parametrize("layout", [ONE, MANY])
@pytest.mark.parametrize("wrong", ["short", "long", "other count", "none", "no bytes", "gaps", "second"])
def test_wrong_chunks_change_nothing(backend: LlamaCpp, layout: Layout, wrong: str) -> None:
    backend.arrange(layout)
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


@pytest.mark.parametrize("layout", [ONE, MANY])
def test_what_finds_no_room_changes_nothing(backend: LlamaCpp, layout: Layout) -> None:
    backend.arrange(layout)
    sequence = backend.open()
    backend.step([Row(sequence, TOKENS)])
    chunks = backend.export_kv(sequence, [(0, 120)])
    backend.import_kv(sequence, chunks)
    with pytest.raises(ContextOverflow, match=r"360 .* 256"):
        backend.import_kv(sequence, chunks)
    backend.step([Row(sequence, [1] * 16)])
    with pytest.raises(ContextOverflow):
        backend.step([Row(sequence, [1])])


@pytest.mark.parametrize("layout", [ONE, MANY])
def test_if_llama_cpp_refuses_the_sequence_is_as_before(backend: LlamaCpp, layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    backend.arrange(layout)
    sequence = backend.open()
    backend.step([Row(sequence, TOKENS[:20])])
    chunks = backend.export_kv(sequence, [(0, 10), (10, 20)])
    real, calls = backend._lib.llama_state_seq_set_data, []

    def failing(*arguments: object) -> int:
        calls.append(arguments)
        return 0 if len(calls) == (2 if layout == ONE else 1) else real(*arguments)

    monkeypatch.setattr(backend._lib, "llama_state_seq_set_data", failing)
    with pytest.raises(BackendError):
        backend.import_kv(sequence, chunks)
    assert data(backend.export_kv(sequence, [(0, 10), (10, 20)])) == data(chunks)
    with pytest.raises(BackendError):
        backend.trim(sequence, 21)
    backend.step([Row(sequence, TOKENS[20:])])


@pytest.mark.parametrize("layout", [ONE, MANY])
@pytest.mark.parametrize("change", [{"kind": 8}, {"row": 256}, {"layers": 1}])
def test_a_form_that_is_unknown_is_an_error(backend: LlamaCpp, layout: Layout, change: dict[str, int]) -> None:
    backend.arrange(layout)
    sequence = backend.open()
    backend.step([Row(sequence, TOKENS[:20])])
    cold = logits(backend, sequence, TOKENS[20:30])
    backend.trim(sequence, 20)
    backend._memory.form = form = replace(backend._memory.form, **change)
    with pytest.raises(BackendError, match="unknown"):
        backend.export_kv(sequence, [(0, 20)])
    with pytest.raises(BackendError):
        backend.import_kv(sequence, [Chunk(20, bytes(20 * form.token_bytes))])
    np.testing.assert_array_equal(logits(backend, sequence, TOKENS[20:30]), cold)


@pytest.mark.parametrize("ranges", [[(5, 5)], [(6, 5)], [(-1, 3)], [(0, 41)], [(40, 41)], [(3, 6), (5, 8)], [(5, 8), (3, 5)]])
def test_ranges_have_to_lie_in_the_sequence(backend: LlamaCpp, ranges: list[tuple[int, int]]) -> None:
    sequence = backend.open()
    backend.step([Row(sequence, TOKENS[:40])])
    with pytest.raises(BackendError, match="cannot be exported"):
        backend.export_kv(sequence, ranges)


def test_eight_bits_move_as_well(tiny_gguf: Path) -> None:
    backend = LlamaCpp.load(tiny_gguf, layout=MANY, options=LoadOptions("", 256, kv_bits=8), threads=1)
    sequence = backend.open()
    backend.step([Row(sequence, TOKENS[:64])])
    (chunk,) = backend.export_kv(sequence, [(0, 64)])
    assert len(chunk.data) == 64 * backend.info.kv_bytes_per_token == 64 * tiny.KV_BYTES_PER_TOKEN * 17 // 32
    cold = logits(backend, sequence, TOKENS[64:])
    backend.trim(sequence, 0)
    backend.import_kv(sequence, [chunk])
    np.testing.assert_array_equal(logits(backend, sequence, TOKENS[64:]), cold)
    backend.arrange(ONE)
    sequence = backend.open()
    backend.import_kv(sequence, [chunk])
    assert data(backend.export_kv(sequence, [(0, 64)])) == data([chunk])
    backend.close()


def test_a_fork_is_as_if_computed_anew(backend: LlamaCpp) -> None:
    backend.arrange(MANY)
    sequence = backend.open()
    backend.step([Row(sequence, TOKENS[:60])])
    fork, empty = backend.fork(sequence, 40), backend.fork(sequence, 0)
    forked = logits(backend, fork, TOKENS[80:90])
    onward = logits(backend, sequence, TOKENS[60:70])
    np.testing.assert_allclose(logits(backend, empty, TOKENS[:40] + TOKENS[80:90]), forked, atol=CLOSE)

    backend.trim(sequence, 40)
    np.testing.assert_array_equal(logits(backend, sequence, TOKENS[80:90]), forked)
    backend.trim(fork, 40)
    backend.step([Row(fork, TOKENS[40:60])])
    np.testing.assert_allclose(logits(backend, fork, TOKENS[60:70]), onward, atol=CLOSE)
    with pytest.raises(BackendError, match="in use"):
        backend.fork(sequence, 10)


@pytest.mark.parametrize("length", [-1, 31])
def test_a_fork_is_no_longer_than_what_is_there(backend: LlamaCpp, length: int) -> None:
    backend.arrange(MANY)
    sequence = backend.open()
    backend.step([Row(sequence, TOKENS[:30])])
    with pytest.raises(BackendError, match="forked"):
        backend.fork(sequence, length)
    assert [backend.open(), backend.open()] == [1, 2]


def test_one_sequence_cannot_be_forked(backend: LlamaCpp) -> None:
    sequence = backend.open()
    backend.step([Row(sequence, TOKENS[:30])])
    with pytest.raises(BackendError, match="in use"):
        backend.fork(sequence, 10)

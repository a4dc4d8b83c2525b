"""Layouts of the KV memory, YaRN, KV in 8 bits: what changes the numbers and what must not; and a layout that cannot be had."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen2_local.backends import Plan
from qwen2_local.backends.base import Choice, Layout, LoadOptions, Row
from qwen2_local.backends.llamacpp import LlamaCpp
from qwen2_local.errors import BackendError, BadFile, Cancelled, DoesNotFit
from tests.support import tiny

SHORT = Layout(1, 64)
TOKENS = [int(n) for n in np.random.default_rng(4).integers(0, tiny.VOCABULARY, 120)]
CLOSE = 2e-2
"""Another batch size rounds otherwise, in a KV cache of 16 bits; the logits spread by about 4."""


@pytest.fixture
def one(tiny_gguf: Path) -> Iterator[LlamaCpp]:
    options = LoadOptions("weights", 256, yarn_context=400, yarn_factor=4, yarn_original=100)
    backend = LlamaCpp.load(tiny_gguf, layout=Layout(1, 256), options=options, threads=1)
    yield backend
    backend.close()


def fresh(backend: LlamaCpp, tokens: list[int]) -> np.ndarray:
    """Logits of all tokens, in a sequence of their own."""
    sequence = backend.open()
    result = backend.step([Row(sequence, tokens, logits="all")])[0].logits
    backend.free(sequence)
    assert result is not None
    return result


def test_a_layout_forgets_all_and_computes_the_same(one: LlamaCpp) -> None:
    expected = fresh(one, TOKENS)
    for layout in (Layout(4, 128), Layout(4, 128), Layout(2, 300), Layout(1, 120), Layout(1, 256)):
        one.arrange(layout)  # whatever is open
        assert one.layout == layout
        np.testing.assert_allclose(fresh(one, TOKENS), expected, atol=CLOSE)
        assert [one.open() for _ in range(layout.sequences)] == list(range(layout.sequences))
        with pytest.raises(BackendError, match="in use"):
            one.open()
    assert (one.info.context, one.info.yarn_context) == (256, 400)


def test_streams_of_different_lengths_compute_as_if_alone(one: LlamaCpp) -> None:
    lengths = (100, 3, 41, 0)
    alone = []
    for n, length in enumerate(lengths):
        alone.append(fresh(one, [*TOKENS[:length], *TOKENS[n : n + 5]])[-5:])
    one.arrange(Layout(4, 128))
    sequences = [one.open() for _ in lengths]
    one.step([Row(sequence, TOKENS[:length]) for sequence, length in zip(sequences, lengths, strict=True) if length])
    for step in range(5):
        rows = [Row(sequence, [TOKENS[n + step]], logits="last") for n, sequence in enumerate(sequences)]
        for n, result in reversed(list(enumerate(one.step(rows[::-1])[::-1]))):  # the order of the rows is no matter
            np.testing.assert_allclose(result.logits, alone[n][step : step + 1], atol=CLOSE)


@pytest.mark.parametrize("between", ["free", "idle", "full"])
def test_a_stream_between_two_at_work_stays_as_it_was(one: LlamaCpp, between: str) -> None:
    one.arrange(Layout(4, 128))
    first, middle, gone, last = (one.open() for _ in range(4))
    one.step([Row(first, TOKENS[:10]), Row(middle, TOKENS[:20]), Row(last, TOKENS[:30])])
    one.free(gone)
    if between == "full":
        one.step([Row(middle, TOKENS[:108])])
    elif between == "free":
        one.free(middle)
    before = None if between == "free" else bytes(one.export_kv(middle, [(0, 20)])[0].data)
    results = one.step([Row(last, [5], [Choice(tiny.VOCABULARY)], logits="last"), Row(first, [5], logits="last")])
    np.testing.assert_allclose(results[0].logits, fresh(one, [*TOKENS[:30], 5])[-1:], atol=CLOSE)
    np.testing.assert_allclose(results[1].logits, fresh(one, [*TOKENS[:10], 5])[-1:], atol=CLOSE)
    assert [one.token for one in results[0].chosen] == [int(results[0].logits.argmax())]
    if before is not None:
        assert bytes(one.export_kv(middle, [(0, 20)])[0].data) == before
        if between == "idle":
            alone = fresh(one, TOKENS[:21])[-1:]
            np.testing.assert_allclose(one.step([Row(middle, TOKENS[20:21], logits="last")])[0].logits, alone, atol=CLOSE)
    else:
        assert one.open() == middle
        np.testing.assert_allclose(one.step([Row(middle, TOKENS[:9], logits="all")])[0].logits, fresh(one, TOKENS[:9]), atol=CLOSE)


def test_yarn_changes_the_numbers_and_the_way_back_restores_them(one: LlamaCpp) -> None:
    plain, fingerprint = fresh(one, TOKENS), one.fingerprint
    one.arrange(Layout(1, 400, yarn=True))
    stretched = fresh(one, TOKENS)
    assert np.abs(stretched - plain).max() > 0.5
    assert np.abs(fresh(one, TOKENS + TOKENS + TOKENS)[:120] - stretched).max() < CLOSE
    stretched_fingerprint = one.fingerprint
    assert stretched_fingerprint != fingerprint
    one.arrange(Layout(2, 400, yarn=True))
    assert one.fingerprint == stretched_fingerprint
    np.testing.assert_allclose(fresh(one, TOKENS), stretched, atol=CLOSE)
    one.arrange(Layout(1, 256))
    assert one.fingerprint == fingerprint
    np.testing.assert_array_equal(fresh(one, TOKENS), plain)


def test_a_model_without_yarn(tiny_gguf: Path) -> None:
    backend = LlamaCpp.load(tiny_gguf, layout=Layout(1, 64), threads=1)
    with pytest.raises(BackendError, match="YaRN"):
        backend.arrange(Layout(1, 128, yarn=True))
    assert backend.layout == Layout(1, 64)
    fresh(backend, TOKENS[:60])
    backend.close()


def test_a_layout_that_cannot_be_had_leaves_the_one_before(one: LlamaCpp, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = fresh(one, TOKENS)
    one.arrange(Layout(3, 200))
    real = one._lib.llama_init_from_model

    def limited(model: Any, params: Any) -> Any:
        return real(model, params) if params.n_ctx <= 1000 else None

    monkeypatch.setattr(one._lib, "llama_init_from_model", limited)
    for layout in (Layout(8, 200), Layout(1, 2**40), Layout(256, 2**20)):
        sequence = one.open()
        one.step([Row(sequence, TOKENS)])
        with pytest.raises(DoesNotFit, match="could not make a context"):
            one.arrange(layout)
        assert one.layout == Layout(3, 200)
        with pytest.raises(BackendError, match="not open"):
            one.trim(sequence, 0)
        np.testing.assert_allclose(fresh(one, TOKENS), expected, atol=CLOSE)


def test_when_all_memory_is_gone_for_a_while_it_comes_back_with_it(one: LlamaCpp, monkeypatch: pytest.MonkeyPatch) -> None:
    before = one.layout
    expected = fresh(one, TOKENS)
    with monkeypatch.context() as patch:
        patch.setattr(one._lib, "llama_init_from_model", lambda *_: None)
        with pytest.raises(DoesNotFit):
            one.arrange(Layout(3, 200))
        for use in (one.open, lambda: one.step([Row(0, TOKENS)])):
            with pytest.raises(BackendError, match="no memory"):
                use()
        with pytest.raises(DoesNotFit):
            one.arrange(before)
    one.arrange(before)
    np.testing.assert_array_equal(fresh(one, TOKENS), expected)


@pytest.mark.parametrize("layout", [Layout(0, 64), Layout(257, 64), Layout(1, 0), Layout(-1, 64), Layout(1, -5)])
def test_absurd_layouts(one: LlamaCpp, layout: Layout) -> None:
    with pytest.raises(BackendError):
        one.arrange(layout)
    assert one.layout == Layout(1, 256)
    one.step([Row(one.open(), TOKENS)])


def test_eight_bits_err_little(tiny_gguf: Path, one: LlamaCpp) -> None:
    exact = fresh(one, TOKENS)
    backend = LlamaCpp.load(tiny_gguf, layout=Layout(1, 256), options=LoadOptions("weights", 256, kv_bits=8), threads=1)
    rounded = fresh(backend, TOKENS)
    error = np.sqrt(((rounded - exact) ** 2).mean()) / exact.std()
    assert 1e-4 < error < 0.03
    assert backend.fingerprint != one.fingerprint
    backend.close()


@pytest.mark.parametrize("bits", [0, 4, 32])
def test_other_widths_of_the_kv(tiny_gguf: Path, bits: int) -> None:
    with pytest.raises(BackendError, match="bits"):
        LlamaCpp.load(tiny_gguf, layout=Layout(1, 64), options=LoadOptions("", 64, kv_bits=bits))


def test_fingerprints_are_of_what_changes_the_numbers(tiny_gguf: Path) -> None:
    def fingerprint(layout: Layout = SHORT, *, safe: bool = False, **changes: Any) -> str:
        options = LoadOptions(**{"identity": "weights", "context": 64, "yarn_factor": 4.0, **changes})
        backend = LlamaCpp.load(tiny_gguf, layout=layout, options=options, threads=1, safe=safe)
        try:
            return backend.fingerprint
        finally:
            backend.close()

    same = {fingerprint(), fingerprint(Layout(3, 32)), fingerprint(context=128)}
    other = [
        fingerprint(identity="others"),
        fingerprint(adapter_identity="adapter"),
        fingerprint(kv_bits=8),
        fingerprint(Layout(1, 64, yarn=True)),
        fingerprint(Layout(1, 64, yarn=True), yarn_factor=2.0),
        fingerprint(Layout(1, 64, yarn=True), yarn_original=64),
        fingerprint(safe=True),
    ]
    assert len(same) == 1
    assert len({*same, *other}) == 1 + len(other)


@pytest.mark.parametrize("content", [None, b"", b"GGUF", b"no adapter" * 100, "the model itself"])
def test_what_is_no_adapter(tiny_gguf: Path, tmp_path: Path, content: bytes | str | None) -> None:
    path = tmp_path / "adapter.gguf"
    if content is not None:
        path.write_bytes(tiny_gguf.read_bytes() if isinstance(content, str) else content)
    with pytest.raises(BadFile, match=r"adapter\.gguf"):
        LlamaCpp.load(tiny_gguf, layout=Layout(1, 64), options=LoadOptions("", 64, path))


def test_a_load_can_be_cancelled(tiny_gguf: Path) -> None:
    asked = []

    def after(count: int) -> bool:
        asked.append(count)
        return len(asked) > count

    with pytest.raises(Cancelled):
        LlamaCpp.load(tiny_gguf, layout=Layout(1, 64), cancelled=lambda: after(2))
    assert 3 <= len(asked) <= 5
    LlamaCpp.load(tiny_gguf, layout=Layout(1, 64), cancelled=lambda: False).close()
    with pytest.raises(Cancelled):
        Plan("llama.cpp", tiny_gguf, Layout(1, 64), LoadOptions("", 64)).load(cancelled=lambda: True)

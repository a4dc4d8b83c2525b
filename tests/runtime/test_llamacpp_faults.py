"""Wrong requests, full contexts, broken weights and cancelled steps: a typed error, and the sequences as they were."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from qwen2_local.backends.base import Choice, Layout, Row
from qwen2_local.backends.llamacpp import STEP_TOKENS, LlamaCpp
from qwen2_local.errors import BackendError, BadFile, Cancelled, ContextOverflow
from tests.support import tiny

TOKENS = list(range(1, 33))


@pytest.mark.parametrize("tokens", [[-1], [tiny.VOCABULARY], [1, 2, tiny.VOCABULARY], [1, -5, 2], [2**40], [1, 2**70], []])
def test_bad_token_ids_never_reach_native_code(llama: LlamaCpp, tokens: list[int]) -> None:
    sequence = llama.open()
    before = llama.step([Row(sequence, TOKENS, logits="last")])[0].logits
    with pytest.raises(BackendError):
        llama.step([Row(sequence, tokens)])
    llama.trim(sequence, 0)
    np.testing.assert_array_equal(llama.step([Row(sequence, TOKENS, logits="last")])[0].logits, before)


@pytest.mark.parametrize("sequence", [-1, 1, 2, 3, 1000])
def test_sequences_have_to_be_open(llama: LlamaCpp, sequence: int) -> None:
    assert llama.open() == 0
    with pytest.raises(BackendError, match="not open"):
        llama.step([Row(sequence, [1])])
    with pytest.raises(BackendError, match="not open"):
        llama.trim(sequence, 0)
    with pytest.raises(BackendError, match="not open"):
        llama.free(sequence)


def test_no_more_sequences_than_loaded_for(llama: LlamaCpp) -> None:
    assert [llama.open() for _ in range(3)] == [0, 1, 2]
    with pytest.raises(BackendError, match="in use"):
        llama.open()


def test_a_step_has_one_row_per_sequence_and_a_most(llama: LlamaCpp) -> None:
    sequence, other, third = (llama.open() for _ in range(3))
    with pytest.raises(BackendError):
        llama.step([Row(sequence, [1]), Row(sequence, [2])])
    with pytest.raises(BackendError):
        llama.step([])
    with pytest.raises(BackendError):
        llama.step([Row(s, [1] * 200) for s in (sequence, other, third)])
    assert STEP_TOKENS < 600


@pytest.mark.parametrize("length", [-1, 33])
def test_trim_only_shortens(llama: LlamaCpp, length: int) -> None:
    sequence = llama.open()
    llama.step([Row(sequence, TOKENS)])
    with pytest.raises(BackendError):
        llama.trim(sequence, length)


def test_a_full_context_says_the_counts(llama: LlamaCpp) -> None:
    sequence = llama.open()
    llama.step([Row(sequence, [1] * 250)])
    with pytest.raises(ContextOverflow, match=r"257 .* 256"):
        llama.step([Row(sequence, [1] * 7)])
    llama.step([Row(sequence, [1] * 6)])
    with pytest.raises(ContextOverflow):
        llama.step([Row(sequence, [1])])


def test_every_sequence_has_the_whole_context(llama: LlamaCpp) -> None:
    for _ in range(3):
        llama.step([Row(llama.open(), [1] * 256)])


def test_weights_that_are_no_numbers(tmp_path: Path) -> None:
    backend = LlamaCpp.load(tiny.write_gguf(tmp_path / "nan.gguf", poison=True), layout=Layout(1, 64), threads=1)
    for row in (Row(backend.open(), TOKENS, [Choice(tiny.VOCABULARY)]), Row(0, TOKENS, logits="all")):
        with pytest.raises(BackendError, match="no numbers"):
            backend.step([row])
    backend.close()


@pytest.mark.parametrize("content", [b"", b"GGUF", b"<html>not a model</html>" * 100])
def test_a_bad_file(tmp_path: Path, content: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(BadFile, match=r"bad\.gguf"):
        LlamaCpp.load(path, layout=Layout(1, 64))
    with pytest.raises(BadFile, match="not a file"):
        LlamaCpp.load(tmp_path, layout=Layout(1, 64))
    assert capfd.readouterr() == ("", "")


def test_a_closed_model(tiny_gguf: Path) -> None:
    backend = LlamaCpp.load(tiny_gguf, layout=Layout(1, 64), threads=1)
    sequence = backend.open()
    backend.close()
    for use in (backend.open, lambda: backend.step([Row(sequence, [1])]), lambda: backend.trim(sequence, 0)):
        with pytest.raises(BackendError):
            use()


def test_cancel_in_a_step_restores_the_sequences(tmp_path: Path) -> None:
    path = tiny.write_gguf(tmp_path / "deep.gguf", width=256, layers=24, inner=1024)
    backend = LlamaCpp.load(path, layout=Layout(2, 1024), threads=1)
    prompt = [int(n) for n in np.random.default_rng(2).integers(0, tiny.VOCABULARY, 480)]
    sequence, other = backend.open(), backend.open()
    backend.step([Row(sequence, TOKENS), Row(other, TOKENS)])
    started = time.perf_counter()
    expected = backend.step([Row(sequence, prompt, logits="last")])[0].logits
    took = time.perf_counter() - started
    backend.trim(sequence, len(TOKENS))

    canceller = threading.Timer(took / 4, backend.cancel)
    canceller.start()
    started = time.perf_counter()
    with pytest.raises(Cancelled):
        backend.step([Row(sequence, prompt[:-1]), Row(other, prompt[:1])])
    stopped_after = time.perf_counter() - started
    canceller.join()
    assert stopped_after < took * 0.8

    # The next step knows nothing of it, and both sequences are as before.
    np.testing.assert_array_equal(backend.step([Row(sequence, prompt, logits="last")])[0].logits, expected)
    backend.trim(other, len(TOKENS))
    with pytest.raises(BackendError):
        backend.trim(other, len(TOKENS) + 1)
    backend.close()


def test_a_cancel_between_steps_ends_the_next_one_and_no_other(llama: LlamaCpp) -> None:
    sequence = llama.open()
    llama.cancel()
    with pytest.raises(Cancelled):
        llama.step([Row(sequence, TOKENS)])
    assert llama.step([Row(sequence, TOKENS, [Choice(tiny.VOCABULARY)])])[0].chosen[0].token >= 0


def test_a_cancel_does_not_outlive_a_step_that_failed(llama: LlamaCpp) -> None:
    sequence = llama.open()
    llama.cancel()
    with pytest.raises(BackendError, match="outside the vocabulary"):
        llama.step([Row(sequence, [-1])])
    llama.step([Row(sequence, TOKENS)])

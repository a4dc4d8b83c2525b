"""Whatever way the tokens go in, the same logits come out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qwen2_local.backends.base import Choice, Layout, Row, RowResult
from qwen2_local.backends.llamacpp import LlamaCpp
from tests.support import tiny

TOKENS = [int(n) for n in np.random.default_rng(1).integers(0, tiny.VOCABULARY, 40)]
CLOSE = 2e-2
"""Another batch size rounds otherwise, in a KV cache of 16 bits; the logits spread by about 4."""


def all_logits(backend: LlamaCpp, tokens: list[int]) -> np.ndarray:
    sequence = backend.open()
    logits = backend.step([Row(sequence, tokens, logits="all")])[0].logits
    assert logits is not None
    backend.free(sequence)
    return logits


def greedy(backend: LlamaCpp, sequence: int, tokens: list[int], count: int) -> list[int]:
    chosen: list[int] = []
    for _ in range(count):
        (one,) = backend.step([Row(sequence, tokens, [Choice(tiny.VOCABULARY)])])[0].chosen
        chosen.append(one.token)
        tokens = [one.token]
    return chosen


def test_info(llama: LlamaCpp) -> None:
    info = llama.info
    assert (info.name, info.architecture, info.context) == ("llama.cpp", "qwen2", 256)
    assert (info.vocabulary, info.layers, info.kv_bytes_per_token) == (tiny.VOCABULARY, tiny.LAYERS, tiny.KV_BYTES_PER_TOKEN)


def test_logits_depend_on_the_tokens(llama: LlamaCpp) -> None:
    whole = all_logits(llama, TOKENS)
    assert whole.shape == (len(TOKENS), tiny.VOCABULARY)
    assert whole.std() > 1  # the other tests would compare nothing
    assert np.abs(whole[5] - whole[6]).max() > 1


def test_prefill_then_decode_is_the_whole_prefill(llama: LlamaCpp) -> None:
    whole = all_logits(llama, TOKENS)
    sequence = llama.open()
    llama.step([Row(sequence, TOKENS[:30])])
    for i in range(30, 40):
        logits = llama.step([Row(sequence, TOKENS[i : i + 1], logits="last")])[0].logits
        assert logits is not None
        assert logits.shape == (1, tiny.VOCABULARY)
        np.testing.assert_allclose(logits[0], whole[i], atol=CLOSE)


def test_trim_then_continue_is_as_if_fresh(llama: LlamaCpp) -> None:
    whole = all_logits(llama, TOKENS)
    sequence = llama.open()
    llama.step([Row(sequence, TOKENS[:20])])
    llama.step([Row(sequence, [1, 2, 3, 4, 5])])
    llama.trim(sequence, 20)
    logits = llama.step([Row(sequence, TOKENS[20:], logits="all")])[0].logits
    np.testing.assert_allclose(logits, whole[20:], atol=CLOSE)


def test_sequences_in_one_step_do_not_see_each_other(llama: LlamaCpp) -> None:
    other = TOKENS[::-1]
    expected, expected_other = all_logits(llama, TOKENS), all_logits(llama, other)
    first, second = llama.open(), llama.open()
    llama.step([Row(first, TOKENS[:10]), Row(second, other[:25])])
    results = llama.step([Row(first, TOKENS[10:], logits="all"), Row(second, other[25:26], [Choice(tiny.VOCABULARY)], logits="last")])
    np.testing.assert_allclose(results[0].logits, expected[10:], atol=CLOSE)
    np.testing.assert_allclose(results[1].logits, expected_other[25:26], atol=CLOSE)
    assert results[0].chosen == ()
    assert [one.token for one in results[1].chosen] == [int(expected_other[25].argmax())]


def test_rows_without_logits_between_rows_with(llama: LlamaCpp) -> None:
    expected = all_logits(llama, TOKENS[:8])
    rows = [Row(llama.open(), TOKENS[:8], logits="last"), Row(llama.open(), TOKENS[:5]), Row(llama.open(), TOKENS[:8], [Choice(tiny.VOCABULARY)])]
    last, nothing, chosen = llama.step(rows)
    assert nothing == RowResult()
    np.testing.assert_allclose(last.logits, expected[-1:], atol=CLOSE)
    assert [one.token for one in chosen.chosen] == [int(expected[-1].argmax())]


def test_greedy_is_the_same_every_time(llama: LlamaCpp) -> None:
    replies = []
    for _ in range(3):
        sequence = llama.open()
        replies.append(greedy(llama, sequence, TOKENS, 30))
        llama.free(sequence)
    assert replies[0] == replies[1] == replies[2]
    assert len(set(replies[0])) > 1


def test_the_choice_has_a_limit(llama: LlamaCpp) -> None:
    best = int(all_logits(llama, TOKENS)[-1].argmax())
    (one,) = llama.step([Row(llama.open(), TOKENS, [Choice(limit=best)])])[0].chosen
    assert one.token < best


def test_sequences_are_reused(llama: LlamaCpp) -> None:
    expected = all_logits(llama, TOKENS)
    opened = [llama.open() for _ in range(3)]
    llama.step([Row(opened[1], TOKENS[::-1])])
    llama.free(opened[1])
    assert llama.open() == opened[1]
    np.testing.assert_allclose(llama.step([Row(opened[1], TOKENS, logits="all")])[0].logits, expected, atol=CLOSE)


def test_logits_are_a_copy(llama: LlamaCpp) -> None:
    sequence = llama.open()
    first = llama.step([Row(sequence, TOKENS[:1], logits="last")])[0].logits
    assert first is not None
    kept = first.copy()
    llama.step([Row(sequence, TOKENS[1:2], logits="last")])
    np.testing.assert_array_equal(first, kept)


@pytest.mark.parametrize("safe", [False, True])
def test_it_says_nothing(tiny_gguf: Path, capfd: pytest.CaptureFixture[str], safe: bool) -> None:
    backend = LlamaCpp.load(tiny_gguf, layout=Layout(1, 64), threads=2, safe=safe)
    backend.step([Row(backend.open(), TOKENS, [Choice(tiny.VOCABULARY)])])
    backend.close()
    backend.close()
    assert capfd.readouterr() == ("", "")

"""What a row may ask for: several choices, scores, logits of all its tokens; and what happens when a choice cannot be made."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qwen2_local.backends.base import Choice, Layout, Row
from qwen2_local.backends.llama_native import MOST_OUTPUTS
from qwen2_local.backends.llamacpp import LlamaCpp
from qwen2_local.errors import BackendError, Qwen2LocalError
from tests.support import tiny

TOKENS = [int(n) for n in np.random.default_rng(5).integers(0, tiny.VOCABULARY, 250)]
GREEDY = Choice(tiny.VOCABULARY)


@pytest.mark.parametrize("logprobs", [None, 3])
def test_several_choices_are_those_made_one_at_a_time(llama: LlamaCpp, logprobs: int | None) -> None:
    choices = [Choice(300, temperature=0.9, top_k=50, uniform=u, top_logprobs=logprobs) for u in (0.1, 0.5, 0.9, 0.3)]
    one, several = llama.open(), llama.open()
    llama.step([Row(one, TOKENS[:20]), Row(several, TOKENS[:18])])
    singly = [llama.step([Row(one, [token], [choice])])[0].chosen[0] for token, choice in zip(TOKENS[20:24], choices, strict=True)]
    together = llama.step([Row(several, TOKENS[18:24], choices)])[0].chosen
    assert [chosen.token for chosen in together] == [chosen.token for chosen in singly]
    assert len({chosen.token for chosen in together}) > 1
    for here, there in zip(together, singly, strict=True):
        assert [token for token, _ in here.top] == [token for token, _ in there.top]
        assert (here.logprob is None) == (logprobs is None)
        if here.logprob is not None and there.logprob is not None:
            assert here.logprob == pytest.approx(there.logprob, abs=0.02)


@pytest.mark.parametrize("count", [1, 40, MOST_OUTPUTS, MOST_OUTPUTS + 1, 250])
def test_scores_are_the_log_softmax_of_the_logits(llama: LlamaCpp, count: int) -> None:
    limit = 310
    tokens = TOKENS[:count]
    logits = llama.step([Row(llama.open(), tokens, logits="all")])[0].logits
    assert logits is not None
    exact = logits[:, :limit].astype(np.float64)
    exact = exact - np.log(np.exp(exact).sum(axis=1, keepdims=True))
    targets = [int(row.argmax()) if n % 3 == 0 else n % limit for n, row in enumerate(exact)]
    scores = llama.step([Row(llama.open(), tokens, targets=targets, limit=limit)])[0].scores
    assert scores is not None
    np.testing.assert_allclose(scores.logprobs, exact[np.arange(count), targets], atol=1e-5)
    np.testing.assert_array_equal(scores.greedy, exact.argmax(axis=1) == targets)


def test_many_logits_come_in_parts_as_if_in_one(llama: LlamaCpp) -> None:
    """Three rows with 24 + 130 + 100 rows of logits: two parts, the second row split."""
    first, second, third = (llama.open() for _ in range(3))
    rows = [
        Row(third, TOKENS[:130], logits="all", targets=[3] * 130, limit=5),
        Row(first, TOKENS[:40], [GREEDY] * 24),
        Row(second, TOKENS[:100], [replace(GREEDY, top_logprobs=2)] * 70, logits="all"),
    ]
    results = llama.step(rows)
    for sequence, row, result in zip((third, first, second), rows, results, strict=True):
        llama.trim(sequence, 0)
        logits = llama.step([Row(sequence, row.tokens, logits="all")])[0].logits
        assert logits is not None
        if row.logits:
            np.testing.assert_allclose(result.logits, logits, atol=4e-2)  # other batches round otherwise
        else:
            assert result.logits is None
        assert [one.token for one in result.chosen] == [int(best) for best in logits.argmax(axis=1)[len(logits) - len(row.choose) :]]
        assert (result.scores is None) == (not row.targets)
        if result.scores is not None:
            assert result.scores.logprobs.shape == result.scores.greedy.shape == (130,)


def test_all_wishes_at_once(llama: LlamaCpp) -> None:
    row = Row(llama.open(), TOKENS[:10], [GREEDY, GREEDY], targets=TOKENS[1:11], limit=tiny.VOCABULARY, logits="last")
    (result,) = llama.step([row])
    assert len(result.chosen) == 2
    assert result.scores is not None
    assert len(result.scores.logprobs) == 10
    assert result.logits is not None
    assert result.logits.shape == (1, tiny.VOCABULARY)
    assert int(result.logits.argmax()) == result.chosen[1].token


@pytest.mark.parametrize(
    "wish",
    [
        {"choose": [GREEDY] * 4},
        {"choose": [Choice(0)]},
        {"choose": [Choice(-3)]},
        {"targets": [1, 2], "limit": 300},
        {"targets": [1, 2, 3, 4], "limit": 300},
        {"targets": [1, 2, 3]},
        {"targets": [1, 2, 300], "limit": 300},
        {"targets": [1, -1, 3], "limit": 300},
        {"targets": [1, 2, 3], "limit": tiny.VOCABULARY + 1},
    ],
)
def test_wishes_that_make_no_sense_change_nothing(llama: LlamaCpp, wish: dict[str, object]) -> None:
    sequence = llama.open()
    with pytest.raises(BackendError):
        llama.step([Row(sequence, TOKENS[:3], **wish)])  # type: ignore[arg-type]
    with pytest.raises(BackendError):
        llama.trim(sequence, 1)
    assert llama.step([Row(sequence, TOKENS[:3], [GREEDY])])[0].chosen


def test_where_nothing_may_come_next(llama: LlamaCpp) -> None:
    sequence, other = llama.open(), llama.open()
    llama.step([Row(sequence, TOKENS[:5]), Row(other, TOKENS[:5])])
    nothing = replace(GREEDY, mask=lambda: np.zeros(10, np.uint32))
    with pytest.raises(BackendError, match="No token may come next"):
        llama.step([Row(sequence, TOKENS[5:7]), Row(other, TOKENS[5:9], [nothing])])
    for one in (sequence, other):
        with pytest.raises(BackendError):
            llama.trim(one, 6)


def test_a_mask_that_fails_leaves_the_sequence_as_it_was(llama: LlamaCpp) -> None:
    class MaskFailed(Qwen2LocalError):
        pass

    def fails() -> np.ndarray:
        raise MaskFailed("the grammar is too large")

    sequence = llama.open()
    llama.step([Row(sequence, TOKENS[:5])])
    expected = llama.step([Row(sequence, TOKENS[5:8], logits="last")])[0].logits
    llama.trim(sequence, 5)
    with pytest.raises(MaskFailed):
        llama.step([Row(sequence, TOKENS[5:8], [replace(GREEDY, mask=fails)])])
    np.testing.assert_array_equal(llama.step([Row(sequence, TOKENS[5:8], logits="last")])[0].logits, expected)


def test_scores_of_weights_that_are_no_numbers(tmp_path: Path) -> None:
    backend = LlamaCpp.load(tiny.write_gguf(tmp_path / "nan.gguf", poison=True), layout=Layout(2, 256), threads=1)
    with pytest.raises(BackendError, match="no numbers"):
        backend.step([Row(backend.open(), TOKENS[:9], targets=TOKENS[1:10], limit=tiny.VOCABULARY)])
    with pytest.raises(BackendError, match="no numbers"):
        backend.step([Row(0, TOKENS[:9], [GREEDY, GREEDY])])
    backend.close()

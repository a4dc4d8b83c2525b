"""Whatever way the tokens go in, the same logits come out; and they are chosen from as the reference does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen2_local.backends.base import Choice, Row, RowResult
from qwen2_local.sampling import choose, uniform
from tests.support import mlx_models, random_qwen2

mlx = pytest.importorskip("qwen2_local.backends.mlx")

VOCABULARY = 320
TOKENS = [int(n) for n in np.random.RandomState(1).randint(0, VOCABULARY, 40)]
CLOSE = 2e-4
"""Another batch size rounds otherwise, in float32; the logits spread by 2 to 4."""

CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dense": (random_qwen2.config(), {}),
    "untied 4-bit": (random_qwen2.config(tie_word_embeddings=False), {"bits": 4}),
    "moe": (random_qwen2.moe_config(), {}),
    "moe 4-bit": (random_qwen2.moe_config(norm_topk_prob=True), {"bits": 4}),
}


@pytest.fixture(scope="module", params=CONFIGS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config, how = CONFIGS[request.param]
    return random_qwen2.write_mlx(tmp_path_factory.mktemp("mlx"), config, random_qwen2.weights(config, 1), **how)


@pytest.fixture
def backend(folder: Path) -> Iterator[Any]:
    backend = mlx_models.load(folder, context=512, sequences=3)
    yield backend
    backend.close()


def all_logits(backend: Any, tokens: list[int]) -> np.ndarray:
    sequence = backend.open()
    logits: np.ndarray = backend.step([Row(sequence, tokens, logits="all")])[0].logits
    backend.free(sequence)
    return logits


def token_of(result: RowResult) -> int:
    (chosen,) = result.chosen
    return chosen.token


def test_logits_depend_on_the_tokens(backend: Any) -> None:
    whole = all_logits(backend, TOKENS)
    assert whole.shape == (len(TOKENS), VOCABULARY)
    assert whole.dtype == np.float32
    assert whole.std() > 1  # the other tests would compare nothing
    assert np.abs(whole[5] - whole[6]).max() > 1


def test_prefill_then_decode_is_the_whole_prefill(backend: Any) -> None:
    whole = all_logits(backend, TOKENS)
    sequence = backend.open()
    backend.step([Row(sequence, TOKENS[:17])])
    backend.step([Row(sequence, TOKENS[17:30])])
    for i in range(30, 40):
        logits = backend.step([Row(sequence, TOKENS[i : i + 1], logits="last")])[0].logits
        assert logits.shape == (1, VOCABULARY)
        np.testing.assert_allclose(logits[0], whole[i], atol=CLOSE)


def test_the_kv_grows_past_its_first_room(backend: Any) -> None:
    long = TOKENS * 8
    whole = all_logits(backend, long)
    sequence = backend.open()
    for start in range(0, 320, 64):
        logits = backend.step([Row(sequence, long[start : start + 64], logits="last")])[0].logits
        np.testing.assert_allclose(logits[0], whole[start + 63], atol=CLOSE)
    for end in (250, 130):
        backend.trim(sequence, end)
        logits = backend.step([Row(sequence, long[end:], logits="last")])[0].logits
        np.testing.assert_allclose(logits[0], whole[-1], atol=CLOSE)


def test_trim_then_continue_is_as_if_fresh(backend: Any) -> None:
    whole = all_logits(backend, TOKENS)
    sequence = backend.open()
    backend.step([Row(sequence, TOKENS[:20])])
    backend.step([Row(sequence, [1, 2, 3, 4, 5])])
    backend.trim(sequence, 20)
    logits = backend.step([Row(sequence, TOKENS[20:], logits="all")])[0].logits
    np.testing.assert_allclose(logits, whole[20:], atol=CLOSE)


def test_sequences_in_one_step_do_not_see_each_other(backend: Any) -> None:
    other = TOKENS[::-1]
    expected, expected_other = all_logits(backend, TOKENS), all_logits(backend, other)
    first, second = backend.open(), backend.open()
    backend.step([Row(first, TOKENS[:10]), Row(second, other[:25])])
    results = backend.step([Row(first, TOKENS[10:], logits="all"), Row(second, other[25:26], [Choice(VOCABULARY)], logits="last")])
    np.testing.assert_allclose(results[0].logits, expected[10:], atol=CLOSE)
    np.testing.assert_allclose(results[1].logits, expected_other[25:26], atol=CLOSE)
    assert results[0].chosen == ()
    assert token_of(results[1]) == int(expected_other[25].argmax())


def test_rows_without_logits_between_rows_with(backend: Any) -> None:
    expected = all_logits(backend, TOKENS[:8])
    rows = [Row(backend.open(), TOKENS[:8], logits="last"), Row(backend.open(), TOKENS[:5]), Row(backend.open(), TOKENS[:8], [Choice(VOCABULARY)])]
    last, nothing, chosen = backend.step(rows)
    assert nothing.logits is None
    assert nothing.chosen == ()
    np.testing.assert_allclose(last.logits, expected[-1:], atol=CLOSE)
    assert token_of(chosen) == int(expected[-1].argmax())


def test_rows_choose_each_in_its_own_way(backend: Any) -> None:
    expected = all_logits(backend, TOKENS[:8])[-1]
    best = int(expected.argmax())
    choices = [
        Choice(best),
        Choice(VOCABULARY, repetition_penalty=1e6, penalized=np.array([best], np.int32)),
        Choice(VOCABULARY, temperature=1.5, top_p=0.9, top_k=40, uniform=0.7),
    ]
    results = backend.step([Row(backend.open(), TOKENS[:8], [choice]) for choice in choices])
    assert [token_of(result) for result in results] == [choose(expected, choice).token for choice in choices]


def test_greedy_is_the_same_every_time(backend: Any) -> None:
    replies = [generate(backend, lambda position: Choice(VOCABULARY)) for _ in range(2)]
    assert replies[0] == replies[1]
    assert len(set(replies[0])) > 1


def test_a_seed_means_what_the_reference_says(backend: Any) -> None:
    def choice(position: int) -> Choice:
        return Choice(VOCABULARY - 7, 1.2, 0.95, 50, repetition_penalty=1.1, penalized=np.arange(30, dtype=np.int32), uniform=uniform(42, position))

    chosen = generate(backend, choice)
    # With the tokens known, one pass gives every row of logits that they were chosen from.
    logits = all_logits(backend, TOKENS + chosen)
    assert chosen == [choose(logits[len(TOKENS) + i - 1], choice(len(TOKENS) + i)).token for i in range(len(chosen))]
    assert len(set(chosen)) > 3


@pytest.mark.parametrize("limit", [1, 5, 8, 100])
@pytest.mark.parametrize(
    "row",
    [
        [1, 3, 2, 3, -1, 3, 0, 9],
        [-1, -np.inf, -2, -3, -1, 0, np.nan, 1],
        [np.nan] + [0] * 7,
        [0, 1, np.inf, 2, 0, 0, 0, 0],
        [-np.inf] * 5 + [1, 2, 3],
        [0] * 8,
    ],
)
def test_greedy_on_the_device_is_the_reference(row: list[float], limit: int) -> None:
    import mlx.core as mx

    other = np.arange(8, dtype=np.float32)
    logits = np.array([other, row], np.float32)
    for others in (3, limit):
        want = [choose(logits[0], Choice(others)).token, choose(logits[1], Choice(limit)).token]
        assert mlx._greedy(mx.array(logits), [others, limit]).tolist() == want


def generate(backend: Any, choice: Callable[[int], Choice], count: int = 20) -> list[int]:
    sequence, tokens, chosen = backend.open(), TOKENS, []
    for position in range(len(TOKENS), len(TOKENS) + count):
        token = token_of(backend.step([Row(sequence, tokens, [choice(position)])])[0])
        chosen.append(token)
        tokens = [token]
    backend.free(sequence)
    return chosen


def test_sequences_are_reused(backend: Any) -> None:
    expected = all_logits(backend, TOKENS)
    opened = [backend.open() for _ in range(3)]
    backend.step([Row(opened[1], TOKENS[::-1])])
    backend.free(opened[1])
    assert backend.open() == opened[1]
    np.testing.assert_allclose(backend.step([Row(opened[1], TOKENS, logits="all")])[0].logits, expected, atol=CLOSE)


def test_logits_are_a_copy(backend: Any) -> None:
    sequence = backend.open()
    first = backend.step([Row(sequence, TOKENS[:1], logits="last")])[0].logits
    kept = first.copy()
    backend.step([Row(sequence, TOKENS[1:2], logits="last")])
    np.testing.assert_array_equal(first, kept)

"""Wrong requests, full contexts, broken weights, cancelled and failing steps: a typed error, and the sequences as they were."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen2_local import backends
from qwen2_local.backends.base import Choice, Layout, LoadOptions, Row
from qwen2_local.engine import Engine, Request, Token
from qwen2_local.errors import BackendError, BadFile, Cancelled, ContextOverflow, DoesNotFit, UnsupportedModel
from qwen2_local.types import Sampling
from tests.support import mlx_models, random_qwen2

mlx = pytest.importorskip("qwen2_local.backends.mlx")

VOCABULARY = 320
TOKENS = list(range(1, 33))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = random_qwen2.config()
    return random_qwen2.write_mlx(tmp_path_factory.mktemp("mlx"), config, random_qwen2.weights(config, 2))


@pytest.fixture
def backend(folder: Path) -> Iterator[Any]:
    backend = mlx_models.load(folder, context=256, sequences=3)
    yield backend
    backend.close()


def test_info(backend: Any) -> None:
    info = backend.info
    assert (info.name, info.architecture, info.context, info.vocabulary, info.layers) == ("mlx", "qwen2", 256, VOCABULARY, 2)
    assert info.kv_bytes_per_token == 2 * 2 * 2 * 32 * 4
    assert info.version[0].isdigit()
    assert backend.step_tokens == 512


@pytest.mark.parametrize("tokens", [[-1], [VOCABULARY], [1, 2, VOCABULARY], [1, -5, 2], [2**40], [1, 2**70], []])
def test_bad_token_ids_change_nothing(backend: Any, tokens: list[int]) -> None:
    sequence = backend.open()
    before = backend.step([Row(sequence, TOKENS, logits="last")])[0].logits
    with pytest.raises(BackendError):
        backend.step([Row(sequence, tokens)])
    with pytest.raises(BackendError, match="32 tokens"):
        backend.trim(sequence, 33)
    backend.trim(sequence, 0)
    np.testing.assert_array_equal(backend.step([Row(sequence, TOKENS, logits="last")])[0].logits, before)


@pytest.mark.parametrize("sequence", [-1, 1, 2, 3, 1000])
def test_sequences_have_to_be_open(backend: Any, sequence: int) -> None:
    assert backend.open() == 0
    for use in (lambda: backend.step([Row(sequence, [1])]), lambda: backend.trim(sequence, 0), lambda: backend.free(sequence)):
        with pytest.raises(BackendError, match="not open"):
            use()


def test_no_more_sequences_than_loaded_for(backend: Any) -> None:
    assert [backend.open() for _ in range(3)] == [0, 1, 2]
    with pytest.raises(BackendError, match="in use"):
        backend.open()


def test_a_step_has_one_row_per_sequence_and_a_most(folder: Path) -> None:
    backend = mlx_models.load(folder, context=1024, sequences=3)
    sequence, other, third = (backend.open() for _ in range(3))
    for rows in ([Row(sequence, [1]), Row(sequence, [2])], [], [Row(s, [1] * 200) for s in (sequence, other, third)]):
        with pytest.raises(BackendError):
            backend.step(rows)


@pytest.mark.parametrize("length", [-1, 33])
def test_trim_only_shortens(backend: Any, length: int) -> None:
    sequence = backend.open()
    backend.step([Row(sequence, TOKENS)])
    with pytest.raises(BackendError):
        backend.trim(sequence, length)


def test_a_full_context_says_the_counts(backend: Any) -> None:
    sequence = backend.open()
    backend.step([Row(sequence, [1] * 250)])
    with pytest.raises(ContextOverflow, match=r"257 .* 256"):
        backend.step([Row(sequence, [1] * 7)])
    backend.step([Row(sequence, [1] * 6)])
    with pytest.raises(ContextOverflow):
        backend.step([Row(sequence, [1])])


@pytest.mark.parametrize("tensor", ["model.layers.0.mlp.down_proj.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers(tmp_path: Path, tensor: str, value: float) -> None:
    config = random_qwen2.config()
    weights = random_qwen2.weights(config, 2)
    weights[tensor][7, 7] = value
    backend = mlx_models.load(random_qwen2.write_mlx(tmp_path, config, weights), context=64)
    sequence = backend.open()
    choices = (Choice(VOCABULARY), Choice(VOCABULARY, temperature=0.7, uniform=0.5))
    for row in (*(Row(sequence, TOKENS, [choice]) for choice in choices), Row(sequence, TOKENS, logits="all")):
        with pytest.raises(BackendError, match="no numbers, at token 32"):
            backend.step([row])
    with pytest.raises(BackendError, match="has 0 tokens"):
        backend.trim(sequence, 1)


@pytest.mark.parametrize(
    ("folder_of", "error"),
    [
        (lambda at: at / "nowhere", BadFile),
        (lambda at: at, BadFile),
        (lambda at: random_qwen2.write_hf(at, random_qwen2.moe_config(), random_qwen2.weights(random_qwen2.moe_config(), 0)), UnsupportedModel),
    ],
    ids=["missing", "empty", "experts one by one"],
)
def test_a_folder_that_is_no_mlx_model(tmp_path: Path, folder_of: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        mlx_models.load(folder_of(tmp_path), context=64)


def test_a_dense_hugging_face_folder_has_the_same_layout(folder: Path, backend: Any, tmp_path: Path) -> None:
    config = random_qwen2.config()
    plain = mlx_models.load(random_qwen2.write_hf(tmp_path, config, random_qwen2.weights(config, 2)), context=64)
    a, b = (it.step([Row(it.open(), TOKENS, logits="all")])[0].logits for it in (backend, plain))
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("context", "sequences"), [(0, 1), (1, 0), (-1, 1)])
def test_no_room_at_all(folder: Path, context: int, sequences: int) -> None:
    with pytest.raises(BackendError):
        mlx_models.load(folder, context=context, sequences=sequences)


def test_a_closed_model(folder: Path) -> None:
    backend = mlx_models.load(folder, context=64)
    sequence = backend.open()
    backend.close()
    backend.close()
    for use in (backend.open, lambda: backend.step([Row(sequence, [1])]), lambda: backend.trim(sequence, 0)):
        with pytest.raises(BackendError):
            use()


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (RuntimeError("[METAL] Command buffer execution failed"), BackendError),
        (RuntimeError("[metal::malloc] Attempting to allocate 99 bytes"), DoesNotFit),
        (MemoryError(), DoesNotFit),
    ],
    ids=["device", "device memory", "memory"],
)
def test_what_mlx_raises_in_a_step_costs_the_sequences_of_the_step_alone(
    backend: Any, monkeypatch: pytest.MonkeyPatch, failure: Exception, error: type[Exception]
) -> None:
    hit, spared = backend.open(), backend.open()
    backend.step([Row(hit, TOKENS), Row(spared, TOKENS)])

    def fail(*_: object, **__: object) -> None:
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr("mlx.core.fast.scaled_dot_product_attention", fail)
        with pytest.raises(error):
            backend.step([Row(hit, TOKENS)])
    with pytest.raises(BackendError, match="lost"):
        backend.step([Row(hit, TOKENS)])
    backend.free(hit)
    fresh = backend.open()
    backend.step([Row(fresh, TOKENS)])
    expected = backend.step([Row(fresh, [1], logits="last")])[0].logits
    np.testing.assert_allclose(backend.step([Row(spared, [1], logits="last")])[0].logits, expected, atol=1e-5)


def test_cancel_in_a_step_restores_the_sequences(tmp_path: Path) -> None:
    config = random_qwen2.config(hidden_size=256, num_hidden_layers=12, intermediate_size=1024)
    backend = mlx_models.load(random_qwen2.write_mlx(tmp_path, config, random_qwen2.weights(config, 3)), context=1024, sequences=2)
    prompt = [int(n) for n in np.random.RandomState(2).randint(0, VOCABULARY, backend.step_tokens)]
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


def test_a_cancel_between_steps_ends_the_next_one_and_no_other(backend: Any) -> None:
    sequence = backend.open()
    backend.cancel()
    with pytest.raises(Cancelled):
        backend.step([Row(sequence, TOKENS)])
    assert backend.step([Row(sequence, TOKENS, [Choice(VOCABULARY)])])[0].chosen[0].token >= 0


def test_a_cancel_does_not_outlive_a_step_that_failed(backend: Any) -> None:
    sequence = backend.open()
    backend.cancel()
    with pytest.raises(BackendError, match="outside the vocabulary"):
        backend.step([Row(sequence, [-1])])
    backend.step([Row(sequence, TOKENS)])


def test_a_load_can_be_cancelled_between_tensors(folder: Path) -> None:
    plan = backends.Plan("mlx", folder, Layout(1, 64), LoadOptions("", 64))
    asked = itertools.count(1)
    with pytest.raises(Cancelled):
        plan.load(cancelled=lambda: next(asked) == 5)
    assert next(asked) == 6
    plan.load(cancelled=lambda: next(asked) == 0).close()


def test_a_slow_model_takes_small_steps(tmp_path: Path) -> None:
    """A layer of a step must not keep a cancel waiting."""
    config = random_qwen2.config(hidden_size=512, intermediate_size=2048, num_attention_heads=8)
    backend = mlx_models.load(random_qwen2.write_mlx(tmp_path, config, random_qwen2.weights(config, 0), bits=4), context=1024)
    assert 1 <= backend.step_tokens < 100


def test_mlx_lm_is_never_imported(folder: Path) -> None:
    """It takes seconds."""
    code = f"""
import sys
from pathlib import Path
from qwen2_local import backends
from qwen2_local.backends.base import Layout, LoadOptions, Row
backend = backends.load("mlx", Path({str(folder)!r}), layout=Layout(1, 64), options=LoadOptions("x", 64))
backend.step([Row(backend.open(), [1, 2], logits="last")])
assert not {{"mlx_lm", "mlx.nn", "transformers", "llama_cpp"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_engine_drives_it_on_its_own_thread(folder: Path) -> None:
    """MLX's arrays belong to a thread: loading, steps, a cancel and closing have to come together there."""
    engine = Engine(lambda: mlx_models.load(folder, context=512))
    request = Request(tuple(TOKENS), Sampling(temperature=0.8, seed=1), frozenset(), VOCABULARY, max_tokens=12)

    def reply() -> list[int]:
        return [event.id for event in engine.generate(request) if isinstance(event, Token)]

    first = reply()
    assert len(first) == 12
    left = engine.generate(Request(tuple(TOKENS), Sampling(), frozenset(), VOCABULARY))
    while not isinstance(next(left), Token):
        pass
    left.close()  # type: ignore[attr-defined]
    assert reply() == first
    engine.close()

"""Several choices a row, scores, log-probabilities and adapters on MLX."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen2_converters.adapters import convert_adapter
from qwen2_converters.target import Target
from qwen2_local.backends.base import Choice, Mask, Row
from qwen2_local.errors import BackendError, BadFile, UnsupportedModel
from qwen2_local.sampling import choose
from tests.support import lora, mlx_models, random_qwen2

mlx = pytest.importorskip("qwen2_local.backends.mlx")

VOCABULARY = 320
TOKENS = [int(n) for n in np.random.RandomState(8).randint(0, VOCABULARY, 40)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = random_qwen2.config()
    return random_qwen2.write_mlx(tmp_path_factory.mktemp("mlx"), config, random_qwen2.weights(config, 4))


@pytest.fixture
def backend(folder: Path) -> Iterator[Any]:
    backend = mlx_models.load(folder, context=256, sequences=3)
    yield backend
    backend.close()


def all_logits(backend: Any, tokens: list[int] = TOKENS) -> np.ndarray:
    sequence = backend.open()
    logits: np.ndarray = backend.step([Row(sequence, tokens, logits="all")])[0].logits
    backend.free(sequence)
    return logits


def even_ids() -> Mask:
    return np.full(VOCABULARY // 32, 0x55555555, np.uint32)


WAYS = [
    Choice(VOCABULARY),
    Choice(VOCABULARY - 100),
    Choice(VOCABULARY, temperature=0.9, top_k=30, uniform=0.6),
    Choice(VOCABULARY, mask=even_ids),
    Choice(VOCABULARY, logit_bias={7: 50.0}),
    Choice(VOCABULARY, presence_penalty=2.0, counted=np.arange(200, dtype=np.int32), counts=np.ones(200, np.int32)),
    Choice(VOCABULARY, top_logprobs=3),
]


def test_several_choices_are_those_made_one_at_a_time(backend: Any) -> None:
    logits = all_logits(backend)
    chosen = backend.step([Row(backend.open(), TOKENS, WAYS)])[0].chosen
    assert len(chosen) == len(WAYS)
    for got, way, row in zip(chosen, WAYS, logits[-len(WAYS) :], strict=True):
        want = choose(row, way)
        assert got.token == want.token
        assert [token for token, _ in got.top] == [token for token, _ in want.top]
    assert chosen[3].token % 2 == 0
    assert chosen[4].token == 7
    assert chosen[6].logprob == pytest.approx(chosen[6].top[0][1])


def test_choices_of_several_rows_beside_logits(backend: Any) -> None:
    logits = all_logits(backend)
    rows = [
        Row(backend.open(), TOKENS[:20], [Choice(VOCABULARY)] * 3, logits="last"),
        Row(backend.open(), TOKENS[:10], logits="all"),
        Row(backend.open(), TOKENS, WAYS[:2], logits="all"),
    ]
    first, second, third = backend.step(rows)
    assert [one.token for one in first.chosen] == [int(row.argmax()) for row in logits[17:20]]
    np.testing.assert_allclose(first.logits, logits[19:20], atol=1e-4)
    np.testing.assert_allclose(second.logits, logits[:10], atol=1e-4)
    assert second.chosen == ()
    np.testing.assert_allclose(third.logits, logits, atol=1e-4)
    assert [one.token for one in third.chosen] == [int(logits[38].argmax()), int(logits[39][: VOCABULARY - 100].argmax())]


@pytest.mark.parametrize("limit", [VOCABULARY, VOCABULARY - 30])
def test_scores_are_the_log_softmax_below_the_limit(backend: Any, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlx, "_SCORED", 7 * VOCABULARY)  # in blocks of seven rows
    logits = all_logits(backend)[:, :limit].astype(np.float64)
    targets = [*TOKENS[1:], 5]
    targets[3] = int(logits[3].argmax())
    targets[4] = VOCABULARY - 1
    want = logits - np.log(np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1, keepdims=True)) - logits.max(axis=1, keepdims=True)
    scores = backend.step([Row(backend.open(), TOKENS, targets=targets, limit=limit)])[0].scores
    assert scores.logprobs.dtype == np.float64
    for i, target in enumerate(targets):
        if target < limit:
            assert scores.logprobs[i] == pytest.approx(want[i, target], abs=1e-4)
            assert scores.greedy[i] == (logits[i].argmax() == target)
        else:
            assert scores.logprobs[i] == -np.inf
            assert not scores.greedy[i]
    assert scores.greedy[3]


def test_scores_beside_a_choice(backend: Any) -> None:
    result = backend.step([Row(backend.open(), TOKENS, [Choice(VOCABULARY)], targets=TOKENS, limit=VOCABULARY)])[0]
    assert result.chosen[0].token == int(all_logits(backend)[-1].argmax())
    assert len(result.scores.logprobs) == len(TOKENS)


@pytest.mark.parametrize(
    "row",
    [
        lambda s: Row(s, TOKENS[:2], [Choice(VOCABULARY)] * 3),
        lambda s: Row(s, TOKENS[:2], targets=[1], limit=VOCABULARY),
        lambda s: Row(s, TOKENS[:2], targets=[1, VOCABULARY], limit=VOCABULARY),
        lambda s: Row(s, TOKENS[:2], targets=[1, -1], limit=VOCABULARY),
    ],
)
def test_wishes_that_do_not_fit_the_tokens_change_nothing(backend: Any, row: Callable[[int], Row]) -> None:
    sequence = backend.open()
    with pytest.raises(BackendError):
        backend.step([row(sequence)])
    with pytest.raises(BackendError, match="has 0 tokens"):
        backend.trim(sequence, 1)


CONFIGS = {"dense": random_qwen2.config(torch_dtype="float32"), "moe": random_qwen2.moe_config(torch_dtype="float32")}
MODULES = {"dense": lora.ALL, "moe": ("q_proj", "k_proj", "v_proj", "o_proj", *(f"shared_expert.{it}_proj" for it in ("gate", "up", "down")))}


Q = "model.layers.0.self_attn.q_proj"


def adapter_of(folder: Path, kind: str, weights: random_qwen2.Weights) -> tuple[Path, random_qwen2.Weights]:
    """In MLX's format; and the weights merged by hand."""
    settings = lora.settings()
    tensors = lora.tensors(weights, settings, only=MODULES[kind])
    made = convert_adapter(lora.write(folder / "peft", settings, tensors), None, Target("mlx", "f32"), folder / "adapter")
    return made, lora.merged(weights, tensors, {"": 4})


@pytest.mark.parametrize("kv_bits", [16, 8])
@pytest.mark.parametrize("kind", CONFIGS)
def test_an_adapter_is_as_good_as_merged(kind: str, kv_bits: int, tmp_path: Path) -> None:
    config = CONFIGS[kind]
    weights = random_qwen2.weights(config, 3)
    adapter, merged = adapter_of(tmp_path, kind, weights)
    plain = random_qwen2.write_mlx(tmp_path / "plain", config, weights)
    with_it = mlx_models.load(plain, context=64, adapter=adapter, kv_bits=kv_bits)
    want = all_logits(mlx_models.load(random_qwen2.write_mlx(tmp_path / "merged", config, merged), context=64, kv_bits=kv_bits))
    assert np.abs(all_logits(mlx_models.load(plain, context=64, kv_bits=kv_bits)) - want).max() > 0.5
    np.testing.assert_allclose(all_logits(with_it), want, atol=1e-3 if kv_bits == 16 else 0.1)


def test_on_top_of_quantized_weights(tmp_path: Path) -> None:
    config = CONFIGS["dense"]
    weights = random_qwen2.weights(config, 3)
    adapter, merged = adapter_of(tmp_path, "dense", weights)
    want = all_logits(mlx_models.load(random_qwen2.write_mlx(tmp_path / "merged", config, merged), context=64))
    packed = random_qwen2.write_mlx(tmp_path / "packed", config, weights, bits=8)
    got, without = (all_logits(mlx_models.load(packed, context=64, adapter=it)) for it in (adapter, None))
    assert np.abs(got - want).mean() < np.abs(without - want).mean() / 5


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda c, t: c.update(fine_tune_type="dora"), UnsupportedModel, "'dora'"),
        (lambda c, t: c.update(lora_parameters=None), BadFile, "scale"),
        (lambda c, t: c["lora_parameters"].update(scale="4"), BadFile, "scale"),
        (lambda c, t: c["lora_parameters"].update(scale=1e300), BadFile, "scale"),
        (lambda c, t: t.pop(f"{Q}.lora_a"), BadFile, "one half"),
        (lambda c, t: t.update({Q.replace("0", "7") + ".lora_a": t[f"{Q}.lora_a"]}), BadFile, "does not have"),
        (lambda c, t: t.update({"model.layers.0.mlp.switch_mlp.up_proj.lora_a": t[f"{Q}.lora_a"]}), UnsupportedModel, "switch_mlp"),
        (lambda c, t: t.update({f"{Q}.lora_a": np.zeros((64, 4), np.float32)}), BadFile, "do not adapt"),
        (lambda c, t: t.update({f"{Q}.lora_b": np.zeros((5, 128), np.float32)}), BadFile, "do not adapt"),
        (lambda c, t: t.update({f"{Q}.lora_a": np.zeros((128, 4), np.int32)}), BadFile, "I32"),
        (lambda c, t: t.update({f"{Q}.lora_a": np.full((128, 4), np.nan, np.float32)}), BadFile, "finite"),
        (lambda c, t: t.clear(), BadFile, "nothing"),
    ],
)
def test_adapters_that_are_refused(
    tmp_path: Path, folder: Path, change: Callable[[dict[str, Any], dict[str, Any]], object], error: Any, said: str
) -> None:
    import mlx.core as mx

    adapter, _ = adapter_of(tmp_path, "dense", random_qwen2.weights(CONFIGS["dense"], 3))
    file = adapter / "adapters.safetensors"
    config, tensors = json.loads((adapter / "adapter_config.json").read_text()), {name: np.array(it) for name, it in mx.load(str(file)).items()}
    change(config, tensors)
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(file), {name: mx.array(it) for name, it in tensors.items()})
    with pytest.raises(error, match=said):
        mlx_models.load(folder, context=64, adapter=adapter)


def test_a_folder_without_an_adapter(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(BadFile):
        mlx_models.load(folder, context=64, adapter=tmp_path)
    adapter, _ = adapter_of(tmp_path, "dense", random_qwen2.weights(CONFIGS["dense"], 3))
    shutil.copy(adapter / "adapter_config.json", adapter / "adapters.safetensors")
    with pytest.raises(BadFile):
        mlx_models.load(folder, context=64, adapter=adapter)

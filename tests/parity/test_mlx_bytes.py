"""Our MLX folders against mlx_lm.convert on a processor, bit by bit, and against what mlx_lm loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from qwen2_converters import mlx
from qwen2_converters.convert import convert
from qwen2_converters.target import Target
from tests.support import random_qwen2, tiny_checkpoint

mlx_lm = pytest.importorskip("mlx_lm")

pytestmark = pytest.mark.usefixtures("on_processor")

CASES: dict[str, tuple[dict[str, Any], str]] = {
    "tied": (tiny_checkpoint.dense(), "BF16"),
    "untied, F16": (tiny_checkpoint.dense(tie_word_embeddings=False, torch_dtype="float16"), "F16"),
    "F32": (tiny_checkpoint.dense(torch_dtype="float32"), "F32"),
    "F32 said to be BF16": (tiny_checkpoint.dense(), "F32"),
    "odd rows": (tiny_checkpoint.dense(intermediate_size=200), "BF16"),
}


def load(folder: Path) -> dict[str, mx.array]:
    tensors: dict[str, mx.array] = {}
    for shard in folder.glob("model*.safetensors"):
        tensors |= mx.load(str(shard))
    return tensors


def same(ours: dict[str, mx.array], theirs: dict[str, mx.array]) -> None:
    assert {name: (value.dtype, value.shape) for name, value in ours.items()} == {name: (value.dtype, value.shape) for name, value in theirs.items()}
    # Views, so that -0 is not 0.
    assert [name for name in theirs if not mx.array_equal(ours[name].view(mx.uint8), theirs[name].view(mx.uint8)).item()] == []


BITS = (2, 3, 4, 5, 6, 8)


@pytest.mark.parametrize(
    ("case", "bits", "group"),
    [*((case, bits, 64) for case in CASES for bits in (4, 8)), *(("odd rows", bits, group) for bits in BITS for group in (32, 64, 128))],
)
def test_it_is_what_mlx_lm_makes(case: str, bits: int, group: int, tmp_path: Path) -> None:
    config, dtype = CASES[case]
    folder = tiny_checkpoint.write(tmp_path / "hf", config, tiny_checkpoint.weights(config, dtype), dtype=dtype, shards=2)
    ours = convert(folder, Target.parse(f"mlx:{bits}bit-g{group}"), tmp_path / "ours")
    mlx_lm.convert(str(folder), str(tmp_path / "theirs"), quantize=True, q_bits=bits, q_group_size=group)
    same(load(ours), load(tmp_path / "theirs"))
    made, wanted = (json.loads((path / "config.json").read_text()) for path in (ours, tmp_path / "theirs"))
    # mlx_lm writes what it has merged with generation_config.json, which lies beside.
    assert made == wanted | {"eos_token_id": config["eos_token_id"]}
    index = json.loads((ours / "model.safetensors.index.json").read_text())
    assert index == json.loads((tmp_path / "theirs" / "model.safetensors.index.json").read_text())


@pytest.mark.parametrize(("weights", "dtype"), [("bf16", "bfloat16"), ("f16", "float16"), ("f32", "float32")])
@pytest.mark.parametrize("source", ["BF16", "F16", "F32"])
def test_plain_weights_are_rounded_once(source: str, weights: str, dtype: str, tmp_path: Path) -> None:
    config = tiny_checkpoint.dense(dtype="bfloat16")
    values = tiny_checkpoint.weights(config, source)
    ours = convert(tiny_checkpoint.write(tmp_path / "hf", config, values, dtype=source), Target("mlx", weights), tmp_path / "ours")
    same(load(ours), {name: mx.array(value).astype(getattr(mx, dtype)) for name, value in values.items()})
    made = json.loads((ours / "config.json").read_text())
    assert (made["dtype"], made["torch_dtype"]) == (dtype, dtype)
    assert "quantization" not in made
    assert mlx_lm.utils.load_model(ours)[0].model.norm.weight.dtype == getattr(mx, dtype)


@pytest.mark.parametrize("layout", ["each", "fused"])
@pytest.mark.parametrize("weights", ["bf16", "8bit", "4bit"])
def test_experts_are_stacked_and_gates_kept(layout: str, weights: str, tmp_path: Path) -> None:
    config = tiny_checkpoint.moe(num_experts=4)
    values = tiny_checkpoint.weights(config)
    folder = tiny_checkpoint.write(tmp_path / "hf", config, tiny_checkpoint.fused(values) if layout == "fused" else values)
    target = Target("mlx", weights)
    ours = convert(folder, target, tmp_path / "ours")
    want: dict[str, mx.array] = {}
    for name, value in random_qwen2.stacked(values).items():
        array = mx.array(value).astype(mx.bfloat16)
        if target.bits is None or value.ndim < 2 or name.endswith((".mlp.gate.weight", ".shared_expert_gate.weight")) or value.shape[-1] % 64:
            want[name] = array
        else:
            module = name.removesuffix(".weight")
            parts = mx.quantize(array, 64, target.bits)
            want |= dict(zip((name, f"{module}.scales", f"{module}.biases"), parts, strict=True))
    same(load(ours), want)
    model, _ = mlx_lm.utils.load_model(ours)
    assert not hasattr(model.layers[0].mlp.gate, "scales") and not hasattr(model.layers[0].mlp.shared_expert_gate, "scales")
    if target.bits:  # MLX multiplies stacked experts on a processor only in float32, or quantized
        assert np.isfinite(np.array(model(mx.array([[1, 2, 3]])).astype(mx.float32))).all()


def test_shards_and_their_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_checkpoint.dense()
    folder = tiny_checkpoint.write(tmp_path / "hf", config, tiny_checkpoint.weights(config))
    whole = convert(folder, Target("mlx", "mixed_3_6"), tmp_path / "whole")
    monkeypatch.setattr(mlx, "SHARD", 34_000)
    split = convert(folder, Target("mlx", "mixed_3_6"), tmp_path / "split")
    shards = {path.name: dict(mx.load(str(path))) for path in split.glob("*.safetensors")}
    count = len(shards)
    assert count > 2 and sorted(shards) == [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    assert max(sum(array.nbytes for array in tensors.values()) for tensors in shards.values()) <= 34_000
    same(load(split), load(whole))
    index = json.loads((split / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file for file, tensors in shards.items() for name in tensors}
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in load(whole).values())
    one, many = (mlx_lm.utils.load_model(path)[0](mx.array([[1, 2, 3]])) for path in (whole, split))
    assert mx.array_equal(one, many).item()


def test_defaults_that_mlx_lm_guesses_otherwise_are_spelled_out(tmp_path: Path) -> None:
    """mlx_lm takes an absent tie_word_embeddings for true, and reads rope_theta at the top only."""
    config = tiny_checkpoint.dense(tie_word_embeddings=False, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    for name in ("rope_theta", "max_position_embeddings"):
        del config[name]
    values = tiny_checkpoint.weights(config)
    del config["tie_word_embeddings"]
    ours = convert(tiny_checkpoint.write(tmp_path / "hf", config, values), Target("mlx", "bf16"), tmp_path / "ours")
    model, loaded = mlx_lm.utils.load_model(ours)
    assert (loaded["tie_word_embeddings"], loaded["rope_theta"]) == (False, 5e5)
    assert "lm_head" in model

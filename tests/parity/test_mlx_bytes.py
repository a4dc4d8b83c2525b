"""Our MLX folders against mlx_lm.convert, bit by bit, and against what mlx_lm loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from qwen2_converters.convert import check, convert
from qwen2_converters.mlx import write_mlx
from qwen2_converters.target import Target
from qwen2_local.formats.checkpoint import open_checkpoint
from tests.support import random_qwen2, tiny_checkpoint

mlx_lm = pytest.importorskip("mlx_lm")

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


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bits", [4, 8])
def test_it_is_what_mlx_lm_makes(case: str, bits: int, tmp_path: Path) -> None:
    config, dtype = CASES[case]
    folder = tiny_checkpoint.write(tmp_path / "hf", config, tiny_checkpoint.weights(config, dtype), dtype=dtype, shards=2)
    ours = convert(folder, Target("mlx", f"{bits}bit"), tmp_path / "ours")
    mlx_lm.convert(str(folder), str(tmp_path / "theirs"), quantize=True, q_bits=bits, q_group_size=64)
    same(load(ours), load(tmp_path / "theirs"))
    made, wanted = (json.loads((path / "config.json").read_text()) for path in (ours, tmp_path / "theirs"))
    # mlx_lm writes what it has merged with generation_config.json, which lies beside.
    assert made == wanted | {"eos_token_id": config["eos_token_id"]}
    index = json.loads((ours / "model.safetensors.index.json").read_text())
    assert index == json.loads((tmp_path / "theirs" / "model.safetensors.index.json").read_text())


@pytest.mark.parametrize("weights", ["bf16", "f32"])
def test_plain_weights_are_kept(weights: str, tmp_path: Path) -> None:
    config = tiny_checkpoint.dense(dtype="bfloat16")
    values = tiny_checkpoint.weights(config)
    ours = convert(tiny_checkpoint.write(tmp_path / "hf", config, values), Target("mlx", weights), tmp_path / "ours")
    kind = {"bf16": mx.bfloat16, "f32": mx.float32}[weights]
    same(load(ours), {name: mx.array(value).astype(kind) for name, value in values.items()})
    made = json.loads((ours / "config.json").read_text())
    assert {made["dtype"], made["torch_dtype"]} == {"bfloat16" if weights == "bf16" else "float32"}
    assert "quantization" not in made


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
    if target.bits:  # MLX multiplies stacked experts on a processor only in float32, or quantized
        assert np.isfinite(np.array(model(mx.array([[1, 2, 3]])).astype(mx.float32))).all()


def test_shards_and_their_index(tmp_path: Path) -> None:
    config = tiny_checkpoint.dense()
    folder = tiny_checkpoint.write(tmp_path / "hf", config, tiny_checkpoint.weights(config))
    checkpoint, plan = check(folder, Target("mlx", "4bit"))
    split, whole = tmp_path / "split", tmp_path / "whole"
    split.mkdir()
    write_mlx(checkpoint, plan, split, lambda *_: None, shard=40_000)
    convert(folder, Target("mlx", "4bit"), whole)
    shards = sorted(path.name for path in split.glob("*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    same(load(split), load(whole))
    assert open_checkpoint(split).weight_bytes == plan.nbytes


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

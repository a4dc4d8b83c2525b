"""LoRA adapters, converted and merged: llama.cpp and mlx_lm compute with them what W + scale * B @ A says."""

from __future__ import annotations

import json
from math import sqrt
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest

from qwen2_converters.adapters import convert_adapter
from qwen2_converters.convert import Options, convert
from qwen2_converters.target import Target
from qwen2_local.backends.base import Layout, LoadOptions, Row
from qwen2_local.backends.llamacpp import LlamaCpp
from qwen2_local.formats.config import read_config
from tests.support import lora, tiny_checkpoint
from tests.support.packed_parity import TOKENS, apart, gguf_weights, logits
from tests.support.random_qwen2 import Array

mlx_lm = pytest.importorskip("mlx_lm")

pytestmark = pytest.mark.usefixtures("on_processor")

F32 = Target("gguf", "f32")
CONFIG = tiny_checkpoint.dense(torch_dtype="float32", intermediate_size=200)
WEIGHTS = tiny_checkpoint.weights(CONFIG, "F32")

CASES: dict[str, tuple[dict[str, Any], dict[str, float]]] = {
    "plain": (lora.settings(), {"": 16 / 4}),
    "rsLoRA": (lora.settings(use_rslora=True, lora_alpha=8), {"": 8 / sqrt(4)}),
    "an alpha of its own": (
        lora.settings(alpha_pattern={"layers.0.self_attn.q_proj": 64, "up_proj": 4}), {"0.self_attn.q_proj": 16, "up_proj": 1, "": 4},
    ),
    "ranks of their own": (lora.settings(rank_pattern={"k_proj": 8, "down_proj": 2}), {"k_proj": 2, "down_proj": 8, "": 4}),
    "ranks of their own, rsLoRA": (lora.settings(use_rslora=True, rank_pattern={"k_proj": 8}), {"k_proj": 16 / sqrt(8), "": 16 / sqrt(4)}),
}  # fmt: skip
"""adapter_config.json, and the scale of each matrix, by the ends of their names."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint.write(tmp_path_factory.mktemp("base") / "hf", CONFIG, WEIGHTS, dtype="F32")


def by_hand(folder: Path, case: str) -> tuple[Path, Path]:
    """The adapter, and the checkpoint merged by hand."""
    settings, scales = CASES[case]
    tensors = lora.tensors(WEIGHTS, settings)
    source = tiny_checkpoint.write(folder / "merged", CONFIG, lora.merged(WEIGHTS, tensors, scales), dtype="F32")
    return lora.write(folder / "adapter", settings, tensors), source


def adapted_logits(model: Path, adapter: Path) -> Array:
    """As llama.cpp computes them with an adapter."""
    backend = LlamaCpp.load(model, layout=Layout(1, 64), options=LoadOptions("", 64, adapter), threads=1)
    try:
        result = backend.step([Row(backend.open(), TOKENS, logits="all")])[0].logits
    finally:
        backend.close()
    assert result is not None
    return result


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_with_the_adapter_computes_the_merged_model(case: str, base: Path, tmp_path: Path) -> None:
    adapter, merged = by_hand(tmp_path, case)
    plain, want = convert(base, F32, tmp_path / "base.gguf"), logits(convert(merged, F32, tmp_path / "merged.gguf"))
    assert apart(logits(plain), want) > 0.2  # the adapter does something
    assert apart(adapted_logits(plain, convert_adapter(adapter, None, F32, tmp_path / "adapter.gguf")), want) < 2e-3


@pytest.mark.parametrize("weights", ["f16", "bf16"])
def test_in_16_bits(weights: str, base: Path, tmp_path: Path) -> None:
    adapter, merged = by_hand(tmp_path, "rsLoRA")
    plain, want = convert(base, F32, tmp_path / "base.gguf"), logits(convert(merged, F32, tmp_path / "merged.gguf"))
    made = convert_adapter(adapter, read_config(base / "config.json"), Target("gguf", weights), tmp_path / "adapter.gguf")
    assert {tensor.tensor_type.name for tensor in gguf.GGUFReader(made).tensors} == {weights.upper()}
    assert apart(adapted_logits(plain, made), want) < 2e-2


def test_a_padded_model_takes_a_padded_adapter(base: Path, tmp_path: Path) -> None:
    adapter, merged = by_hand(tmp_path, "plain")
    plain = convert(base, F32, tmp_path / "base.gguf", options=Options(pad_ffn=True))
    made = convert_adapter(adapter, None, F32, tmp_path / "adapter.gguf", pad_ffn=True)
    assert gguf_weights(made)["blk.0.ffn_down.weight.lora_a"].shape == (4, 256)
    assert gguf_weights(made)["blk.0.ffn_up.weight.lora_b"].shape == (256, 4)
    assert apart(adapted_logits(plain, made), logits(convert(merged, F32, tmp_path / "merged.gguf"))) < 2e-3


def test_the_file_says_what_it_is(tmp_path: Path) -> None:
    settings = lora.settings(use_rslora=True)
    tensors = lora.tensors(WEIGHTS, settings, only=("q_proj", "down_proj"))
    made = convert_adapter(lora.write(tmp_path / "My-Adapter", settings, tensors), None, Target("gguf", "f16"), tmp_path / "adapter.gguf")
    reader = gguf.GGUFReader(made)
    assert {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF")} == {
        "general.architecture": "qwen2",
        "general.type": "adapter",
        "general.name": "My-Adapter",
        "general.file_type": 1,
        "general.quantization_version": 2,
        "adapter.type": "lora",
        "adapter.lora.alpha": 16 * sqrt(4),
    }
    have = gguf_weights(made)
    for name, value in tensors.items():
        layer, rest = name.removeprefix("base_model.model.model.layers.").split(".", 1)
        module = {"self_attn.q_proj": "attn_q", "mlp.down_proj": "ffn_down"}[rest.partition(".lora_")[0]]
        half = have.pop(f"blk.{layer}.{module}.weight.lora_{'a' if 'lora_A' in name else 'b'}")
        assert np.array_equal(half, value.astype(np.float16).astype(np.float32)), name
    assert have == {}


def mlx_logits(folder: Path, adapter: Path | None = None) -> Array:
    model, _ = mlx_lm.utils.load_model(folder)
    if adapter is not None:
        model = mlx_lm.utils.load_adapters(model, str(adapter))
        model.eval()
    return np.array(model(mx.array([TOKENS]))[0])


@pytest.mark.parametrize("known", [True, False], ids=["base known", "base unknown"])
@pytest.mark.parametrize("case", CASES)
def test_mlx_lm_with_the_adapter_computes_the_merged_model(case: str, known: bool, base: Path, tmp_path: Path) -> None:
    adapter, merged = by_hand(tmp_path, case)
    target = Target("mlx", "f32")
    plain, want = convert(base, target, tmp_path / "base"), mlx_logits(convert(merged, target, tmp_path / "mlx"))
    assert apart(mlx_logits(plain), want) > 0.2
    config = read_config(base / "config.json") if known else None
    assert apart(mlx_logits(plain, convert_adapter(adapter, config, target, tmp_path / "out")), want) < 1e-5


def test_an_adapter_of_some_layers_for_mlx(base: Path, tmp_path: Path) -> None:
    settings = lora.settings(layers_to_transform=[0])
    some = {name: value for name, value in lora.tensors(WEIGHTS, settings).items() if ".layers.0." in name}
    tensors = {name: (value.view(np.uint32) & 0xFFFF0000).view(np.float32) for name, value in some.items()}
    merged = tiny_checkpoint.write(tmp_path / "merged", CONFIG, lora.merged(WEIGHTS, tensors, {"": 4}), dtype="F32")
    adapter = convert_adapter(lora.write(tmp_path / "adapter", settings, tensors, dtype="BF16"), None, Target("mlx", "f32"), tmp_path / "out")
    assert json.loads((adapter / "adapter_config.json").read_text())["lora_parameters"]["keys"][:2] == ["mlp.down_proj", "mlp.gate_proj"]
    plain, want = convert(base, Target("mlx", "f32"), tmp_path / "base"), mlx_logits(convert(merged, Target("mlx", "f32"), tmp_path / "mlx"))
    assert apart(mlx_logits(plain, adapter), want) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_merged_weights(case: str, base: Path, tmp_path: Path) -> None:
    """To float32's rounding; what is not adapted is kept to the bit, and 16 bits are reached by one rounding."""
    adapter, merged = by_hand(tmp_path, case)
    have, want = (gguf_weights(convert(folder, F32, tmp_path / name, options=Options(lora=other))) for folder, name, other in
                  ((base, "have.gguf", adapter), (merged, "want.gguf", None)))  # fmt: skip
    assert have.keys() == want.keys()
    for name, value in want.items():
        if name.endswith(".bias") or "norm" in name or "token_embd" in name:
            assert np.array_equal(have[name], value)
        else:
            np.testing.assert_allclose(have[name], value, rtol=0, atol=1e-6)
    half = gguf_weights(convert(base, Target("gguf", "f16"), tmp_path / "half.gguf", options=Options(lora=adapter)))
    assert np.array_equal(half["blk.1.ffn_down.weight"], have["blk.1.ffn_down.weight"].astype(np.float16))


def test_experts_and_gates_are_merged(tmp_path: Path) -> None:
    config = tiny_checkpoint.moe(torch_dtype="float32")
    weights = tiny_checkpoint.weights(config, "F32")
    settings = lora.settings()
    tensors = lora.tensors(weights, settings, only=(*lora.ALL, "mlp.gate", "shared_expert_gate"))
    adapter = lora.write(tmp_path / "adapter", settings, tensors)
    base = tiny_checkpoint.write(tmp_path / "base", config, weights, dtype="F32")
    merged = tiny_checkpoint.write(tmp_path / "merged", config, lora.merged(weights, tensors, {"": 4}), dtype="F32")
    have = gguf_weights(convert(base, F32, tmp_path / "have.gguf", options=Options(lora=adapter)))
    for name, value in gguf_weights(convert(merged, F32, tmp_path / "want.gguf")).items():
        np.testing.assert_allclose(have[name], value, rtol=0, atol=1e-6, err_msg=name)

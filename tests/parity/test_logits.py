"""The same weights, converted by us and computed by both backends, give the logits that transformers gives (golden/make_logits.py)."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen2_converters.convert import convert
from qwen2_converters.target import Target
from qwen2_local.backends.base import Backend, Layout, LoadOptions, Row
from qwen2_local.backends.llamacpp import LlamaCpp
from qwen2_local.errors import UnsupportedModel
from tests.support import random_qwen2
from tests.support.small_tokenizer import small_json

gguf = pytest.importorskip("gguf")
mx = pytest.importorskip("mlx.core")
mlx = pytest.importorskip("qwen2_local.backends.mlx")


@dataclass(frozen=True)
class Golden:
    config: dict[str, Any]
    seed: int
    checksum: int
    positions: list[int]
    tokens: list[int]
    logits: np.ndarray


def read_golden() -> dict[str, Golden]:
    with np.load(Path(__file__).parent / "golden" / "logits.npz") as file:
        names = [key.removesuffix("/about") for key in file if key.endswith("/about")]
        return {
            name: Golden(**json.loads(str(file[f"{name}/about"])), tokens=file[f"{name}/tokens"].tolist(), logits=file[f"{name}/logits"])
            for name in names
        }


GOLDEN = read_golden()
# How far from transformers' float32 logits each target may be, as `error` measures it. Measured: the largest of all cases, "deep" with its eight
# layers or the mixtures of experts; two layers come to half of it. What 4 bits do to random weights is no test of arithmetic: see below.
BOUNDS = {
    "mlx:f32": 1e-5,  # measured 2.2e-6
    "mlx:bf16": 0.05,  # 0.024 on a CPU, where only the weights are rounded
    "mlx:8bit": 0.25,  # 0.13 in one mixture of experts; dense models 0.054
    "gguf:f32": 2e-3,  # 7.6e-4: the KV cache has 16 bits
    "gguf:f16": 1e-2,  # 3.6e-3
    "gguf:q8_0": 0.15,  # 0.076
}
# How far a quantized file may be from its own weights, dequantized and computed in float32: for llama.cpp that is its 8-bit activations.
OWN_BOUNDS = {"mlx:8bit": 1e-5, "mlx:4bit": 1e-5, "gguf:q8_0": 0.12, "gguf:q4_0": 0.12}  # measured 0, 0, 0.058, 0.070
SEEN = 0.05
"""Every fault in a tensor or a setting shows above what rounding may do to an unquantized model."""


def logits(model: Path, case: Golden) -> np.ndarray:
    layout = Layout(1, 128)
    options = LoadOptions("", layout.context)
    backend: Backend = LlamaCpp.load(model, layout=layout, threads=1) if model.suffix == ".gguf" else mlx.load(model, layout=layout, options=options)
    try:
        sequence, rows = backend.open(), []
        for start in range(0, len(case.tokens), backend.step_tokens):
            result = backend.step([Row(sequence, case.tokens[start : start + backend.step_tokens], logits="all")])[0].logits
            assert result is not None
            rows.append(result)
    finally:
        backend.close()
    return np.concatenate(rows)[case.positions]


def error(got: np.ndarray, case: Golden) -> float:
    """The root mean square over a position's logits, of the worst position, in standard deviations of the logits."""
    return float(np.sqrt(((got - case.logits) ** 2).mean(axis=1)).max() / case.logits.std())


@pytest.mark.parametrize("name", GOLDEN)
def test_the_weights_are_the_golden_ones(name: str) -> None:
    case = GOLDEN[name]
    assert random_qwen2.checksum(random_qwen2.weights(case.config, case.seed)) == case.checksum


def converted(folder: Path, case: Golden, target: Target) -> Path:
    source = random_qwen2.write_hf(folder / "source", case.config, random_qwen2.weights(case.config, case.seed))
    (source / "tokenizer.json").write_text(json.dumps(small_json()))
    return convert(source, target, folder / ("model.gguf" if target.format == "gguf" else "model"))


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("target", BOUNDS)
def test_converted(tmp_path: Path, name: str, target: str) -> None:
    case, chosen = GOLDEN[name], Target.parse(target)
    if chosen.format == "gguf" and case.config.get("norm_topk_prob"):
        # llama.cpp's qwen2moe leaves the chances of the chosen experts as they are.
        with pytest.raises(UnsupportedModel, match="norm_topk_prob"):
            converted(tmp_path, case, chosen)
        return
    got = logits(converted(tmp_path, case, chosen), case)
    print(f"{name:36} {target:10} {error(got, case):.2g}, largest {np.abs(got - case.logits).max():.2g}")
    assert error(got, case) <= BOUNDS[target]
    if target == "mlx:f32":
        assert np.abs(got - case.logits).max() <= 1e-3


@pytest.mark.parametrize("name", ["tied, heads 4/2 of 32", "deep", "moe, top 2 of 8"])
@pytest.mark.parametrize("target", OWN_BOUNDS)
def test_quantized_weights_mean_what_they_dequantize_to(tmp_path: Path, name: str, target: str) -> None:
    case, chosen = GOLDEN[name], Target.parse(target)
    model = converted(tmp_path, case, chosen)
    read = dequantized_gguf if chosen.format == "gguf" else dequantized_mlx
    plain = random_qwen2.write_mlx(tmp_path / "plain", case.config, read(model, case))
    exact = replace(case, logits=logits(plain, case))
    got = logits(model, case)
    print(f"{name:36} own {target:10} {error(got, exact):.2g}")
    assert error(got, exact) <= OWN_BOUNDS[target]


def dequantized_mlx(model: Path, case: Golden) -> random_qwen2.Weights:
    arrays = mx.load(str(model / "model.safetensors"))
    bits = json.loads((model / "config.json").read_text())["quantization"]["bits"]
    out = {}
    for name in random_qwen2.stacked(random_qwen2.weights(case.config, case.seed)):
        parts = [arrays[name], *(arrays.get(name.removesuffix("weight") + part) for part in ("scales", "biases"))]
        if parts[1] is not None:
            parts = [mx.dequantize(parts[0], *(part.astype(mx.float32) for part in parts[1:]), group_size=64, bits=bits)]
        out[name] = np.array(parts[0].astype(mx.float32))
    return out


def dequantized_gguf(model: Path, case: Golden) -> random_qwen2.Weights:
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(model).tensors}
    architecture = gguf.MODEL_ARCH.QWEN2MOE if "num_experts" in case.config else gguf.MODEL_ARCH.QWEN2
    names = gguf.get_tensor_name_map(architecture, case.config["num_hidden_layers"])
    out = {}
    for name, like in random_qwen2.stacked(random_qwen2.weights(case.config, case.seed)).items():
        tensor = tensors[names.get_name(name.replace("switch_mlp", "experts"), (".weight", ".bias"))]
        out[name] = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(like.shape)
    return out


def kinds(name: str) -> list[str]:
    """The tensors' names without the numbers of layers and experts."""
    return sorted({re.sub(r"\d+", "*", tensor) for tensor in random_qwen2.weights(GOLDEN[name].config, 0)})


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name in ("untied, heads 6/2 of 64", "deep", "moe, top 2 of 8") for kind in kinds(name)])
def test_every_tensor_is_seen(tmp_path: Path, name: str, kind: str) -> None:
    """In one layer, for one expert: a bias or matrix of zeros, a norm of ones."""
    case = GOLDEN[name]
    weights = random_qwen2.weights(case.config, case.seed)
    tensor = next(tensor for tensor in weights if re.sub(r"\d+", "*", tensor) == kind)
    weights[tensor] = np.full_like(weights[tensor], 1.0 if "norm" in kind else 0.0)
    changed = error(logits(random_qwen2.write_mlx(tmp_path, case.config, weights), case), case)
    print(f"{name:36} {tensor} {changed:.2g}")
    assert changed > SEEN


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("deep", {"rope_theta": 1e4}),
        ("deep", {"num_attention_heads": 8, "num_key_value_heads": 4}),
        ("untied, heads 4/4 of 64, eps 1e-2", {"rms_norm_eps": 1e-6}),
        ("yarn", {"rope_scaling": None}),
        ("yarn", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}}),
        ("yarn", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}}),
        ("moe, top 2 of 8", {"norm_topk_prob": True}),
        ("moe, top 2 of 8", {"num_experts_per_tok": 3}),
    ],
)
def test_every_setting_is_seen(tmp_path: Path, name: str, changes: dict[str, Any]) -> None:
    case = GOLDEN[name]
    folder = random_qwen2.write_mlx(tmp_path, case.config | changes, random_qwen2.weights(case.config, case.seed))
    changed = error(logits(folder, case), case)
    print(f"{name:36} {changes} {changed:.2g}")
    assert changed > SEEN

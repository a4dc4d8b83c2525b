"""What other implementations read in a converted file, and what our backends compute with it."""

from __future__ import annotations

from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np

from qwen2_local.backends.base import Backend, Layout, LoadOptions, Row
from qwen2_local.backends.llamacpp import LlamaCpp
from qwen2_local.formats.checkpoint import open_checkpoint
from tests.support.random_qwen2 import Array, Weights

TOKENS = [int(n) for n in np.random.RandomState(7).randint(3, 250, 24)]


def gguf_weights(path: Path) -> Weights:
    """Every tensor in float32, as gguf-py reads it."""
    return {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(path).tensors}


def mlx_weights(folder: Path) -> Weights:
    """Every matrix and vector in float32, as MLX reads it."""
    config = open_checkpoint(folder).config
    arrays: dict[str, mx.array] = {}
    for shard in folder.glob("*.safetensors"):
        arrays |= mx.load(str(shard))  # type: ignore[arg-type, operator]
    out = {}
    for name, array in arrays.items():
        module = name.removesuffix(".weight")
        if name.endswith((".scales", ".biases")):
            continue
        if f"{module}.scales" in arrays:
            assert config.quantization is not None
            scales, biases = arrays[f"{module}.scales"], arrays[f"{module}.biases"]
            array = mx.dequantize(array, scales, biases, group_size=config.quantization.group, bits=config.quantization.bits)
        out[name] = np.array(array.astype(mx.float32))
    return out


def same(ours: Weights, theirs: Weights) -> None:
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in theirs.items()}
    assert [name for name in theirs if not np.array_equal(ours[name], theirs[name])] == []


def logits(model: Path) -> Array:
    """Those of every one of `TOKENS`, by the backend that is for `model`."""
    from qwen2_local.backends import mlx

    layout = Layout(1, 64)
    options = LoadOptions("", layout.context)
    backend: Backend = mlx.load(model, layout=layout, options=options) if model.is_dir() else LlamaCpp.load(model, layout=layout, threads=1)
    try:
        result = backend.step([Row(backend.open(), TOKENS, logits="all")])[0].logits
    finally:
        backend.close()
    assert result is not None
    return result


def apart(one: Array, other: Array) -> float:
    """The root mean square over a position's logits, of the worst position, in standard deviations of the logits."""
    return float(np.sqrt(((one - other) ** 2).mean(axis=1)).max() / other.std())

"""What a KV of 8 bits costs in exactness, on both backends: on the guide, and on weights with keys' biases as large as Qwen2's.

With `QWEN2_LOCAL_ALL_POINTS=1 python -m pytest -s tests/runtime/test_kv_bits.py` it prints the table of docs/kv-cache.md, which has a size of bias
and a way to store that are not tested otherwise. Errors are the root mean square over all logits of a text, in standard deviations of the
logits, from those of MLX in float32.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qwen2_local
from qwen2_converters.convert import convert
from qwen2_converters.target import Target
from qwen2_local import loading
from qwen2_local.backends.base import Backend, Layout, LoadOptions, Row
from qwen2_local.tokens import Tokenizer
from tests.support import mlx_models, random_qwen2
from tests.support.small_tokenizer import small_json

mx = pytest.importorskip("mlx.core")
mlx = pytest.importorskip("qwen2_local.backends.mlx")
mlx_kv = pytest.importorskip("qwen2_local.backends.mlx_kv")
llamacpp = pytest.importorskip("qwen2_local.backends.llamacpp")

COUNT = 160
WHOLE_TABLE = bool(os.environ.get("QWEN2_LOCAL_ALL_POINTS"))
BIASES = (0, 200, 600) if WHOLE_TABLE else (0, 600)
"""Of one channel of the keys in the first and the last layer. Qwen2's are of this size there, and a tenth or less in between."""

BOUNDS = {"mlx 8": 0.02, "llama.cpp 16": 0.05, "llama.cpp 8": 0.2}


@dataclass(frozen=True)
class Case:
    """A model in both formats, in 32 bits, and a text."""

    mlx: Path
    gguf: Path
    tokens: list[int]


def guide_case(folder: Path) -> Case:
    source = Path(qwen2_local.__file__).parent / "guide"
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    tokens = Tokenizer.from_json(source / "tokenizer.json").encode(text)[:COUNT]
    return Case(convert(source, Target.parse("mlx:f32"), folder / "mlx"), convert(source, Target.parse("gguf:f32"), folder / "gguf"), tokens)


def biased_case(folder: Path, bias: float) -> Case:
    """In a channel that RoPE turns slowly, as in the real ones: there it leaves attention as it was."""
    config = random_qwen2.config(num_hidden_layers=4, hidden_size=256)
    weights = random_qwen2.weights(config, 1)
    for layer in (0, config["num_hidden_layers"] - 1):
        weights[f"model.layers.{layer}.self_attn.k_proj.bias"].reshape(2, 64)[:, 31] += np.float32(bias)
    source = random_qwen2.write_hf(folder / "source", config, weights)
    (source / "tokenizer.json").write_text(json.dumps(small_json()))
    tokens = [int(n) for n in np.random.RandomState(5).randint(0, 320, COUNT)]
    return Case(random_qwen2.write_mlx(folder / "mlx", config, weights), convert(source, Target.parse("gguf:f32"), folder / "gguf"), tokens)


@pytest.fixture(scope="module", params=["guide", *BIASES], ids=lambda it: it if it == "guide" else f"bias {it}")
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    folder = tmp_path_factory.mktemp("kv")
    yield guide_case(folder) if request.param == "guide" else biased_case(folder, request.param)


def logits(backend: Backend, tokens: list[int]) -> np.ndarray:
    """Token by token for the last half, as in a reply."""
    sequence, half = backend.open(), len(tokens) // 2
    rows = [Row(sequence, tokens[:half], logits="all"), *(Row(sequence, [token], logits="all") for token in tokens[half:])]
    try:
        return np.concatenate([backend.step([row])[0].logits for row in rows])
    finally:
        backend.close()


class Naive(mlx_kv.PlainKv):  # type: ignore[misc]
    """8 bits for keys with their biases, in the layers `where`; as MLX's own quantized cache does."""

    def __init__(self, plain: Any, layers: int, where: range) -> None:
        super().__init__(plain.head_dim, plain.dtype)
        object.__setattr__(self, "about", {"layer": -1, "layers": layers, "where": where})

    def encode(self, keys: Any, values: Any) -> tuple[Any, ...]:
        self.about["layer"] = layer = (self.about["layer"] + 1) % self.about["layers"]
        if layer not in self.about["where"]:
            return keys, values
        return tuple(mx.dequantize(*mx.quantize(it, 64, 8), group_size=64, bits=8) for it in (keys, values))


def naive(case: Case, *, spare_the_ends: bool) -> Backend:
    backend = mlx_models.load(case.mlx, context=COUNT)
    layers = backend.info.layers
    where = range(1, layers - 1) if spare_the_ends else range(layers)
    backend._model = replace(backend._model, kv=Naive(backend._model.kv, layers, where))
    return backend


def test_errors(case: Case, request: pytest.FixtureRequest) -> None:
    def llama(bits: int) -> Backend:
        options = LoadOptions("test", COUNT, kv_bits=bits)
        return llamacpp.LlamaCpp.load(case.gguf, layout=Layout(1, COUNT), options=options, threads=1)

    exact = logits(mlx_models.load(case.mlx, context=COUNT), case.tokens)
    backends = {
        "mlx, naive 8": naive(case, spare_the_ends=False),
        **({"mlx, naive 8, ends 16": naive(case, spare_the_ends=True)} if WHOLE_TABLE else {}),
        "mlx 8": mlx_models.load(case.mlx, context=COUNT, kv_bits=8),
        "llama.cpp 16": llama(16),
        "llama.cpp 8": llama(8),
    }
    got = {name: logits(backend, case.tokens) for name, backend in backends.items()}
    errors = {name: float(np.sqrt(((it - exact) ** 2).mean()) / exact.std()) for name, it in got.items()}
    same = {name: float((it.argmax(axis=1) == exact.argmax(axis=1)).mean()) for name, it in got.items()}
    print(request.node.name, {name: f"{errors[name]:.2g} ({same[name]:.1%})" for name in errors})
    for name, bound in BOUNDS.items():
        assert errors[name] <= bound, name
    assert errors["mlx 8"] < errors["mlx, naive 8"]


def test_a_kv_of_8_bits_takes_about_half(case: Case) -> None:
    sizes = [mlx_models.load(case.mlx, context=COUNT, kv_bits=bits).info.kv_bytes_per_token for bits in (16, 8)]
    # On a CPU the other one is float32, and so are the scales.
    assert sizes[1] / sizes[0] == pytest.approx((8 + 2 * 32 / 64) / 32)


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
@pytest.mark.parametrize("wide", [16, 32])
def test_loading_counts_mlxs_bits_as_they_are(head_dim: int, wide: int) -> None:
    kept = mlx_kv.QuantizedKv(head_dim, mx.float32 if wide == 32 else mx.bfloat16)
    bits = 8 * sum(channels * dtype.size for channels, dtype in kept.parts) / (2 * head_dim)
    assert loading._mlx_kv_bits(8, wide, head_dim) == bits
    assert loading._mlx_kv_bits(16, wide, head_dim) == wide

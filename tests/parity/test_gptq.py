"""GPTQ checkpoints become GGUF and MLX with the same weights, bit for bit, as other implementations read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2_converters import gptq, repack
from qwen2_converters import packed as reading
from qwen2_converters.convert import convert
from qwen2_converters.target import Target
from tests.support import packed, tiny_checkpoint
from tests.support.packed_parity import TOKENS, apart, gguf_weights, logits, mlx_weights, same

mlx_lm = pytest.importorskip("mlx_lm")

pytestmark = pytest.mark.usefixtures("on_processor")

BITS = st.sampled_from([4, 8])
GROUP = st.sampled_from([32, 64, 128])
SEED = st.integers(0, 1000)


def unpacked(matrix: packed.Matrix, bits: int) -> repack.Codes:
    parts = packed.gptq(matrix, bits)
    return gptq.unpack(parts["qweight"], parts["scales"], bits)


@settings(deadline=None, max_examples=30)
@given(bits=BITS, group=GROUP, rows=st.integers(1, 5), groups=st.integers(1, 3), seed=SEED)
def test_llama_cpp_reads_the_same_weights(bits: int, group: int, rows: int, groups: int, seed: int) -> None:
    matrix = packed.random_matrix(rows * 8, groups * group, bits=bits, group=group, seed=seed)
    rows_of = unpacked(matrix, bits)
    if bits == 4:
        have = gguf.quants.dequantize(repack.q4_0(rows_of), gguf.GGMLQuantizationType.Q4_0)
    else:
        have = gguf.quants.dequantize(repack.q8_0(rows_of), gguf.GGMLQuantizationType.Q8_0)
    assert np.array_equal(have, matrix.weights)


@settings(deadline=None, max_examples=30)
@given(bits=BITS, group=GROUP, smaller=GROUP, rows=st.integers(1, 5), groups=st.integers(1, 3), seed=SEED)
def test_mlx_reads_the_same_weights(bits: int, group: int, smaller: int, rows: int, groups: int, seed: int) -> None:
    """Also in smaller groups, which repeat the scales."""
    smaller = min(group, smaller)
    matrix = packed.random_matrix(rows * 8, groups * group, bits=bits, group=group, seed=seed)
    weight, scales, biases = map(mx.array, repack.mlx_affine(unpacked(matrix, bits), bits, smaller))
    have = mx.dequantize(weight, scales, biases, group_size=smaller, bits=bits)
    assert have.dtype == mx.float32
    assert np.array_equal(np.array(have), matrix.weights)


@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_not_symmetric_or_not_in_order_is_seen(bits: int) -> None:
    parts = packed.gptq(packed.random_matrix(32, 256, bits=bits), bits)
    assert gptq.is_symmetric(parts["qzeros"], bits)
    assert gptq.is_ordered(parts["g_idx"], 128)
    assert not gptq.is_ordered(parts["g_idx"], 64)
    matrix = packed.random_matrix(32, 256, bits=bits)
    matrix.zeros[31, 1] -= 1
    assert not gptq.is_symmetric(packed.gptq(matrix, bits)["qzeros"], bits)
    assert not gptq.is_ordered(parts["g_idx"][::-1].copy(), 128)


DENSE = tiny_checkpoint.dense(intermediate_size=256, torch_dtype="float16")
CASES: dict[str, tuple[dict[str, Any], int, int]] = {
    "tied, 4 bits": (DENSE, 4, 128),
    "untied, 8 bits": (DENSE | {"tie_word_embeddings": False}, 8, 128),
    "groups of 32": (DENSE, 4, 32),
    "experts": (tiny_checkpoint.moe(torch_dtype="float16"), 4, 64),
}


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_to_gguf_and_mlx(case: str, tmp_path: Path) -> None:
    """Every weight of the outputs, as gguf-py and MLX read them, is the one that the checkpoint stands for."""
    config, bits, group = CASES[case]
    source, plain = packed.checkpoint(tmp_path, config, packed.settings("gptq", bits, group), shards=3)
    ours = convert(source, Target("gguf", {4: "q4_0", 8: "q8_0"}[bits]), tmp_path / "ours.gguf")
    same(gguf_weights(ours), gguf_weights(convert(plain, Target("gguf", "f32"), tmp_path / "plain.gguf")))
    ours = convert(source, Target("mlx", f"{bits}bit-g{group}" if group != 64 else f"{bits}bit"), tmp_path / "ours")
    same(mlx_weights(ours), mlx_weights(convert(plain, Target("mlx", "f32"), tmp_path / "mlx")))


@pytest.mark.parametrize("case", ["tied, 4 bits", "untied, 8 bits", "experts"])
def test_both_backends_and_mlx_lm_compute_what_the_weights_say(case: str, tmp_path: Path) -> None:
    config, bits, group = CASES[case]
    source, plain = packed.checkpoint(tmp_path, config, packed.settings("gptq", bits, group))
    # llama.cpp rounds activations to 8 bits before it multiplies.
    for target, tolerance in ((f"gguf:q{bits}_0", 0.12), (f"mlx:{bits}bit-g{group}", 1e-5)):
        format = Target.parse(target).format
        want = logits(convert(plain, Target(format, "f32"), tmp_path / f"plain.{format}"))
        made = convert(source, Target.parse(target), tmp_path / f"ours.{format}")
        assert want.std() > 0.5
        assert apart(logits(made), want) < tolerance, target
    model, _ = mlx_lm.utils.load_model(made)
    # mlx_lm computes in 16 bits up to the first matrix: the embedding and a norm.
    assert apart(np.array(model(mx.array([TOKENS]))[0].astype(mx.float32)), want) < 2e-3


def test_a_bias_of_zeros_is_dropped_and_slices_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AutoGPTQ writes a bias beside every matrix. A matrix goes through memory some rows at a time."""
    tensors, _ = packed.quantized(DENSE, packed.settings("gptq"))
    config = DENSE | {"quantization_config": packed.settings("gptq")}
    plain = convert(tiny_checkpoint.write(tmp_path / "plain", config, tensors, dtype="F16"), Target("gguf", "q4_0"), tmp_path / "plain.gguf")
    zeros = {f"model.layers.{layer}.self_attn.o_proj.bias": np.zeros(128, np.float16) for layer in (0, 1)}
    source = tiny_checkpoint.write(tmp_path / "biased", config, tensors | zeros, dtype="F16")
    monkeypatch.setattr(reading, "_WEIGHTS", 128 * 24)
    sliced = convert(source, Target("gguf", "q4_0"), tmp_path / "biased.gguf", name="plain")
    assert sliced.read_bytes() == plain.read_bytes()

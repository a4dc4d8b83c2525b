"""GPTQ checkpoints become GGUF and MLX with the same weights, bit for bit, as other implementations read them."""

from __future__ import annotations

import gguf
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2_converters import gptq, repack
from tests.support import packed

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

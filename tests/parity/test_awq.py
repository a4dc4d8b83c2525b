"""AWQ checkpoints become MLX with the same weights, bit for bit, and GGUF Q4_1 within the rounding of its minima."""

from __future__ import annotations

import gguf
import mlx.core as mx
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2_converters import awq, repack
from tests.support import packed

GROUP = st.sampled_from([32, 64, 128])
SHAPE = {"group": GROUP, "rows": st.integers(1, 5), "groups": st.integers(1, 3), "seed": st.integers(0, 1000)}


def unpacked(matrix: packed.Matrix) -> repack.Codes:
    return awq.unpack(**packed.awq(matrix))


@settings(deadline=None, max_examples=30)
@given(**SHAPE)
def test_llama_cpp_reads_them_within_the_rounding_of_the_minimum(group: int, rows: int, groups: int, seed: int) -> None:
    matrix = packed.random_matrix(rows * 8, groups * group, group=group, symmetric=False, seed=seed)
    have = gguf.quants.dequantize(repack.q4_1(unpacked(matrix)), gguf.GGMLQuantizationType.Q4_1)
    scales, zeros = (np.repeat(value.astype(np.float32), group, axis=1) for value in (matrix.scales, matrix.zeros))
    minima = (scales * -zeros).astype(np.float16).astype(np.float32)
    assert np.array_equal(have, scales * matrix.codes + minima)
    assert (np.abs(have - matrix.weights) <= 0.0074 * scales).all()


@settings(deadline=None, max_examples=30)
@given(smaller=GROUP, **SHAPE)
def test_mlx_reads_the_same_weights(group: int, smaller: int, rows: int, groups: int, seed: int) -> None:
    smaller = min(group, smaller)
    matrix = packed.random_matrix(rows * 8, groups * group, group=group, symmetric=False, seed=seed)
    weight, scales, biases = map(mx.array, repack.mlx_affine(unpacked(matrix), 4, smaller))
    have = mx.dequantize(weight, scales, biases, group_size=smaller, bits=4)
    assert have.dtype == mx.float32
    assert np.array_equal(np.array(have), matrix.weights)


def test_minima_beyond_16_bits_are_seen() -> None:
    codes = np.zeros((1, 32), np.uint8)
    fits, not_ = (repack.Codes(codes, np.array([[scale]], np.float16), np.array([[15]], np.uint8)) for scale in (4000, 5000))
    assert repack.fits_q4_1(fits)
    assert not repack.fits_q4_1(not_)

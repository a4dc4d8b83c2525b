"""Our affine quantization and our casts against MLX's own on a processor, bit by bit, on whatever numbers there are."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from qwen2_converters import affine
from qwen2_converters.floats import finite, narrow, widen

Bits = npt.NDArray[Any]

MLX = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
UNSIGNED = {"F32": (mx.uint32, np.uint32), "F16": (mx.uint16, np.uint16), "BF16": (mx.uint16, np.uint16)}
TYPES = st.sampled_from(["F32", "F16", "BF16"])


pytestmark = pytest.mark.usefixtures("on_processor")


def bits_of(array: mx.array, dtype: str) -> Bits:
    return np.array(array.reshape(-1).view(UNSIGNED[dtype][0]))


def array_of(bits: Bits, dtype: str) -> mx.array:
    return mx.array(bits).view(MLX[dtype])


def same_as_mlx(weights: Bits, dtype: str, bits: int, group: int) -> None:
    codes, scales, biases = affine.quantize(weights, dtype, bits, group)
    theirs = mx.quantize(array_of(weights, dtype).reshape(-1, group), group, bits)
    assert np.array_equal(codes.view(np.uint32), np.array(theirs[0]).reshape(-1))
    assert np.array_equal(narrow(scales, dtype), bits_of(theirs[1], dtype))
    # +0 and -0 are told apart, too.
    assert np.array_equal(narrow(biases, dtype), bits_of(theirs[2], dtype))


def values(dtype: str, count: int) -> st.SearchStrategy[Bits]:
    """The bits of `count` numbers: any at all, subnormal ones among them, of a size that no group's range is too large for `dtype`."""
    largest = 30000.0 if dtype == "F16" else float(np.float32(1e38))
    floats = st.floats(-largest, largest, width=16 if dtype == "F16" else 32)
    return arrays(np.float32, count, elements=floats).map(lambda made: narrow(made, dtype))


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_random_weights(dtype: str, bits: int, group: int) -> None:
    """Over several chunks, the last one smaller."""
    random = np.random.default_rng(bits * group)
    made = 0.02 * random.standard_normal(2 * affine._CHUNK + 3 * group)
    same_as_mlx(narrow(made[: made.size // group * group].astype(np.float32), dtype), dtype, bits, group)


@settings(max_examples=300)
@given(st.data(), TYPES, st.sampled_from([2, 3, 4, 5, 6, 8]), st.sampled_from([32, 64, 128]))
def test_any_weights(data: st.DataObject, dtype: str, bits: int, group: int) -> None:
    same_as_mlx(data.draw(values(dtype, 3 * group)), dtype, bits, group)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_groups_with_nothing_or_one_thing_in_them(dtype: str) -> None:
    zeros, ones, negative = np.zeros(32), np.ones(32), -np.full(32, 0.37)
    one, last, mixed = np.zeros(32), np.zeros(32), np.where(np.arange(32) % 2, -0.0, 0.0)
    one[7], last[31] = 3.0, -1e-6
    weights = narrow(np.concatenate([zeros, ones, negative, one, last, mixed, -mixed, 1e-9 * ones]).astype(np.float32), dtype)
    for bits in (2, 3, 4, 5, 6, 8):
        same_as_mlx(weights, dtype, bits, 32)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_the_weights_are_left_as_they_were(dtype: str, count: int) -> None:
    """Another output may be made of them."""
    weights = narrow(np.linspace(-1, 1, 32 * count, dtype=np.float32), dtype)
    before = weights.copy()
    affine.quantize(weights, dtype, 4, 32)
    assert np.array_equal(weights, before)


@pytest.mark.parametrize("fault", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_what_is_no_number_shows_in_its_group_s_scale(dtype: str, fault: float) -> None:
    weights = np.linspace(-1, 1, 96, dtype=np.float32)
    weights[40] = fault
    _, scales, _ = affine.quantize(narrow(weights, dtype), dtype, 4, 32)
    assert np.isfinite(scales).tolist() == [True, False, True]


@given(st.data(), TYPES, TYPES)
def test_casts(data: st.DataObject, source: str, target: str) -> None:
    """Any bits: subnormal, infinite and too large ones; of NaN only that it stays one."""
    unsigned = UNSIGNED[source][1]
    bits = data.draw(arrays(unsigned, 16))
    ours = narrow(widen(bits, source), target)
    theirs = array_of(bits, source).astype(MLX[target])
    nan = np.array(mx.isnan(theirs))
    assert np.array_equal(ours[~nan], bits_of(theirs, target)[~nan])
    assert [finite(ours[i : i + 1], target) for i in range(16)] == np.array(mx.isfinite(theirs)).tolist()

"""MLX's affine quantization in NumPy: bit for bit what mx.quantize computes on a processor, in two thirds of its time and on any thread.

On a GPU MLX rounds otherwise; here a model's bytes do not depend on the machine that made them.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from qwen2_converters.floats import widen

Bytes: TypeAlias = "npt.NDArray[np.uint8]"
Floats: TypeAlias = "npt.NDArray[np.float32]"

_CHUNK = 150_000
"""Weights at a time: few enough for a core's own cache. No power of two: columns so far apart would push one another out of it."""

_LEAST = np.float32(1e-7)
"""The least step from code to code."""


def quantize(weights: npt.NDArray[Any], dtype: str, bits: int, group: int) -> tuple[Bytes, Floats, Floats]:
    """weights: the bits (uint32 for F32, else uint16) of whole groups of `group` weights, in `dtype`.

    Gives codes of `bits` bits, the first in the lowest bits of the first byte; and the scale and the bias of each group, so that a weight is
    about code * scale + bias. bits: 2, 3, 4, 5, 6 or 8; group: a multiple of 8. Where a weight is no finite number, or a group spans more than
    float32 can say, its scale is none either.
    """
    groups = weights.reshape(-1, group)
    codes = np.empty((len(groups), group * bits // 8), np.uint8)
    scales, biases = np.empty(len(groups), np.float32), np.empty(len(groups), np.float32)
    step = max(1, _CHUNK // group)
    for first in range(0, len(groups), step):
        chunk = slice(first, first + step)
        # A group a column: NumPy then works on many groups at once. A copy even of a single group, as it is overwritten.
        columns = widen(np.array(groups[chunk].T, order="C"), dtype)
        scales[chunk], biases[chunk] = _line(columns, bits)
        codes[chunk] = _packed(_codes(columns, scales[chunk], biases[chunk], bits), bits).T
    return codes.reshape(-1), scales, biases


def _line(columns: Floats, bits: int) -> tuple[Floats, Floats]:
    """Scale and bias of each column: the larger end of its range is met exactly, and so is 0 if it lies within."""
    low, high = columns.min(axis=0), columns.max(axis=0)
    with np.errstate(invalid="ignore", over="ignore"):
        scale = np.maximum((high - low) / np.float32(2**bits - 1), _LEAST)
        below = np.abs(low) > np.abs(high)
        edge = np.where(below, low, high)
        scale = np.where(below, scale, -scale)
        zero = np.rint(edge / scale)
        far = zero != 0
        np.divide(edge, zero, out=scale, where=far)
    return scale, np.where(far, edge, np.float32(0))


def _codes(columns: Floats, scale: Floats, bias: Floats, bits: int) -> Bytes:
    """The nearest codes. Overwrites `columns`."""
    with np.errstate(invalid="ignore", over="ignore"):
        np.subtract(columns, bias, out=columns)
        np.divide(columns, scale, out=columns)
        np.rint(columns, out=columns)
        np.clip(columns, 0, 2**bits - 1, out=columns)
        return columns.astype(np.uint8)


def _packed(codes: Bytes, bits: int) -> Bytes:
    """Codes [group, groups] -> bytes [group * bits / 8, groups]: eight codes fill as many bytes as they have bits."""
    if bits == 8:
        return codes
    group, groups = codes.shape
    eights = codes.reshape(group // 8, 8, groups)
    packed = np.zeros((group // 8, bits, groups), np.uint8)
    for index in range(8):
        byte, shift = divmod(index * bits, 8)
        packed[:, byte] |= eights[:, index] * np.uint8(1 << shift)  # NumPy shifts bytes one by one
        if shift + bits > 8:
            packed[:, byte + 1] |= eights[:, index] >> (8 - shift)
    return packed.reshape(-1, groups)

"""The float types of checkpoints, as NumPy has them and has them not (BF16: its bits)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

_EXPONENT = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}
"""The bits that are all set in infinities and NaN, and only there."""


def widen(bits: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float32]:
    """The values of `bits` (uint32 for F32, else uint16) as float32, which holds them all. F32: the same memory."""
    match dtype:
        case "F32":
            return bits.view(np.float32)
        case "F16":
            return bits.view(np.float16).astype(np.float32)
        case _:
            wide = bits.astype(np.uint32)
            return np.left_shift(wide, 16, out=wide).view(np.float32)


def narrow(values: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[Any]:
    """The bits (uint32 for F32, else uint16) of `values` in `dtype`, rounded to nearest, ties to even; too large ones become infinite.

    NaN stays one.
    """
    match dtype:
        case "F32":
            return values.view(np.uint32)
        case "F16":
            with np.errstate(over="ignore"):
                return values.astype(np.float16).view(np.uint16)
        case _:
            bits = values.view(np.uint32)
            made = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
            made[np.isnan(values)] = 0x7FC0  # rounding up, some would become numbers
            return made


def finite(bits: npt.NDArray[Any], dtype: str) -> bool:
    """Are all of `bits` (uint32 for F32, else uint16) finite numbers?"""
    exponent = _EXPONENT[dtype]
    return not ((bits & exponent) == exponent).any()

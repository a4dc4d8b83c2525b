"""GPTQ's packing, as AutoGPTQ and its heirs write it ("checkpoint_format": "gptq").

qweight int32 [columns * bits / 32, rows]: a code's lowest bits first, along the columns. qzeros int32 [groups, rows * bits / 32]: each zero
minus one. scales float16 [groups, rows]. g_idx int32 [columns]: the group of each column, which is column // group unless the columns
were reordered.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from qwen2_converters.repack import Codes

Words = npt.NDArray[np.int32]


def unpack(qweight: Words, scales: npt.NDArray[np.float16], bits: int) -> Codes:
    """The rows that these columns of qweight and scales hold, of a matrix for which `is_symmetric` and `is_ordered` are true."""
    packed = np.ascontiguousarray(qweight.T).view(np.uint8)
    codes = packed if bits == 8 else _nibbles(packed)
    zeros = np.full(scales.shape[::-1], 1 << (bits - 1), np.uint8)
    return Codes(codes, np.ascontiguousarray(scales.T), zeros)


def is_symmetric(qzeros: Words, bits: int) -> bool:
    """Is the middle code the zero of every group?"""
    middle = (1 << (bits - 1)) - 1
    return bool((qzeros.view(np.uint8) == (middle if bits == 8 else middle * 0x11)).all())


def is_ordered(g_idx: npt.NDArray[Any], group: int) -> bool:
    """Does each group hold neighbouring columns, in order?"""
    return bool(np.array_equal(g_idx, np.arange(g_idx.size) // group))


def _nibbles(packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    codes = np.empty((packed.shape[0], packed.shape[1] * 2), np.uint8)
    codes[:, 0::2] = packed & 0x0F
    codes[:, 1::2] = packed >> 4
    return codes

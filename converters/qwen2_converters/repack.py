"""A quantized matrix from one format's blocks into another's, without quantizing anew: the codes stay, only their order changes.

Exact, but for Q4_1, which keeps a minimum where AWQ keeps a zero point: scale * zero is rounded to 16 bits, 0.0073 of a step at most.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Buffer: TypeAlias = "npt.NDArray[np.uint8]"

_BLOCK = 32
"""Weights of a block of Q4_0, Q4_1 and Q8_0."""


@dataclass(frozen=True, slots=True)
class Codes:
    """Whole rows of a matrix whose weights are scale * (code - zero), each scale and zero for a group of a row.

    codes: uint8 [rows, columns]. scales: finite float16 [rows, groups]. zeros: uint8 [rows, groups].
    """

    codes: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.float16]
    zeros: npt.NDArray[np.uint8]

    @property
    def group(self) -> int:
        """Weights that share a scale."""
        columns, groups = int(self.codes.shape[1]), int(self.scales.shape[1])
        return columns // groups


def q4_0(matrix: Codes) -> Buffer:
    """uint8 [rows, columns / 32 * 18]. All zeros have to be 8."""
    return _blocks(_per_block(matrix, matrix.scales), _nibbles(matrix))


def q4_1(matrix: Codes) -> Buffer:
    """uint8 [rows, columns / 32 * 20]. A minimum that is too large for 16 bits becomes infinite: see `fits_q4_1`."""
    return _blocks(_per_block(matrix, matrix.scales), _per_block(matrix, _minima(matrix)), _nibbles(matrix))


def q8_0(matrix: Codes) -> Buffer:
    """uint8 [rows, columns / 32 * 34]. All zeros have to be 128."""
    return _blocks(_per_block(matrix, matrix.scales), (matrix.codes ^ np.uint8(0x80)).reshape(len(matrix.codes), -1, _BLOCK))


def fits_q4_1(matrix: Codes) -> bool:
    """Are all minima finite in 16 bits?"""
    return bool(np.isfinite(_minima(matrix)).all())


def mlx_affine(matrix: Codes, bits: int, group: int) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """MLX's weight [rows, columns * bits / 32], scales and biases [rows, columns / group], for 4 or 8 bits. `group` divides the matrix's.

    In float32, since only there code * scale + bias is exact: sums of 16-bit floats are rounded twice.
    """
    packed = matrix.codes[:, 0::2] | matrix.codes[:, 1::2] << np.uint8(4) if bits == 4 else matrix.codes
    scales = np.repeat(matrix.scales.astype(np.float32), matrix.group // group, axis=1)
    zeros = np.repeat(matrix.zeros.astype(np.float32), matrix.group // group, axis=1)
    return np.ascontiguousarray(packed).view(np.uint32), scales, -zeros * scales


def _minima(matrix: Codes) -> npt.NDArray[np.float16]:
    with np.errstate(over="ignore"):
        return (matrix.zeros.astype(np.float32) * -matrix.scales.astype(np.float32)).astype(np.float16)


def _per_block(matrix: Codes, values: npt.NDArray[np.float16]) -> Buffer:
    """uint8 [rows, blocks, 2]: the value of its group, for each block."""
    repeated: npt.NDArray[Any] = np.repeat(values, matrix.group // _BLOCK, axis=1)[..., None]
    return repeated.view(np.uint8)


def _nibbles(matrix: Codes) -> Buffer:
    """uint8 [rows, blocks, 16]: the first half of a block in the low bits, the second half in the high ones."""
    halves = matrix.codes.reshape(len(matrix.codes), -1, 2, _BLOCK // 2)
    return halves[:, :, 0] | halves[:, :, 1] << np.uint8(4)


def _blocks(*fields: Buffer) -> Buffer:
    return np.concatenate(fields, axis=2).reshape(len(fields[0]), -1)

"""AWQ's packing in its "gemm" version, as AutoAWQ writes it.

qweight int32 [columns, rows / 8], qzeros int32 [groups, rows / 8]: eight neighbouring rows in a word, in an order of its own.
scales float16 [groups, rows].
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qwen2_converters.repack import Codes

Words = npt.NDArray[np.int32]

_SHIFTS = np.array([4 * nibble for nibble in (0, 4, 1, 5, 2, 6, 3, 7)], np.uint32)
"""Where in a word each of its eight rows lies."""


def unpack(qweight: Words, qzeros: Words, scales: npt.NDArray[np.float16]) -> Codes:
    """The rows that these columns of the three tensors hold."""
    return Codes(_rows(qweight), np.ascontiguousarray(scales.T), _rows(qzeros))


def _rows(words: Words) -> npt.NDArray[np.uint8]:
    """uint8 [8 * words.shape[1], words.shape[0]]."""
    turned = np.ascontiguousarray(words.T).view(np.uint32)
    codes = np.empty((turned.shape[0], 8, turned.shape[1]), np.uint8)
    for row, shift in enumerate(_SHIFTS):
        codes[:, row] = turned >> shift & 0x0F
    return codes.reshape(-1, turned.shape[1])

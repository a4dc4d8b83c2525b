"""Checkpoints as GPTQ and AWQ write them, of random codes: packed bit by bit from the formats' description, and their weights."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tests.support import tiny_checkpoint
from tests.support.random_qwen2 import Weights

Array = npt.NDArray[Any]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight neighbouring rows lies in a word's first four bits, in its second four, and so on (AutoAWQ's order_map)."""


@dataclass(frozen=True)
class Matrix:
    """weight[row, column] = scale * (code - zero). codes: [rows, columns]; scales float16, zeros: [rows, groups]."""

    codes: Array
    scales: Array
    zeros: Array

    @property
    def weights(self) -> Array:
        """float32, exact."""
        scales, zeros = self._spread(self.scales), self._spread(self.zeros)
        return scales * (self.codes.astype(np.float32) - zeros)

    @property
    def with_minima(self) -> Array:
        """What becomes of them where scale * zero is kept in 16 bits."""
        minima = (self.scales.astype(np.float32) * -self.zeros).astype(np.float16)
        return self._spread(self.scales) * self.codes + self._spread(minima)

    def _spread(self, values: Array) -> Array:
        return np.repeat(values.astype(np.float32), self.codes.shape[1] // self.scales.shape[1], axis=1)


def random_matrix(rows: int, columns: int, *, bits: int = 4, group: int = 128, symmetric: bool = True, seed: int = 0, spread: float = 0.0) -> Matrix:
    """spread: of the weights; by default 1 / sqrt(columns), so that activations stay near 1."""
    random = np.random.RandomState(seed)
    half = 1 << (bits - 1)
    codes = random.randint(0, 2 * half, (rows, columns))
    step = (spread or columns**-0.5) * 2 / half
    scales = (step * random.uniform(0.5, 1.5, (rows, columns // group))).astype(np.float16)
    zeros = np.full(scales.shape, half) if symmetric else random.randint(0, 2 * half, scales.shape)
    return Matrix(codes, scales, zeros)


def gptq(matrix: Matrix, bits: int) -> dict[str, Array]:
    """qweight, qzeros, scales and g_idx of a matrix."""
    rows, columns = matrix.codes.shape
    groups, per_word = matrix.scales.shape[1], 32 // bits
    qweight = np.zeros((columns // per_word, rows), np.uint32)
    for column in range(columns):
        qweight[column // per_word] |= matrix.codes[:, column].astype(np.uint32) << np.uint32(bits * (column % per_word))
    qzeros = np.zeros((groups, rows // per_word), np.uint32)
    for row in range(rows):
        qzeros[:, row // per_word] |= (matrix.zeros[row] - 1).astype(np.uint32) << np.uint32(bits * (row % per_word))
    g_idx = np.array([column // (columns // groups) for column in range(columns)], np.int32)
    return {"qweight": qweight.view(np.int32), "qzeros": qzeros.view(np.int32), "scales": matrix.scales.T.copy(), "g_idx": g_idx}


def awq(matrix: Matrix) -> dict[str, Array]:
    """qweight, qzeros and scales of a matrix."""

    def pack(values: Array) -> Array:
        words = np.zeros((values.shape[1], values.shape[0] // 8), np.uint32)
        for word in range(words.shape[1]):
            for nibble, row in enumerate(AWQ_ORDER):
                words[:, word] |= values[word * 8 + row].astype(np.uint32) << np.uint32(4 * nibble)
        return words.view(np.int32)

    return {"qweight": pack(matrix.codes), "qzeros": pack(matrix.zeros), "scales": matrix.scales.T.copy()}


def settings(method: Literal["gptq", "awq"], bits: int = 4, group: int = 128) -> dict[str, Any]:
    """The quantization_config of Qwen2's own checkpoints."""
    own = {"gptq": {"desc_act": False, "sym": True, "true_sequential": True, "dataset": None}, "awq": {"version": "gemm", "zero_point": True}}
    return {"quant_method": method, "bits": bits, "group_size": group, "modules_in_block_to_quantize": None, **own[method]}


def quantized(config: dict[str, Any], quantization: dict[str, Any], *, minima: bool = False) -> tuple[Weights, Weights]:
    """Tensors of a random checkpoint whose projections are packed, and the weights that they stand for in float32, or those `with_minima`."""
    tensors = tiny_checkpoint.weights(config, "F16")
    weights = dict(tensors)
    bits, group, method = (quantization[key] for key in ("bits", "group_size", "quant_method"))
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        rows, columns = tensors.pop(name).shape
        matrix = random_matrix(rows, columns, bits=bits, group=group, symmetric=method == "gptq", seed=zlib.crc32(name.encode()) & 0xFFFF)
        weights[name] = matrix.with_minima if minima else matrix.weights
        parts = gptq(matrix, bits) if method == "gptq" else awq(matrix)
        tensors |= {f"{name.removesuffix('.weight')}.{end}": part for end, part in parts.items()}
    return tensors, weights


def checkpoint(folder: Path, config: dict[str, Any], quantization: dict[str, Any], *, shards: int = 1, minima: bool = False) -> tuple[Path, Path]:
    """A folder with a packed checkpoint in it, and one with the same weights in float32."""
    tensors, weights = quantized(config, quantization, minima=minima)
    source = tiny_checkpoint.write(folder / "packed", config | {"quantization_config": quantization}, tensors, dtype="F16", shards=shards)
    return source, tiny_checkpoint.write(folder / "plain", config | {"torch_dtype": "float32"}, weights, dtype="F32")

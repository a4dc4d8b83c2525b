"""The weights of a model's tensors as float32, some rows at a time: of a GGUF file, an MLX folder, a checkpoint, packed or not.

GGUF types are read by llama.cpp's own functions, all others by NumPy. Reads of different rows may run side by side.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from qwen2_converters import ggml
from qwen2_converters.floats import widen
from qwen2_converters.packed import PackedMatrix
from qwen2_local.errors import BadFile, UnsupportedModel
from qwen2_local.formats.check_gguf import GgufModel
from qwen2_local.formats.checkpoint import Checkpoint, Located
from qwen2_local.formats.config import MlxQuantization
from qwen2_local.formats.gguf import GgufTensor, read_gguf

Bytes: TypeAlias = "npt.NDArray[np.uint8]"
Floats: TypeAlias = "npt.NDArray[np.float32]"

_ROW = 32
"""Weights of a block of a type that has none."""


@dataclass(frozen=True, slots=True)
class Weights:
    """A matrix or vector. type: "Q4_K", "4-bit" … shape: the row's length last. block: neighbours of a row that share a scale.

    read: some whole rows, from the first on so many, those of stacked experts counted through: float32 [rows, columns]. From any thread.
    Raises BadFile for a file that ends too early.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    block: int
    read: Callable[[int, int], Floats]

    @property
    def columns(self) -> int:
        """Weights of a row."""
        return self.shape[-1]


def gguf_weights(model: GgufModel) -> dict[str, Weights]:
    """Every tensor of a GGUF model, by its name there."""
    parts = [(path, model.header if path == model.header.path else read_gguf(path)) for path in model.paths]
    return {name: _gguf(path, name, tensor) for path, header in parts for name, tensor in header.tensors.items()}


def checkpoint_weights(checkpoint: Checkpoint) -> dict[str, Weights]:
    """Every matrix and vector of a Hugging Face or MLX folder, by the name that it has where nothing is quantized."""
    config, tensors = checkpoint.config, checkpoint.tensors
    found: dict[str, Weights] = {}
    for name, located in tensors.items():
        module, _, ending = name.rpartition(".")
        if ending in ("scales", "biases", "qzeros", "g_idx"):
            continue
        if ending == "qweight":
            found[f"{module}.weight"] = _packed(f"{module}.weight", PackedMatrix.of(checkpoint, name))
            continue
        if located.entry.dtype != "U32":
            found[name] = _plain(name, located)
            continue
        quantization = config.quantized.get(module, config.quantization)
        assert quantization is not None  # open_checkpoint has seen to it
        found[name] = _mlx(name, quantization, located, tensors[f"{module}.scales"], tensors.get(f"{module}.biases"))
    return found


def unpack(codes: Bytes, bits: int) -> Bytes:
    """Codes of `bits` bits, the first in the lowest bits of the first byte: one a byte. codes: a multiple of `bits` bytes, [..., bytes]."""
    if bits == 8:
        return codes
    eights = codes.reshape(-1, bits)
    words = np.zeros(len(eights), np.uint64)
    for byte in range(bits):
        words |= eights[:, byte].astype(np.uint64) << np.uint64(8 * byte)
    unpacked = np.empty((len(eights), 8), np.uint8)
    for index in range(8):
        unpacked[:, index] = (words >> np.uint64(bits * index)) & np.uint64((1 << bits) - 1)
    return unpacked.reshape(*codes.shape[:-1], -1)


def affine(codes: Bytes, scales: Floats, biases: Floats, bits: int) -> Floats:
    """MLX's affine mode: code * scale + bias. codes: [rows, bytes]. scales, biases: [rows, groups]. Gives [rows, columns]."""
    rows, groups = scales.shape
    weights = unpack(codes, bits).reshape(rows, groups, -1).astype(np.float32)
    weights *= scales[..., None]
    weights += biases[..., None]
    return weights.reshape(rows, -1)


def microscaled(codes: Bytes, scales: Bytes, mode: str) -> Floats:
    """MLX's modes mxfp4, mxfp8 and nvfp4: tiny floats, each group with a scale of 8 bits. codes: [rows, bytes]. scales: [rows, groups]."""
    rows, groups = scales.shape
    values = _E4M3[codes] if mode == "mxfp8" else _E2M1[unpack(codes, 4)]
    with np.errstate(over="ignore"):
        steps = _E4M3[scales] if mode == "nvfp4" else np.exp2(scales.astype(np.float32) - 127)
    return (values.reshape(rows, groups, -1) * steps[..., None]).reshape(rows, -1).astype(np.float32)


def _minifloats(exponent: int, mantissa: int) -> Floats:
    """The values of all codes of a float with so many bits, and a sign before them."""
    bias = (1 << (exponent - 1)) - 1
    values = []
    for code in range(1 << (1 + exponent + mantissa)):
        power, rest = code >> mantissa & ((1 << exponent) - 1), code & ((1 << mantissa) - 1)
        size = (rest / (1 << mantissa) + (power > 0)) * 2.0 ** (max(power, 1) - bias)
        values.append(-size if code >> (exponent + mantissa) else size)
    return np.array(values, np.float32)


_E2M1 = _minifloats(2, 1)
_E4M3 = _minifloats(4, 3)
_E4M3[[0x7F, 0xFF]] = np.nan


def _gguf(path: Path, name: str, tensor: GgufTensor) -> Weights:
    kind, columns = tensor.type, tensor.shape[0]
    row_bytes = kind.row_bytes(columns)

    def read(first: int, rows: int) -> Floats:
        return ggml.dequantize(_bytes(path, tensor.offset + first * row_bytes, rows * row_bytes), kind).reshape(rows, columns)

    return Weights(name, kind.name, tensor.shape[::-1], kind.block if kind.block > 1 else _ROW, read)


def _plain(name: str, located: Located) -> Weights:
    return Weights(name, located.entry.dtype, located.entry.shape or (1,), _ROW, lambda first, rows: _floats(located, first, rows))


def _mlx(name: str, quantization: MlxQuantization, weight: Located, scales: Located, biases: Located | None) -> Weights:
    bits, group, mode = quantization.bits, quantization.group, quantization.mode
    shape = (*scales.entry.shape[:-1], scales.entry.shape[-1] * group)

    def read(first: int, rows: int) -> Floats:
        codes = _rows(weight, first, rows)
        if biases is None:
            return microscaled(codes, _rows(scales, first, rows), mode)
        return affine(codes, _floats(scales, first, rows), _floats(biases, first, rows), bits)

    if biases is None and mode == "affine":
        raise UnsupportedModel(f"{weight.file}: {name} has no biases.", hint="Convert the original checkpoint again.")
    return Weights(name, f"{bits}-bit" if mode == "affine" else mode, shape, group, read)


def _packed(name: str, matrix: PackedMatrix) -> Weights:
    quantization = matrix.quantization
    shape = math.prod(matrix.parts["scales"].entry.shape[1:]), matrix.columns
    return Weights(name, f"{quantization.method.upper()} {quantization.bits}-bit", shape, quantization.group, matrix.weights)


def _floats(located: Located, first: int, rows: int) -> Floats:
    dtype = located.entry.dtype
    raw = _rows(located, first, rows)
    return widen(raw.view(np.uint32 if dtype == "F32" else np.uint16), dtype)


def _rows(located: Located, first: int, rows: int) -> Bytes:
    """uint8 [rows, bytes of a row]."""
    entry = located.entry
    row_bytes = (entry.end - entry.begin) // math.prod(entry.shape[:-1])
    return _bytes(located.file, entry.begin + first * row_bytes, rows * row_bytes).reshape(rows, row_bytes)


def _bytes(path: Path, begin: int, count: int) -> Bytes:
    raw = np.empty(count, np.uint8)
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        done = 0
        while done < count:
            got = os.preadv(handle, [raw.data[done:]], begin + done)
            if got == 0:
                raise BadFile(f"{path} became shorter while it was read: it ends at byte {begin + done}.", hint="Get it again.")
            done += got
    finally:
        os.close(handle)
    return raw

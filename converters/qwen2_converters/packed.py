"""Matrices that GPTQ or AWQ has quantized: read a few rows at a time, checked, and put into an output's blocks as they are.

Both keep a matrix turned, so its rows are columns of their tensors, and some rows lie in short stretches all over these.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen2_converters import awq, gptq, repack
from qwen2_converters.planned import PlannedTensor
from qwen2_converters.repack import Buffer, Codes
from qwen2_local.errors import BadFile, UnsupportedModel
from qwen2_local.formats.checkpoint import Checkpoint, Located
from qwen2_local.formats.config import PackedQuantization
from qwen2_local.formats.safetensors import read_tensor

ROWS = 8
"""Rows are fetched in multiples of this many: so many share a word of AWQ."""

_WEIGHTS = 1 << 22
"""Weights to fetch at once: enough that the stretches are not too short, 16 MB in all forms."""

_SHORT, _SPAN = 1 << 14, 1 << 18
_READ = 1 << 20
_HINT = "Fetch the model again from its original source."


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """One matrix. name: its module. columns: weights of a row. parts: its tensors, by the ends of their names ("qweight")."""

    name: str
    quantization: PackedQuantization
    columns: int
    parts: Mapping[str, Located]

    @classmethod
    def of(cls, checkpoint: Checkpoint, qweight: str) -> PackedMatrix:
        """The one whose codes are in the tensor `qweight` of `checkpoint`."""
        quantization = checkpoint.config.packed
        assert quantization is not None
        name = qweight.removesuffix(".qweight")
        ends = [end for end in ("qweight", "qzeros", "scales", "g_idx") if f"{name}.{end}" in checkpoint.tensors]
        if not name.endswith((".q_proj", ".k_proj", ".v_proj")) and f"{name}.bias" in checkpoint.tensors:
            ends.append("bias")  # none that the model has
        parts = {end: checkpoint.tensors[f"{name}.{end}"] for end in ends}
        height = parts["qweight"].entry.shape[0]
        return cls(name, quantization, height if quantization.method == "awq" else height * 32 // quantization.bits, parts)

    @property
    def rows_at_once(self) -> int:
        """How many rows to fetch at once."""
        return max(ROWS, _WEIGHTS // self.columns // ROWS * ROWS)

    def fetch(self, first: int, rows: int) -> Buffer:
        """The bytes of `rows` rows from `first`, a multiple of `ROWS`, on. With the first ones all that does not go into them is checked.

        From any thread. Raises BadFile, and UnsupportedModel for codes that mean something else than their config said.
        """
        if first == 0:
            self._check()
        return np.concatenate([_stretches(self.parts[end], first // share, rows // share) for end, share in self._in_rows()])

    def encode(self, tensor: PlannedTensor, rows: int, raw: Buffer) -> list[Buffer]:
        """What `fetch` gave, for each part of `tensor`. Raises BadFile for scales that are no finite numbers, or do not fit the target."""
        codes = self._unpack(rows, raw)
        if not np.isfinite(codes.scales).all():
            raise BadFile(f"{self.parts['scales'].file}: {self.name} has scales that are no finite numbers.", hint=_HINT)
        match [part.type for part in tensor.parts]:
            case ["Q4_0"]:
                return [repack.q4_0(codes).reshape(-1)]
            case ["Q8_0"]:
                return [repack.q8_0(codes).reshape(-1)]
            case ["Q4_1"]:
                if not repack.fits_q4_1(codes):
                    fault = f"{self.parts['scales'].file}: {self.name} has scales that are too large for Q4_1."
                    raise BadFile(fault, hint="Convert it for MLX: mlx:4bit.")
                return [repack.q4_1(codes).reshape(-1)]
            case _:
                group = self.columns // tensor.parts[1].shape[-1]
                return [array.reshape(-1).view(np.uint8) for array in repack.mlx_affine(codes, self.quantization.bits, group)]

    def weights(self, first: int, rows: int) -> npt.NDArray[np.float32]:
        """What `rows` rows from `first` on, both multiples of `ROWS`, mean: [rows, columns]. Raises as `fetch` does."""
        codes = self._unpack(rows, self.fetch(first, rows))
        steps = codes.codes.reshape(*codes.scales.shape, -1).astype(np.float32) - codes.zeros[..., None]
        return (steps * codes.scales[..., None].astype(np.float32)).reshape(rows, -1)

    def _in_rows(self) -> list[tuple[str, int]]:
        """The tensors that go into the rows, and how many rows share one of their columns."""
        if self.quantization.method == "gptq":
            return [("qweight", 1), ("scales", 1)]
        return [("qweight", 8), ("qzeros", 8), ("scales", 1)]

    def _unpack(self, rows: int, raw: Buffer) -> Codes:
        arrays: dict[str, npt.NDArray[Any]] = {}
        begin = 0
        for end, share in self._in_rows():
            kind = np.float16 if end == "scales" else np.int32
            shape = self.parts[end].entry.shape[0], rows // share
            size = shape[0] * shape[1] * np.dtype(kind).itemsize
            arrays[end] = raw[begin : begin + size].view(kind).reshape(shape)
            begin += size
        if self.quantization.method == "gptq":
            return gptq.unpack(arrays["qweight"], arrays["scales"], self.quantization.bits)
        return awq.unpack(**arrays)

    def _check(self) -> None:
        """Checks the tensors that do not go into the rows, and reads the others once in the order of the file: stretches are slow from a disk."""
        whole = {end: read_tensor(located.file, located.entry) for end, located in self.parts.items() if end in ("g_idx", "bias")}
        if "g_idx" in whole and not gptq.is_ordered(whole["g_idx"], self.quantization.group):
            fault = f"{self.parts['g_idx'].file}: {self.name} was quantized with its columns reordered (desc_act, act-order)."
            raise UnsupportedModel(fault, hint="No other format can say that: take one made without, or a GGUF or MLX model.")
        if "bias" in whole and whole["bias"].view(np.uint8).any():
            fault = f"{self.parts['bias'].file}: {self.name} has a bias that is not 0, which no Qwen2 has."
            raise UnsupportedModel(fault, hint="Look for the plain Qwen2 checkpoint.")
        if self.quantization.method == "gptq":
            qzeros = self.parts["qzeros"]
            if not gptq.is_symmetric(read_tensor(qzeros.file, qzeros.entry), self.quantization.bits):
                fault = f"{qzeros.file}: {self.name} was quantized by GPTQ with a zero point, though config.json says otherwise."
                raise UnsupportedModel(fault, hint="Take a symmetric one, or a GGUF or MLX model.")
        qweight = self.parts["qweight"]
        scratch = np.empty(_READ, np.uint8)
        with qweight.file.open("rb", buffering=0) as file:
            file.seek(qweight.entry.begin)
            for _ in range(qweight.entry.begin, qweight.entry.end, _READ):
                file.readinto(scratch.data)


def _stretches(located: Located, first: int, count: int) -> Buffer:
    """The bytes of `count` columns of a tensor from `first` on, in the order of its rows."""
    height, width = located.entry.shape
    size = (located.entry.end - located.entry.begin) // (height * width)
    raw = np.empty((height, count * size), np.uint8)
    # Copying what lies between short rows is cheaper than a call for each.
    together = max(1, _SPAN // (width * size)) if width * size <= _SHORT else 1
    scratch = np.empty((together, width * size), np.uint8)
    flat = scratch.reshape(-1)
    handle = os.open(located.file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for row in range(0, height, together):
            rows = min(together, height - row)
            begin = located.entry.begin + (row * width + first) * size
            span = ((rows - 1) * width + count) * size
            if os.preadv(handle, [flat[:span].data], begin) != span:
                fault = f"{located.file} became shorter while it was converted: it ends before byte {begin + span}."
                raise BadFile(fault, hint="Fetch it again, and let nothing change it meanwhile.")
            raw[row : row + rows] = scratch[:rows, : count * size]
    finally:
        os.close(handle)
    return raw.reshape(-1)

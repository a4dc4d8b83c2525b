"""What a matrix or vector becomes in an MLX folder: one tensor, or weight, scales and biases."""

from __future__ import annotations

import math

from qwen2_converters.planned import Part, PlannedTensor, Rows
from qwen2_converters.target import Target
from qwen2_local.formats.config import Qwen2Config

_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "U32": 4}
_FLOATS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def planned_mlx(name: str, shape: tuple[int, ...], rows: tuple[Rows, ...], target: Target, config: Qwen2Config) -> PlannedTensor:
    """The tensor `name` in an MLX folder."""
    dtype = _FLOATS.get(config.dtype, "BF16") if target.bits else target.weights.upper()
    module, _, ending = name.rpartition(".")
    # A wrong router costs more than the few bytes: the two gates stay as they are.
    gate = module.endswith((".mlp.gate", ".shared_expert_gate"))
    if target.bits is None or ending == "bias" or len(shape) < 2 or gate or shape[-1] % target.group:
        return PlannedTensor(shape, rows, (_part(name, dtype, shape),))
    *outer, columns = shape
    weight = _part(f"{module}.weight", "U32", (*outer, columns * target.bits // 32))
    scales = _part(f"{module}.scales", dtype, (*outer, columns // target.group))
    return PlannedTensor(shape, rows, (weight, scales, _part(f"{module}.biases", dtype, scales.shape)))


def _part(name: str, dtype: str, shape: tuple[int, ...]) -> Part:
    return Part(name, dtype, shape, math.prod(shape) * _BYTES[dtype])

"""What a matrix or vector becomes in an MLX folder: one tensor, or weight, scales and biases."""

from __future__ import annotations

import math
import re
from typing import Any

from qwen2_converters.planned import Part, Plan, PlannedTensor, Rows
from qwen2_converters.target import Target
from qwen2_local.formats.config import Qwen2Config

_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "U32": 4}
_FLOATS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_MORE = re.compile(r"model\.layers\.(\d+)\..*(?:v_proj|down_proj)")


def planned_mlx(name: str, shape: tuple[int, ...], rows: tuple[Rows, ...], target: Target, config: Qwen2Config) -> PlannedTensor:
    """The tensor `name` in an MLX folder."""
    dtype = _FLOATS.get(config.dtype, "BF16") if target.bits else target.weights.upper()
    module, _, ending = name.rpartition(".")
    # A wrong router costs more than the few bytes: the two gates stay as they are.
    gate = module.endswith((".mlp.gate", ".shared_expert_gate"))
    bits = _bits(module, target, config)
    if bits is None or ending == "bias" or len(shape) < 2 or gate or shape[-1] % target.group:
        return PlannedTensor(shape, rows, (_part(name, dtype, shape),))
    *outer, columns = shape
    weight = _part(f"{module}.weight", "U32", (*outer, columns * bits // 32))
    scales = _part(f"{module}.scales", dtype, (*outer, columns // target.group))
    return PlannedTensor(shape, rows, (weight, scales, _part(f"{module}.biases", dtype, scales.shape)))


def quantization(plan: Plan) -> dict[str, Any]:
    """The `quantization` of config.json: the default, and those modules that have other bits. What has no scales is not quantized."""
    group = plan.target.group
    block: dict[str, Any] = {"group_size": group, "bits": plan.target.bits, "mode": "affine"}
    for tensor in plan.tensors:
        bits = 32 * tensor.parts[0].shape[-1] // tensor.shape[-1]
        if len(tensor.parts) > 1 and bits != plan.target.bits:
            block[tensor.parts[0].name.removesuffix(".weight")] = {"group_size": group, "bits": bits, "mode": "affine"}
    return block


def _bits(module: str, target: Target, config: Qwen2Config) -> int | None:
    """Those of a module's weights, were they quantized. A mixed recipe gives more to where mlx_lm does, and to a tied head."""
    if target.more_bits is None:
        return target.bits
    head = "model.embed_tokens" if config.tied else "lm_head"
    match = _MORE.fullmatch(module)
    return target.more_bits if module == head or (match and _sensitive(int(match[1]), config.layers)) else target.bits


def _sensitive(layer: int, layers: int) -> bool:
    """Is it among the first or last eighth, or every third between? llama.cpp's choice for Q4_K_M, which mlx_lm took over."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _part(name: str, dtype: str, shape: tuple[int, ...]) -> Part:
    return Part(name, dtype, shape, math.prod(shape) * _BYTES[dtype])

"""What the tensors of a GPTQ or AWQ checkpoint become: the packed matrices their target's blocks, code for code; all others stay as they are."""

from __future__ import annotations

import math
from dataclasses import replace

from qwen2_converters.plan_gguf import gguf_name, planned_gguf
from qwen2_converters.plan_mlx import planned_mlx
from qwen2_converters.planned import Part, PlannedTensor, Rows
from qwen2_converters.target import Target
from qwen2_local.errors import UnsupportedModel
from qwen2_local.formats.checkpoint import Checkpoint
from qwen2_local.formats.config import PackedQuantization, Qwen2Config
from qwen2_local.formats.ggml_types import BY_NAME

GGUF = {("gptq", 4): "q4_0", ("gptq", 8): "q8_0", ("awq", 4): "q4_1"}
"""What says the same in a GGUF file, by method and bits."""

_MLX_GROUPS = (64, 128, 32)
"""MLX's group sizes, the usual one first."""


def check_packed_target(checkpoint: Checkpoint, packed: PackedQuantization, target: Target) -> None:
    """Raises UnsupportedModel unless `target` can say what the checkpoint says."""
    gguf = GGUF[packed.method, packed.bits]
    if target.format == "gguf" and target.weights == gguf:
        return
    if target.format == "mlx" and target.weights.startswith(f"{packed.bits}bit") and packed.group % target.group == 0:
        return
    groups = [f"mlx:{packed.bits}bit{'' if group == 64 else f'-g{group}'}" for group in _MLX_GROUPS if packed.group % group == 0]
    fault = f"{checkpoint.folder} is quantized already ({packed}), and {target} would quantize it a second time."
    raise UnsupportedModel(fault, hint=f"Convert it to {', '.join((f'gguf:{gguf}', *groups))}, or take the plain checkpoint of the same model.")


def planned_packed(
    checkpoint: Checkpoint, packed: PackedQuantization, name: str, shape: tuple[int, ...], rows: tuple[Rows, ...], target: Target, config: Qwen2Config
) -> PlannedTensor:
    """The tensor that Hugging Face, or MLX for stacked experts, calls `name`. Raises UnsupportedModel where only some of the experts are packed."""
    codes = tuple(replace(row, source=f"{str(row.source).removesuffix('.weight')}.qweight") for row in rows)
    there = sum(row.source in checkpoint.tensors for row in codes)
    if there == 0:
        # F16, nearly always. Quantizing the embedding would be this program's doing, not that of the model's makers.
        dtype = checkpoint.tensors[str(rows[0].source)].entry.dtype
        planned = planned_gguf if target.format == "gguf" else planned_mlx
        return planned(name, shape, rows, replace(target, weights=dtype.lower()), config)
    if there < len(codes):
        raise UnsupportedModel(f"{checkpoint.folder} has only some of the experts of {name} quantized.", hint="Take the plain checkpoint.")
    return PlannedTensor(shape, codes, _gguf_parts(name, shape, target) if target.format == "gguf" else _mlx_parts(name, shape, packed, target))


def _gguf_parts(name: str, shape: tuple[int, ...], target: Target) -> tuple[Part, ...]:
    kind = BY_NAME[target.weights.upper()]
    return (Part(gguf_name(name), kind.name, shape, kind.row_bytes(shape[-1]) * math.prod(shape[:-1])),)


def _mlx_parts(name: str, shape: tuple[int, ...], packed: PackedQuantization, target: Target) -> tuple[Part, ...]:
    """Scales and biases are float32: see `repack.mlx_affine`."""
    *outer, columns = shape
    count = math.prod(outer)
    module = name.removesuffix(".weight")
    words, groups = columns * packed.bits // 32, columns // target.group
    weight = Part(f"{module}.weight", "U32", (*outer, words), 4 * count * words)
    return (weight, *(Part(f"{module}.{end}", "F32", (*outer, groups), 4 * count * groups) for end in ("scales", "biases")))

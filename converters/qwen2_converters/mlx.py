"""Writes a folder for MLX: safetensors shards with their index, config.json, and the small files beside them.

Byte for byte what mlx_lm.convert makes of a dense model on a processor, but for a tied head under a mixed recipe; of a mixture of experts,
the gates stay unquantized. MLX itself is not needed for it.
"""

from __future__ import annotations

import json
import struct
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from qwen2_converters import affine
from qwen2_converters.companions import copy_companions
from qwen2_converters.floats import finite, narrow, widen
from qwen2_converters.job import Block, Buffer, Job, WeightFile
from qwen2_converters.plan_mlx import quantization
from qwen2_converters.planned import Part, Plan, PlannedTensor
from qwen2_local.errors import BadFile
from qwen2_local.files import write_file
from qwen2_local.formats.checkpoint import Checkpoint, parameters

SHARD = 5 << 30
"""Bytes of tensors in a file at most, as in mlx_lm; a single larger tensor gets a file of its own."""

_BLOCK = 1 << 20
"""Weights of a block: 5 MB in all its forms, a few milliseconds of work."""

_INDEX = "model.safetensors.index.json"


def mlx_job(checkpoint: Checkpoint, plan: Plan) -> Job:
    """How to fill an MLX folder. Its encoder raises BadFile for weights that are no finite numbers."""
    files: list[WeightFile] = []
    shards = split(plan, SHARD)
    for number, tensors in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        parts = [part for tensor in tensors for part in tensor.parts]
        header = safetensors_header(parts)
        ends = list(accumulate((part.nbytes for part in parts), initial=len(header)))
        files.append(WeightFile(name, header, {part.name: offset for part, offset in zip(parts, ends, strict=False)}, ends[-1]))

    def finish(folder: Path) -> None:
        weight_map = {part: file.name for file in files for part in file.offsets}
        total = {"total_size": plan.nbytes, "total_parameters": parameters(checkpoint.config)}
        _write_json(folder / _INDEX, {"metadata": total, "weight_map": dict(sorted(weight_map.items()))})
        _write_json(folder / "config.json", mlx_config(checkpoint, plan))
        copy_companions(checkpoint.folder, folder)

    return Job(plan, tuple(files), _encode, _BLOCK, finish)


def split(plan: Plan, limit: int) -> list[list[PlannedTensor]]:
    """The tensors of each shard, in order; what belongs to one matrix stays together."""
    shards: list[list[PlannedTensor]] = []
    size = 0
    for tensor in plan.tensors:
        if not shards or size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def mlx_config(checkpoint: Checkpoint, plan: Plan) -> dict[str, Any]:
    """The config.json: the checkpoint's, with every default spelled out that mlx_lm fills in otherwise or looks for elsewhere."""
    config = checkpoint.config
    made = {key: value for key, value in checkpoint.raw.items() if key not in ("_name_or_path", "vision_config")}
    made |= {"tie_word_embeddings": config.tied, "num_key_value_heads": config.kv_heads, "rope_theta": config.rope_theta}
    made |= {"max_position_embeddings": made.get("max_position_embeddings", 32768)}
    if config.yarn and made.get("rope_scaling") is None:
        made["rope_scaling"] = {"type": "yarn", "factor": config.yarn.factor, "original_max_position_embeddings": config.yarn.original}
    if plan.target.bits is None:
        dtype = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}[plan.target.weights]
        made |= {key: dtype for key in ("dtype", "torch_dtype") if key in made} or {"torch_dtype": dtype}
    else:
        # Twice: Hugging Face's model pages read the second.
        made |= dict.fromkeys(("quantization", "quantization_config"), quantization(plan))
    return dict(sorted(made.items()))


def safetensors_header(parts: list[Part]) -> bytes:
    """The start of a safetensors file that holds `parts` in this order, without gaps."""
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    end = 0
    for part in parts:
        header[part.name] = {"dtype": part.type, "shape": part.shape, "data_offsets": [end, end + part.nbytes]}
        end += part.nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


def _encode(block: Block, raw: Buffer) -> list[Buffer]:
    parts = block.tensor.parts
    dtype = parts[-1].type
    bits = raw.view(np.uint32 if block.dtype == "F32" else np.uint16)
    if dtype != block.dtype:
        bits = narrow(widen(bits, block.dtype), dtype)
    made = [bits]
    if len(parts) > 1:
        columns = block.tensor.shape[-1]
        codes, *lines = affine.quantize(bits, dtype, 32 * parts[0].shape[-1] // columns, columns // parts[1].shape[-1])
        made = [narrow(line, dtype) for line in lines]
    # What is no number in a group, or too large, shows in its scale.
    if not finite(made[0], dtype):
        fault = f"{block.file}: {parts[0].name} holds weights that are no finite numbers, or too large for {dtype}."
        raise BadFile(fault, hint="Fetch the model again from its source, or convert to mlx:f32.")
    return [*([codes] if len(parts) > 1 else []), *(array.view(np.uint8) for array in made)]


def _write_json(path: Path, value: object) -> None:
    write_file(path, json.dumps(value, indent=4) + "\n")

"""Writes a folder for MLX: safetensors shards with their index, config.json, and the small files beside them.

Byte for byte what mlx_lm.convert makes of a dense model; of a mixture of experts, the gates stay unquantized. Weights go tensor by
tensor through MLX, on whatever device it uses, so a model need not fit into memory.
"""

from __future__ import annotations

import importlib
import json
import os
import struct
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from qwen2_converters.blocks import Advance, Block, Buffer, Place, convert_blocks
from qwen2_converters.companions import copy_companions
from qwen2_converters.keys import read_vocabulary
from qwen2_converters.planned import Part, Plan, PlannedTensor
from qwen2_local.errors import BackendUnavailable, BadFile
from qwen2_local.formats.checkpoint import Checkpoint, parameters

SHARD = 5 << 30
"""Bytes of tensors in a file at most, as in mlx_lm; a single larger tensor gets a file of its own."""

_BLOCK = 1 << 24
_INDEX = "model.safetensors.index.json"


def write_mlx(checkpoint: Checkpoint, plan: Plan, folder: Path, advance: Advance, *, shard: int = SHARD) -> None:
    """Fills the empty `folder`. shard: bytes of tensors in a file at most.

    Raises BadFile for weights that are no finite numbers or a tokenizer that does not belong, BackendUnavailable without MLX, OSError.
    """
    mx = _library()
    read_vocabulary(checkpoint)
    with ExitStack() as stack:
        places: dict[str, Place] = {}
        weight_map: dict[str, str] = {}
        shards = split(plan, shard)
        for number, tensors in enumerate(shards, 1):
            file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            parts = [part for tensor in tensors for part in tensor.parts]
            handle = os.open(folder / file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            stack.callback(os.close, handle)
            offset = _write_header(handle, parts)
            for part in parts:
                places[part.name] = Place(handle, offset)
                weight_map[part.name] = file
                offset += part.nbytes
        # MLX has threads of its own, and its streams belong to the thread that made them.
        convert_blocks(checkpoint, plan, places, lambda block, raw: _encode(mx, block, raw), advance, weights=_BLOCK, threads=1)
    index = {
        "metadata": {"total_size": plan.nbytes, "total_parameters": parameters(checkpoint.config)},
        "weight_map": dict(sorted(weight_map.items())),
    }
    _write_json(folder / _INDEX, index)
    _write_json(folder / "config.json", mlx_config(checkpoint, plan))
    copy_companions(checkpoint.folder, folder)


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
    bits = plan.target.bits
    if bits is None:
        dtype = {"f32": "float32", "bf16": "bfloat16"}[plan.target.weights]
        made |= {key: dtype for key in ("dtype", "torch_dtype") if key in made} or {"torch_dtype": dtype}
    else:
        # Twice: Hugging Face's model pages read the second.
        quantization = {"group_size": plan.target.group, "bits": bits, "mode": "affine"}
        made |= {"quantization": quantization, "quantization_config": quantization}
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


def _write_header(handle: int, parts: list[Part]) -> int:
    header = safetensors_header(parts)
    with os.fdopen(handle, "wb", closefd=False) as file:
        file.write(header)
    os.ftruncate(handle, len(header) + sum(part.nbytes for part in parts))
    return len(header)


def _library() -> Any:
    try:
        return importlib.import_module("mlx.core")
    except ImportError as error:
        raise BackendUnavailable(f"MLX is not installed ({error}).", hint="Run `pip install 'qwen2-local[mlx]'`.") from error


def _encode(mx: Any, block: Block, raw: Buffer) -> list[Buffer]:
    parts = block.tensor.parts
    dtypes = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
    bits = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}[block.dtype]
    weights = mx.array(raw.view(bits)).reshape(block.rows, -1)
    if block.dtype == "BF16":
        weights = weights.view(mx.bfloat16)
    weights = weights.astype(dtypes[parts[-1].type])
    if not mx.isfinite(weights).all().item():
        fault = f"{block.file}: {parts[0].name} holds weights that are no finite numbers, or too large for {parts[-1].type}."
        raise BadFile(fault, hint="Fetch the model again from its source, or convert to mlx:f32.")
    if len(parts) == 1:
        return [_bytes(mx, weights)]
    columns = block.tensor.shape[-1]
    return [_bytes(mx, array) for array in mx.quantize(weights, columns // parts[1].shape[-1], 32 * parts[0].shape[-1] // columns)]


def _bytes(mx: Any, array: Any) -> Buffer:
    raw: Buffer = np.array(array.flatten().view(mx.uint8))
    return raw


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=4) + "\n", encoding="utf-8")

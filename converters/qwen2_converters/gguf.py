"""Writes a GGUF file, version 3: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

The header is complete before the first weight is read; then the tensors go to their places, in any order, on all cores.
"""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from qwen2_converters import ggml, lanes
from qwen2_converters.imatrix import Importance
from qwen2_converters.job import Block, Buffer, Job, WeightFile
from qwen2_converters.keys import Keys, Value, gguf_keys
from qwen2_converters.planned import Part, Plan
from qwen2_local.errors import BadFile
from qwen2_local.formats.checkpoint import Checkpoint
from qwen2_local.formats.ggml_types import BY_NAME
from qwen2_local.formats.gguf import MAX_HEADER

_ALIGNMENT = 32
_BLOCK = 1 << 20
"""Weights of a block: 10 MB in all its forms, a few milliseconds of work."""

_TOO_LARGE = {"F32": math.inf, "BF16": 3.3961775e38}
_TOO_LARGE_ELSE = 65520.0
"""What rounds to infinity: all other types keep their weights, or the scales of these, in F16."""

_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9


def gguf_job(checkpoint: Checkpoint, plan: Plan, *, name: str, file: str, importance: Importance | None = None, url: str = "") -> Job:
    """How to write the GGUF file called `file`. name, url: what to call the model in it, and where it is from.

    importance: to quantize with; the plan has to know of it.

    Its encoder raises BadFile for weights that are no numbers or do not fit the type. Raises what the modules below raise.
    """
    for kind in {part.type for tensor in plan.tensors for part in tensor.parts}:
        ggml.prepare(BY_NAME[kind])
    header, offsets, size = lay_out(gguf_keys(checkpoint, plan, name, importance, url), [tensor.parts[0] for tensor in plan.tensors])
    if len(header) > MAX_HEADER:
        raise BadFile(f"{checkpoint.folder}: its tokenizer is too large for a GGUF header.", hint="Fetch the model again.")
    gain = sum(math.prod(part.shape) for tensor in plan.tensors for part in tensor.parts if part.type in lanes.KINDS)
    kernels = {} if gain < lanes.WORTH_IT else lanes.kernels()
    encode = partial(_encode, importance=importance, kernels=kernels)
    return Job(plan, (WeightFile(file, header, offsets, size),), encode, _BLOCK, finish=lambda _: None)


def _encode(block: Block, raw: Buffer, importance: Importance | None, kernels: Mapping[str, lanes.Kernel]) -> list[Buffer]:
    part = block.tensor.parts[0]
    kind = BY_NAME[part.type]
    weights = ggml.to_float32(raw, block.dtype)
    # NaN spreads through both.
    peak = float(np.maximum(weights.max(), -weights.min()))
    if not math.isfinite(peak):
        raise BadFile(f"{block.file}: {part.name} holds weights that are no finite numbers.", hint="Fetch the model again from its source.")
    if peak >= _TOO_LARGE.get(kind.name, _TOO_LARGE_ELSE):
        raise BadFile(f"{block.file}: {part.name} holds a weight of {peak:g}, too large for {kind.name}.", hint="Convert to gguf:f32, or for MLX.")
    columns = part.shape[-1]
    # A block never holds rows of two experts.
    guide = importance.of(part.name, block.first // part.shape[-2], columns) if importance and kind.block > 1 else None
    try:
        return [ggml.quantize(weights, columns, kind, guide, kernel=kernels.get(kind.name))]
    except ValueError as error:
        fault = f"{importance.path if importance else block.file}: {part.name} cannot be kept as {kind.name}: {error}."
        raise BadFile(fault, hint="Leave the importance matrix out, or make it anew.") from error


def lay_out(keys: Keys, parts: Sequence[Part]) -> tuple[bytes, dict[str, int], int]:
    """The header of a file with these keys and tensors, each tensor's offset in it, and its size."""
    head = [b"GGUF", struct.pack("<IQQ", 3, len(parts), len(keys))]
    head += [_string(key) + _value(value) for key, value in keys.items()]
    relative: dict[str, int] = {}
    end = 0
    for part in parts:
        relative[part.name] = end
        shape = part.shape[::-1]
        head.append(_string(part.name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, BY_NAME[part.type].number, end))
        end += part.nbytes + -part.nbytes % _ALIGNMENT
    header = b"".join(head)
    header += bytes(-len(header) % _ALIGNMENT)
    return header, {name: len(header) + offset for name, offset in relative.items()}, len(header) + end


def _value(value: Value) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if isinstance(value, bool):
        return struct.pack("<IB", _BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", _UINT32, value)
    if isinstance(value, float):
        return struct.pack("<If", _FLOAT32, value)
    if isinstance(value, list):
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_string, value))
    if isinstance(value, array):
        return struct.pack(f"<IIQ{len(value)}i", _ARRAY, _INT32, len(value), *value)
    return struct.pack("<Ii", _INT32, int(value))


def _string(text: str) -> bytes:
    raw = text.encode("utf-8", "replace")  # half a surrogate pair: a folder's name in another encoding, or a stranger's JSON
    return struct.pack("<Q", len(raw)) + raw

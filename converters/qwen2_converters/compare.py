"""How far are the weights of a model from those that it was made of? Reads both once, in bounded memory."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import numpy as np

from qwen2_converters.dequantize import Floats, Weights, checkpoint_weights, gguf_weights
from qwen2_converters.packed import ROWS
from qwen2_converters.plan import make_plan
from qwen2_converters.plan_packed import GGUF
from qwen2_converters.planned import Part, PlannedTensor, Rows
from qwen2_converters.target import Target
from qwen2_local import cpu
from qwen2_local.formats.check_gguf import GgufModel
from qwen2_local.formats.checkpoint import Checkpoint
from qwen2_local.formats.config import PackedQuantization

_BLOCK = 1 << 20
"""Weights that a thread compares at once: 20 MB in all its forms."""

_THREADS = 8
_SHOWN = 5

# Relative RMSE that each type gives on normally distributed weights, which those of language models nearly are.
_USUAL = {
    "F32": 1e-6, "F16": 2.1e-4, "BF16": 1.7e-3, "Q8_0": 5.4e-3, "Q6_K": 0.018, "Q5_K": 0.036, "Q5_1": 0.038, "Q5_0": 0.043, "Q4_K": 0.072,
    "Q4_1": 0.078, "Q4_0": 0.086, "IQ4_NL": 0.076, "IQ4_XS": 0.077, "Q3_K": 0.151, "IQ3_S": 0.167, "MXFP4": 0.115, "NVFP4": 0.095,
    "8-bit": 0.01, "6-bit": 0.022, "5-bit": 0.044, "4-bit": 0.091, "3-bit": 0.191, "mxfp4": 0.116, "mxfp8": 0.027, "nvfp4": 0.094,
}  # fmt: skip
_FAR = 4.0
"""How many times the usual error is suspicious: outliers and importance matrices double it."""

_MOST = 0.8
"""An error that is always suspicious: weights of another place, or turned, are off by more than 1."""


@dataclass(frozen=True, slots=True)
class TensorError:
    """How far a tensor is from its source. rms: of the source's weights. rmse: of the differences. maximum: the largest of them.

    block: the number of the block of neighbouring weights with the largest RMSE, block_rmse, counted through the tensor.
    An error that is no number comes from weights that are none.
    """

    name: str
    type: str
    weights: int
    rms: float
    rmse: float
    maximum: float
    block: int
    block_rmse: float

    @property
    def relative(self) -> float:
        """The RMSE relative to the tensor's RMS. Infinite where there should be zeros only."""
        return self.rmse / self.rms if self.rms else math.inf if self.rmse else 0.0

    @property
    def suspicious(self) -> bool:
        """Is it far more than the type explains?"""
        return not self.relative <= min(_FAR * _USUAL.get(self.type, _MOST), _MOST)


def compare(model: GgufModel | Checkpoint, source: Checkpoint, advance: Callable[[int], None]) -> tuple[list[TensorError], list[str]]:
    """The error of each tensor, and what could not be compared. advance: gets the bytes of the model that are done.

    Raises BadFile for a file that ends early, UnsupportedModel for a source that could not become such a model.
    """
    there = gguf_weights(model) if isinstance(model, GgufModel) else checkpoint_weights(model)
    origin = checkpoint_weights(source)
    plan = {tensor.parts[0].name: tensor for tensor in _planned(model, source, origin)}
    faults = [f"The tensor {name!r} is not in the model." for name in plan if name not in there]
    faults += [f"The tensor {name!r} is not in the source." for name in sorted(there.keys() - plan.keys()) if not name.endswith("inv_freq")]
    shared = [(there[name], tensor) for name, tensor in plan.items() if name in there]
    other = [(weights, tensor) for weights, tensor in shared if math.prod(weights.shape) != math.prod(tensor.shape)]
    for weights, tensor in islice(other, 1):
        fault = f"The source is another model: {weights.name!r} has the shape {list(weights.shape)} here, {list(tensor.shape)} there"
        return [], [f"{fault} ({len(other)} such)."]
    size = sum(math.prod(weights.shape) for weights in there.values())
    errors: list[TensorError] = []
    done = 0
    with _Pool() as pool:
        for weights, tensor in shared:
            parts: list[_Part] = []
            for part in pool.map(lambda piece: _compare(*piece), _pieces(weights, tensor, origin)):
                parts.append(part)
                done += part.weights
                advance(model.weight_bytes * done // size)
            errors.append(_sum(weights, parts))
    return errors, faults[:_SHOWN] + ([f"{len(faults) - _SHOWN} more tensors are not in both."] if len(faults) > _SHOWN else [])


class _Pool(ThreadPoolExecutor):
    """Ends at once where its block raises, Ctrl-C included."""

    def __init__(self) -> None:
        super().__init__(min(cpu.cores(), _THREADS), "verify")

    def __exit__(self, *error: object) -> None:
        self.shutdown(cancel_futures=True)


def _planned(model: GgufModel | Checkpoint, source: Checkpoint, origin: Mapping[str, Weights]) -> Iterator[PlannedTensor]:
    """Where each tensor of the model, by its name there, comes from."""
    if isinstance(model, Checkpoint) and model.layout == "hf":
        for name, weights in origin.items():
            yield PlannedTensor(weights.shape, (Rows(name, 0, math.prod(weights.shape[:-1])),), (Part(name, "", weights.shape, 0),))
        return
    gguf = isinstance(model, GgufModel)
    intermediate = model.header.keys.get(f"{model.architecture}.feed_forward_length") if isinstance(model, GgufModel) else None
    padded = gguf and source.config.moe is None and intermediate != source.config.intermediate
    yield from make_plan(source, _any_target("gguf" if gguf else "mlx", source.config.packed), pad_ffn=padded).tensors
    # Some writers keep a tied head, too.
    head = "output.weight" if gguf else "lm_head.weight"
    tensors = model.tensors
    if source.config.tied and source.config.moe is None and head in tensors:
        shape = source.config.vocabulary, source.config.hidden
        yield PlannedTensor(shape, (Rows("model.embed_tokens.weight", 0, shape[0]),), (Part(head, "", shape, 0),))


def _any_target(form: Literal["gguf", "mlx"], packed: PackedQuantization | None) -> Target:
    """A target that such a source can have: only the names and rows of its plan are wanted."""
    if packed is None:
        return Target(form, "f32")
    return Target(form, GGUF[packed.method, packed.bits] if form == "gguf" else f"{packed.bits}bit-g32")


@dataclass(frozen=True, slots=True)
class _Part:
    """Sums over some rows. block: the worst one's number in the tensor; worst: the mean of its squared differences."""

    weights: int
    squares: float
    differences: float
    maximum: float
    block: int
    worst: float


def _pieces(weights: Weights, tensor: PlannedTensor, source: Mapping[str, Weights]) -> Iterator[tuple[Weights, int, int, Weights | None, int]]:
    """A block of rows each: the model's tensor, the first of its rows, how many, the source's tensor and its first row."""
    step = max(ROWS, _BLOCK // weights.columns // ROWS * ROWS)
    first = 0
    for rows in tensor.rows:
        origin = source[re.sub(r"\.qweight$", ".weight", rows.source)] if rows.source else None
        for start in range(0, rows.count, step):
            count = min(step, rows.count - start)
            yield weights, first, count, origin, rows.first + start
            first += count


def _compare(weights: Weights, first: int, count: int, source: Weights | None, source_first: int) -> _Part:
    got = weights.read(first, count)
    want: Floats = np.zeros_like(got)
    if source is not None:
        rows = source.read(source_first, count)
        want[:, : rows.shape[1]] = rows
    columns = weights.columns
    block = weights.block if columns % weights.block == 0 else columns
    with np.errstate(all="ignore"):
        squares = float(np.einsum("ij,ij->i", want, want).sum(dtype=np.float64))
        got -= want
        blocks = got.reshape(-1, block)
        differences = np.einsum("ij,ij->i", blocks, blocks)
        worst = int(differences.argmax())
        # Which is NaN if any difference is.
        maximum = float(max(got.max(), -got.min()))
        total = float(differences.sum(dtype=np.float64))
    return _Part(got.size, squares, total, maximum, first * columns // block + worst, float(differences[worst]) / block)


def _sum(weights: Weights, parts: Sequence[_Part]) -> TensorError:
    count = sum(part.weights for part in parts)
    worst = max(parts, key=lambda part: part.worst if part.worst == part.worst else math.inf)
    maximum = max((part.maximum for part in parts), key=lambda value: value if value == value else math.inf)
    rms, rmse = (math.sqrt(sum(values) / count) for values in ([part.squares for part in parts], [part.differences for part in parts]))
    return TensorError(weights.name, weights.type, count, rms, rmse, maximum, worst.block, math.sqrt(worst.worst))

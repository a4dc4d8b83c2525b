"""What a conversion will write, decided from the checkpoint's headers alone: every tensor, where its rows come from, what it becomes.

A plan is plain data. Both formats want the same matrices, the experts of a layer stacked into one; they differ in names and types.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from qwen2_converters.companions import companions
from qwen2_converters.mix import tensor_type
from qwen2_converters.target import Target
from qwen2_local.errors import UnsupportedModel
from qwen2_local.formats.checkpoint import Checkpoint, expected_tensors
from qwen2_local.formats.config import Qwen2Config

GROUP = 64
"""Weights that share a scale in MLX's quantization; mlx_lm's default."""

_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "U32": 4}
_FLOATS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_SLACK = 1 << 20  # headers and config.json

_GGUF = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.switch_mlp.gate_proj": "ffn_gate_exps",
    "mlp.switch_mlp.up_proj": "ffn_up_exps",
    "mlp.switch_mlp.down_proj": "ffn_down_exps",
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True, slots=True)
class Rows:
    """`count` rows of the checkpoint's tensor `source`, from row `first` on. A vector is one row."""

    source: str
    first: int
    count: int


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor of the output file. type: as the format calls it ("Q4_0"; "BF16", "U32"). shape: the row's length last."""

    name: str
    type: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One matrix or vector. rows: where it comes from, in order. parts: what is written, one; or weight, scales and biases for MLX."""

    shape: tuple[int, ...]
    rows: tuple[Rows, ...]
    parts: tuple[Part, ...]

    @property
    def row_count(self) -> int:
        """Rows in all, those of stacked experts together."""
        return math.prod(self.shape[:-1])

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts)


@dataclass(frozen=True, slots=True)
class Plan:
    """All that will be written. nbytes: of all tensors. disk: bytes to have free, headers and companion files included."""

    target: Target
    tensors: tuple[PlannedTensor, ...]
    nbytes: int
    disk: int


def make_plan(checkpoint: Checkpoint, target: Target) -> Plan:
    """The plan of converting `checkpoint`. Raises UnsupportedModel for a model that the target's backend computes otherwise."""
    config = checkpoint.config
    if checkpoint.layout == "mlx":
        raise UnsupportedModel(f"{checkpoint.folder} is an MLX folder already.", hint="Run it as it is, or convert the original checkpoint.")
    if target.format == "gguf" and config.moe and config.moe.normalize:
        raise UnsupportedModel(f"{checkpoint.folder} has norm_topk_prob, which llama.cpp does not compute for qwen2moe.", hint="Convert it for MLX.")
    planned = _planned_gguf if target.format == "gguf" else _planned_mlx
    tensors = tuple(planned(name, shape, _rows(checkpoint, name, shape), target, config) for name, shape in _wanted(config, target))
    nbytes = sum(tensor.nbytes for tensor in tensors)
    # Each tensor of a GGUF file is followed by up to 31 bytes of padding and described by about 100.
    files = sum(path.stat().st_size for path in companions(checkpoint.folder))
    return Plan(target, tensors, nbytes, nbytes + files + 256 * len(tensors) + _SLACK)


def _wanted(config: Qwen2Config, target: Target) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from expected_tensors(config, "switch")
    if config.tied and config.moe and target.format == "gguf":
        # llama.cpp's qwen2moe has no tied output: give it the embedding twice.
        yield "lm_head.weight", (config.vocabulary, config.hidden)


def _rows(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> tuple[Rows, ...]:
    """Where the rows of a tensor lie, named as MLX does."""
    tensors = checkpoint.tensors
    if ".switch_mlp." in name:
        mlp, _, which = name.removesuffix(".weight").partition(".switch_mlp.")
        experts, count, _ = shape
        if f"{mlp}.experts.gate_up_proj" in tensors:  # transformers 5
            if which == "down_proj":
                return (Rows(f"{mlp}.experts.down_proj", 0, experts * count),)
            offset = count if which == "up_proj" else 0
            return tuple(Rows(f"{mlp}.experts.gate_up_proj", expert * 2 * count + offset, count) for expert in range(experts))
        if name not in tensors:
            return tuple(Rows(f"{mlp}.experts.{expert}.{which}.weight", 0, count) for expert in range(experts))
    if name == "lm_head.weight" and checkpoint.config.tied:
        name = "model.embed_tokens.weight"
    return (Rows(name, 0, math.prod(shape[:-1])),)


def _planned_gguf(name: str, shape: tuple[int, ...], rows: tuple[Rows, ...], target: Target, config: Qwen2Config) -> PlannedTensor:
    renamed = gguf_name(name)
    if renamed.endswith("ffn_gate_inp_shexp.weight"):  # a vector there
        shape = shape[1:]
    kind = tensor_type(renamed, shape, target.weights, config)
    part = Part(renamed, kind.name, shape, kind.row_bytes(shape[-1]) * math.prod(shape[:-1]))
    return PlannedTensor(shape, rows, (part,))


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor that Hugging Face, or MLX for stacked experts, calls `name`."""
    module, _, ending = name.rpartition(".")
    match = _LAYER.fullmatch(module)
    return f"blk.{match[1]}.{_GGUF[match[2]]}.{ending}" if match else f"{_GGUF[module]}.{ending}"


def _planned_mlx(name: str, shape: tuple[int, ...], rows: tuple[Rows, ...], target: Target, config: Qwen2Config) -> PlannedTensor:
    dtype = _FLOATS.get(config.dtype, "BF16") if target.bits else target.weights.upper()
    module, _, ending = name.rpartition(".")
    # A wrong router costs more than the few bytes: the two gates stay as they are.
    gate = module.endswith((".mlp.gate", ".shared_expert_gate"))
    if target.bits is None or ending == "bias" or len(shape) < 2 or gate or shape[-1] % GROUP:
        return PlannedTensor(shape, rows, (_part(name, dtype, shape),))
    *outer, columns = shape
    weight = _part(f"{module}.weight", "U32", (*outer, columns * target.bits // 32))
    scales = _part(f"{module}.scales", dtype, (*outer, columns // GROUP))
    return PlannedTensor(shape, rows, (weight, scales, _part(f"{module}.biases", dtype, scales.shape)))


def _part(name: str, dtype: str, shape: tuple[int, ...]) -> Part:
    return Part(name, dtype, shape, math.prod(shape) * _BYTES[dtype])

"""What a conversion will write, decided from the checkpoint's headers alone: every tensor, where its rows come from, what it becomes.

A plan is plain data. Both formats want the same matrices, the experts of a layer stacked into one; they differ in names and types.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from qwen2_converters.companions import companions
from qwen2_converters.plan_gguf import planned_gguf
from qwen2_converters.plan_mlx import planned_mlx
from qwen2_converters.planned import Plan, Rows
from qwen2_converters.target import Target
from qwen2_local.errors import UnsupportedModel
from qwen2_local.formats.checkpoint import Checkpoint, expected_tensors
from qwen2_local.formats.config import Qwen2Config

_SLACK = 1 << 20  # headers and config.json


def make_plan(checkpoint: Checkpoint, target: Target) -> Plan:
    """The plan of converting `checkpoint`. Raises UnsupportedModel for a model that the target's backend computes otherwise."""
    config = checkpoint.config
    if checkpoint.layout == "mlx":
        raise UnsupportedModel(f"{checkpoint.folder} is an MLX folder already.", hint="Run it as it is, or convert the original checkpoint.")
    if target.format == "gguf" and config.moe and config.moe.normalize:
        raise UnsupportedModel(f"{checkpoint.folder} has norm_topk_prob, which llama.cpp does not compute for qwen2moe.", hint="Convert it for MLX.")
    planned = planned_gguf if target.format == "gguf" else planned_mlx
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

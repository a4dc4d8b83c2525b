"""What a conversion will write, decided from the checkpoint's headers alone: every tensor, where its rows come from, what it becomes.

A plan is plain data. Both formats want the same matrices, the experts of a layer stacked into one; they differ in names and types.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from qwen2_converters.companions import companions
from qwen2_converters.plan_gguf import planned_gguf
from qwen2_converters.plan_mlx import planned_mlx
from qwen2_converters.plan_packed import check_packed_target, planned_packed
from qwen2_converters.planned import Plan, PlannedTensor, Rows
from qwen2_converters.target import Target
from qwen2_local.catalog import SIZES
from qwen2_local.errors import UnsupportedModel, UsageError
from qwen2_local.formats.checkpoint import Checkpoint, expected_tensors
from qwen2_local.formats.config import Qwen2Config, Yarn

_SLACK = 1 << 20  # headers and config.json
_BLOCK = 256
"""Weights of a block of the k-quants: what a padded FFN is a multiple of."""


def make_plan(checkpoint: Checkpoint, target: Target, *, imatrix: bool = False, pad_ffn: bool = False, yarn: bool = False) -> Plan:
    """The plan of converting `checkpoint`.

    imatrix: the weights will be quantized with an importance matrix, for which llama.cpp mixes types a little otherwise. pad_ffn: make the FFN
    of a dense model wider, by zeros, until its rows are whole blocks of 256, which computes the same. yarn: stretch the context as its
    makers announced. These are for GGUF.

    Raises UnsupportedModel for a model that the target's backend computes otherwise, UsageError for an option that is not for this model.
    """
    if checkpoint.layout == "mlx":
        raise UnsupportedModel(f"{checkpoint.folder} is an MLX folder already.", hint="Run it as it is, or convert the original checkpoint.")
    source = checkpoint.config
    if target.format == "gguf" and source.moe and source.moe.normalize:
        raise UnsupportedModel(f"{checkpoint.folder} has norm_topk_prob, which llama.cpp does not compute for qwen2moe.", hint="Convert it for MLX.")
    if target.format == "mlx" and (imatrix or pad_ffn or yarn):
        raise UsageError("An importance matrix, a padded FFN and YaRN are for GGUF files only.", hint=f"Leave the option out for {target}.")
    if source.packed:
        check_packed_target(checkpoint, source.packed, target)
        if imatrix or pad_ffn:
            raise UsageError("An importance matrix and a padded FFN are for weights that are still to be quantized.", hint="Leave the option out.")
    config = _padded(source) if pad_ffn else source
    config = _stretched(config) if yarn else config
    tensors = tuple(_planned(checkpoint, name, shape, target, config, imatrix) for name, shape in _wanted(config, target))
    nbytes = sum(tensor.nbytes for tensor in tensors)
    # Each tensor of a GGUF file is followed by up to 31 bytes of padding and described by about 100.
    files = sum(path.stat().st_size for path in companions(checkpoint.folder))
    return Plan(target, config, tensors, nbytes, nbytes + files + 256 * len(tensors) + _SLACK)


def padded_ffn(size: int) -> int:
    """What a padded FFN's inner size `size` becomes."""
    return -(-size // _BLOCK) * _BLOCK


def _padded(config: Qwen2Config) -> Qwen2Config:
    if config.moe:
        raise UsageError("Only the FFN of dense models is padded; this one is a mixture of experts.", hint="Leave the padding out.")
    return replace(config, intermediate=padded_ffn(config.intermediate))


def _stretched(config: Qwen2Config) -> Qwen2Config:
    """With the YaRN that the makers of its size announced, if it has none yet."""
    if config.yarn:
        return config
    for size in SIZES:
        alike = (size.layers, size.hidden, size.heads, size.kv_heads, size.intermediate, size.name == "57b")
        if alike == (config.layers, config.hidden, config.heads, config.kv_heads, config.intermediate, config.moe is not None):
            break
    else:
        raise UsageError("YaRN was announced for the sizes of Qwen2 alone, and this model has another shape.", hint="Leave YaRN out.")
    if size.yarn_context is None:
        known = ", ".join(size.name for size in SIZES if size.yarn_context)
        raise UsageError(f"Qwen2-{size.title} was not made for more than {config.context:,} tokens.", hint=f"YaRN is for {known}.")
    if config.context != size.context:
        fault = f"This model has {config.context:,} tokens of context; YaRN was announced for those of {size.context:,}, the Instruct models."
        raise UsageError(fault, hint="Leave YaRN out.")
    return replace(config, context=size.yarn_context, yarn=Yarn(size.yarn_context / size.context, size.context))


def _wanted(config: Qwen2Config, target: Target) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from expected_tensors(config, "switch")
    if config.tied and config.moe and target.format == "gguf":
        # llama.cpp's qwen2moe has no tied output: give it the embedding twice.
        yield "lm_head.weight", (config.vocabulary, config.hidden)


def _planned(checkpoint: Checkpoint, name: str, shape: tuple[int, ...], target: Target, config: Qwen2Config, imatrix: bool) -> PlannedTensor:
    rows = _rows(checkpoint, name, shape)
    if config.packed:
        return planned_packed(checkpoint, config.packed, name, shape, rows, target, config)
    if target.format == "gguf":
        return planned_gguf(name, shape, rows, target, config, imatrix=imatrix)
    return planned_mlx(name, shape, rows, target, config)


def _rows(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> tuple[Rows, ...]:
    """Where the rows of a tensor lie, named as MLX does."""
    if ".switch_mlp." in name:
        return _expert_rows(checkpoint, name, shape)
    if name == "lm_head.weight" and checkpoint.config.tied:
        name = "model.embed_tokens.weight"
    count = math.prod(shape[:-1])
    if name.endswith((".mlp.gate_proj.weight", ".mlp.up_proj.weight")) and count > checkpoint.config.intermediate:
        there = checkpoint.config.intermediate
        return Rows(name, 0, there), Rows(None, 0, count - there)
    return (Rows(name, 0, count),)


def _expert_rows(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> tuple[Rows, ...]:
    tensors = checkpoint.tensors
    mlp, _, which = name.removesuffix(".weight").partition(".switch_mlp.")
    experts, count, _ = shape
    if f"{mlp}.experts.gate_up_proj" in tensors:  # transformers 5
        if which == "down_proj":
            return tuple(Rows(f"{mlp}.experts.down_proj", expert * count, count) for expert in range(experts))
        offset = count if which == "up_proj" else 0
        return tuple(Rows(f"{mlp}.experts.gate_up_proj", expert * 2 * count + offset, count) for expert in range(experts))
    if name in tensors:
        return tuple(Rows(name, expert * count, count) for expert in range(experts))
    return tuple(Rows(f"{mlp}.experts.{expert}.{which}.weight", 0, count) for expert in range(experts))

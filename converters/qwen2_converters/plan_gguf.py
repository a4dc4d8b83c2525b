"""What a matrix or vector becomes in a GGUF file: llama.cpp's name for it, and its type."""

from __future__ import annotations

import math
import re

from qwen2_converters.mix import tensor_type
from qwen2_converters.planned import Part, PlannedTensor, Rows
from qwen2_converters.target import Target
from qwen2_local.formats.config import Qwen2Config

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


def planned_gguf(
    name: str, shape: tuple[int, ...], rows: tuple[Rows, ...], target: Target, config: Qwen2Config, *, imatrix: bool = False
) -> PlannedTensor:
    """The tensor that Hugging Face, or MLX for stacked experts, calls `name`, in a GGUF file. imatrix: whether it is quantized with one."""
    renamed = gguf_name(name)
    if renamed.endswith("ffn_gate_inp_shexp.weight"):  # a vector there
        shape = shape[1:]
    kind = tensor_type(renamed, shape, target.weights, config, imatrix=imatrix)
    part = Part(renamed, kind.name, shape, kind.row_bytes(shape[-1]) * math.prod(shape[:-1]))
    return PlannedTensor(shape, rows, (part,))


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor that Hugging Face, or MLX for stacked experts, calls `name`."""
    module, _, ending = name.rpartition(".")
    match = _LAYER.fullmatch(module)
    return f"blk.{match[1]}.{_GGUF[match[2]]}.{ending}" if match else f"{_GGUF[module]}.{ending}"

"""Which ggml type each tensor of a GGUF file gets, as llama.cpp's own quantizer decides it (src/llama-quant.cpp of ggml 0.25).

Its `tensor_allows_quantization`, `llama_tensor_get_type_impl` and `tensor_type_fallback`, for the types that `Target` knows.
"""

from __future__ import annotations

from qwen2_local.formats.config import Qwen2Config
from qwen2_local.formats.ggml_types import BY_NAME, GgmlType

FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7}
"""general.file_type of a target's weights (LLAMA_FTYPE_* of llama.h)."""


def tensor_type(name: str, shape: tuple[int, ...], weights: str, config: Qwen2Config) -> GgmlType:
    """The type of the GGUF tensor `name`. shape: rows last but one, columns last. weights: of the target ("q4_0")."""
    if len(shape) < 2 or name.endswith("ffn_gate_inp.weight"):
        return BY_NAME["F32"]
    kind = BY_NAME[weights.upper()]
    if kind.block == 1:
        return kind
    if name == "output.weight" or (config.tied and config.moe is None and name == "token_embd.weight"):
        if shape[-1] % kind.block:
            kind = BY_NAME["Q8_0"]
        elif kind.name != "Q8_0":
            kind = BY_NAME["Q6_K"]
    elif config.moe and config.moe.experts == 8 and name.endswith(("attn_v.weight", "attn_k.weight")):
        kind = BY_NAME["Q8_0"]
    return _fitting(kind, shape[-1])


def _fitting(kind: GgmlType, columns: int) -> GgmlType:
    """`kind`, or what llama.cpp takes where `columns` are not whole blocks."""
    if columns % kind.block and kind.name == "Q6_K":
        kind = BY_NAME["Q8_0"]
    return BY_NAME["F16"] if columns % kind.block else kind

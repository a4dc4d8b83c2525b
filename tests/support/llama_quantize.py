"""GGUF files by gguf-py's writer and llama.cpp's own quantizer: what ours are compared with."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from qwen2_converters.mix import FILE_TYPES
from qwen2_local.backends import llamalib
from tests.support import random_qwen2
from tests.support.random_qwen2 import Array, Weights

Importance = dict[str, Array]
"""By the GGUF name of a matrix: the importance of its columns, expert after expert."""


def write_plain(path: Path, config: dict[str, Any], weights: Weights, dtype: str = "F32") -> Path:
    """A file as llama.cpp's script writes it: matrices in `dtype` ("BF16", "F16", "F32"), vectors and routers in F32."""
    moe = config["model_type"] == "qwen2_moe"
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2MOE if moe else gguf.MODEL_ARCH.QWEN2, config["num_hidden_layers"])
    writer = gguf.GGUFWriter(str(path), "qwen2moe" if moe else "qwen2")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if moe:
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
        writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
    for name, value in random_qwen2.stacked(weights).items():
        renamed = names.get_name(name.replace(".switch_mlp.", ".experts."), try_suffixes=(".weight", ".bias"))
        assert renamed
        value = np.ascontiguousarray(value[0] if "shared_expert_gate" in name else value)
        kind = gguf.GGMLQuantizationType[dtype if value.ndim > 1 and "ffn_gate_inp" not in renamed else "F32"]
        writer.add_tensor(renamed, gguf.quants.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def quantize(plain: Path, path: Path, weights: str, importance: Importance | None = None, threads: int = 1) -> Path:
    """What llama.cpp's quantizer makes of the file `plain`. weights: of a target ("q4_k_m")."""
    lib = llamalib.library()
    parameters = lib.llama_model_quantize_default_params()
    parameters.ftype = FILE_TYPES[weights]
    parameters.nthread = threads
    if importance:
        float_pointer = ctypes.POINTER(ctypes.c_float)
        arrays = {name: np.ascontiguousarray(value, np.float32).reshape(-1) for name, value in importance.items()}
        entries = [(name.encode(), value.ctypes.data_as(float_pointer), value.size) for name, value in arrays.items()]
        parameters.imatrix = (lib.llama_model_imatrix_data * (len(entries) + 1))(*entries, (None, None, 0))
    assert lib.llama_model_quantize(str(plain).encode(), str(path).encode(), ctypes.byref(parameters)) == 0, llamalib.last_errors()
    return path


def tensors(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """By name: type, shape with the row's length first, bytes."""
    return {t.name: (t.tensor_type.name, tuple(map(int, t.shape)), t.data.tobytes()) for t in gguf.GGUFReader(path).tensors}

"""A tiny random Qwen2 model as a GGUF file, for tests that need a real model and no meaning."""

from __future__ import annotations

from pathlib import Path

import numpy as np

VOCABULARY = 320
LAYERS = 2
KV_BYTES_PER_TOKEN = LAYERS * 2 * 32 * 2 * 2
"""Two KV heads of 32, keys and values, 16 bit."""


def write_gguf(
    path: Path, *, seed: int = 0, poison: bool = False, width: int = 128, layers: int = LAYERS, inner: int = 256, deaf: bool = False
) -> Path:
    """Write a model in 32-bit floats: width / 32 heads, half as many KV heads.

    poison: one weight is no number. deaf: attention adds nothing, so that logits depend on the token alone.
    """
    import gguf

    heads = width // 32
    random = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (random.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)

    writer = gguf.GGUFWriter(str(path), "qwen2")
    writer.add_context_length(32768)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads // 2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([f"t{i}" for i in range(VOCABULARY)])
    writer.add_token_merges(["t 1"])

    # A larger embedding than is usual, so that different tokens give clearly different logits.
    writer.add_tensor("token_embd.weight", matrix(VOCABULARY, width) * np.float32(8))
    writer.add_tensor("output.weight", matrix(VOCABULARY, width) * np.float32(4))
    writer.add_tensor("output_norm.weight", np.ones(width, np.float32))
    kv = width // 2
    for layer in range(layers):
        shapes = {
            "attn_q": (width, width),
            "attn_k": (kv, width),
            "attn_v": (kv, width),
            "attn_output": (width, width),
            "ffn_gate": (inner, width),
            "ffn_up": (inner, width),
            "ffn_down": (width, inner),
        }
        for name, (rows, columns) in shapes.items():
            values = matrix(rows, columns)
            if poison and name == "ffn_down":
                values[0, 0] = np.nan
            if deaf and name == "attn_output":
                values[:] = 0
            writer.add_tensor(f"blk.{layer}.{name}.weight", values)
        for name, size in (("attn_q", width), ("attn_k", kv), ("attn_v", kv)):
            writer.add_tensor(f"blk.{layer}.{name}.bias", random.standard_normal(size).astype(np.float32))
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(width, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

"""A one-layer Qwen2 model in a GGUF file of 0.4 MB, for the self-test: the same bytes everywhere, matrices as real models have them."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import numpy as np

VOCABULARY = 320
_WIDTH, _INNER, _HEADS, _KV_HEADS = 256, 512, 4, 2
_KV_WIDTH = _WIDTH // _HEADS * _KV_HEADS
_F32, _Q4_0, _Q8_0 = 0, 2, 8
_BLOCK = 32

_METADATA: dict[str, str | int | float] = {
    "general.architecture": "qwen2",
    "tokenizer.ggml.model": "none",
    "qwen2.vocab_size": VOCABULARY,
    "qwen2.context_length": 512,
    "qwen2.embedding_length": _WIDTH,
    "qwen2.block_count": 1,
    "qwen2.feed_forward_length": _INNER,
    "qwen2.attention.head_count": _HEADS,
    "qwen2.attention.head_count_kv": _KV_HEADS,
    "qwen2.attention.layer_norm_rms_epsilon": 1e-6,
}

# name: (rows, columns, type); both types, so that both kinds of fast kernels run.
_TENSORS = {
    "token_embd.weight": (VOCABULARY, _WIDTH, _Q8_0),
    "output.weight": (VOCABULARY, _WIDTH, _Q8_0),
    "output_norm.weight": (1, _WIDTH, _F32),
    "blk.0.attn_norm.weight": (1, _WIDTH, _F32),
    "blk.0.ffn_norm.weight": (1, _WIDTH, _F32),
    "blk.0.attn_q.weight": (_WIDTH, _WIDTH, _Q4_0),
    "blk.0.attn_k.weight": (_KV_WIDTH, _WIDTH, _Q4_0),
    "blk.0.attn_v.weight": (_KV_WIDTH, _WIDTH, _Q8_0),
    "blk.0.attn_output.weight": (_WIDTH, _WIDTH, _Q4_0),
    "blk.0.attn_q.bias": (1, _WIDTH, _F32),
    "blk.0.attn_k.bias": (1, _KV_WIDTH, _F32),
    "blk.0.attn_v.bias": (1, _KV_WIDTH, _F32),
    "blk.0.ffn_gate.weight": (_INNER, _WIDTH, _Q4_0),
    "blk.0.ffn_up.weight": (_INNER, _WIDTH, _Q4_0),
    "blk.0.ffn_down.weight": (_WIDTH, _INNER, _Q8_0),
}


def write(path: Path) -> None:
    """Write the model. Its weights come from SHAKE-256 of each tensor's name, so no library's random numbers matter."""
    head = [struct.pack("<4sIQQ", b"GGUF", 3, len(_TENSORS), len(_METADATA))]
    for key, value in _METADATA.items():
        head += [_string(key), _value(value)]
    data: list[bytes] = []
    offset = 0
    for name, (rows, columns, kind) in _TENSORS.items():
        shape = (columns,) if rows == 1 else (columns, rows)
        head += [_string(name), struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)]
        data.append(_tensor(name, rows * columns, kind))
        offset += len(data[-1])  # every size here is a multiple of the alignment, 32
    header = b"".join(head)
    path.write_bytes(header + bytes(-len(header) % 32) + b"".join(data))


def _tensor(name: str, count: int, kind: int) -> bytes:
    if kind == _F32:
        return np.full(count, 0.0 if name.endswith("bias") else 1.0, np.float32).tobytes()
    blocks = count // _BLOCK
    width = _BLOCK // 2 if kind == _Q4_0 else _BLOCK
    # One scale for a whole tensor would hide a kernel that mixes up its blocks.
    raw = np.frombuffer(hashlib.shake_256(name.encode()).digest(blocks * (width + 1)), np.uint8).reshape(blocks, width + 1)
    scale = (0.5 + raw[:, :1] / 255) * (0.013 if kind == _Q4_0 else 0.0008)
    return np.hstack([scale.astype("<f2").view(np.uint8), raw[:, 1:]]).tobytes()


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _value(value: str | int | float) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    return struct.pack("<II", 4, value) if isinstance(value, int) else struct.pack("<If", 6, value)

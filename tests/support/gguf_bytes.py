"""GGUF files by hand, byte by byte, so that tests can make them lie."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_CODES = {U8: "<B", I8: "<b", U16: "<H", I16: "<h", U32: "<I", I32: "<i", F32: "<f", BOOL: "<B", U64: "<Q", I64: "<q", F64: "<d"}


def string(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def value(kind: int, of: object) -> bytes:
    return string(of) if kind == STRING else struct.pack(_CODES[kind], of)


def key(name: str, kind: int, of: object) -> bytes:
    return string(name) + struct.pack("<I", kind) + value(kind, of)


def array(name: str, kind: int, of: Sequence[object]) -> bytes:
    return string(name) + struct.pack("<IIQ", ARRAY, kind, len(of)) + b"".join(value(kind, one) for one in of)


def info(name: str, shape: Sequence[int], kind: int, offset: int) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def whole(
    keys: Sequence[bytes], infos: Sequence[bytes], data: bytes = b"", *, key_count: int | None = None, tensor_count: int | None = None
) -> bytes:
    """A file, version 3, alignment 32."""
    counts = (len(infos) if tensor_count is None else tensor_count, len(keys) if key_count is None else key_count)
    head = b"GGUF" + struct.pack("<IQQ", 3, *counts) + b"".join(keys) + b"".join(infos)
    return head + bytes(-len(head) % 32) + data


@dataclass
class Model:
    """A Qwen2 small enough to read: change what you like, then `build`. Shapes as in files, the row's length first."""

    keys: dict[str, bytes] = field(default_factory=dict)
    tensors: dict[str, tuple[int, ...]] = field(default_factory=dict)
    kind: int = 0

    def build(self) -> bytes:
        infos, offset = [], 0
        for name, shape in self.tensors.items():
            infos.append(info(name, shape, self.kind, offset))
            size = 4
            for length in shape:
                size *= length
            offset += size + -size % 32
        return whole(list(self.keys.values()), infos, bytes(offset))


HIDDEN, VOCABULARY, INNER, KV = 32, 5, 48, 16


def model(architecture: str = "qwen2", layers: int = 2) -> Model:
    made = Model()
    numbers = {
        "block_count": layers, "context_length": 64, "embedding_length": HIDDEN, "feed_forward_length": INNER,
        "attention.head_count": 4, "attention.head_count_kv": 2,
    }  # fmt: skip
    if architecture == "qwen2moe":
        numbers |= {"expert_count": 4, "expert_used_count": 2}
    made.keys["general.architecture"] = key("general.architecture", STRING, architecture)
    for name, number in numbers.items():
        made.keys[name] = key(f"{architecture}.{name}", U32, number)
    made.keys["eps"] = key(f"{architecture}.attention.layer_norm_rms_epsilon", F32, 1e-6)
    made.keys["model"] = key("tokenizer.ggml.model", STRING, "gpt2")
    made.keys["tokens"] = array("tokenizer.ggml.tokens", STRING, list("abcde"))
    made.keys["types"] = array("tokenizer.ggml.token_type", I32, [1] * VOCABULARY)
    made.keys["merges"] = array("tokenizer.ggml.merges", STRING, ["a b"])
    made.keys["eos"] = key("tokenizer.ggml.eos_token_id", U32, 4)
    made.tensors |= {"token_embd.weight": (HIDDEN, VOCABULARY), "output_norm.weight": (HIDDEN,), "output.weight": (HIDDEN, VOCABULARY)}
    for layer in range(layers):
        shapes: dict[str, tuple[int, ...]] = {
            "attn_norm.weight": (HIDDEN,), "ffn_norm.weight": (HIDDEN,), "attn_q.weight": (HIDDEN, HIDDEN), "attn_q.bias": (HIDDEN,),
            "attn_k.weight": (HIDDEN, KV), "attn_k.bias": (KV,), "attn_v.weight": (HIDDEN, KV), "attn_v.bias": (KV,),
            "attn_output.weight": (HIDDEN, HIDDEN),
        }  # fmt: skip
        if architecture == "qwen2":
            shapes |= {"ffn_gate.weight": (HIDDEN, INNER), "ffn_up.weight": (HIDDEN, INNER), "ffn_down.weight": (INNER, HIDDEN)}
        else:
            # As in the first files: sizes of the experts are derived, 48 / 2 and 48.
            shapes |= {
                "ffn_gate_inp.weight": (HIDDEN, 4), "ffn_gate_inp_shexp.weight": (HIDDEN,),
                "ffn_gate_exps.weight": (HIDDEN, 24, 4), "ffn_up_exps.weight": (HIDDEN, 24, 4), "ffn_down_exps.weight": (24, HIDDEN, 4),
                "ffn_gate_shexp.weight": (HIDDEN, INNER), "ffn_up_shexp.weight": (HIDDEN, INNER), "ffn_down_shexp.weight": (INNER, HIDDEN),
            }  # fmt: skip
        made.tensors |= {f"blk.{layer}.{name}": shape for name, shape in shapes.items()}
    return made

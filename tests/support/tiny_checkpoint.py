"""Whole Hugging Face folders of random weights: config, tokenizer, generation_config, shards, either layout of experts, any dtype."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

from tests.support import random_qwen2, small_tokenizer
from tests.support.random_qwen2 import Array, Weights

TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
END, START = small_tokenizer.CONTROL["<|im_end|>"], small_tokenizer.CONTROL["<|endoftext|>"]

GENERATION = {
    "do_sample": True,
    "temperature": 0.7,
    "top_p": 0.8,
    "top_k": 20,
    "repetition_penalty": 1.05,
    "eos_token_id": [END, START],
    "pad_token_id": START,
    "bos_token_id": START,
}


def dense(**changes: Any) -> dict[str, Any]:
    return random_qwen2.config(**({"torch_dtype": "bfloat16", "eos_token_id": END, "bos_token_id": START} | changes))


def moe(**changes: Any) -> dict[str, Any]:
    return random_qwen2.moe_config(**({"torch_dtype": "bfloat16", "eos_token_id": END, "bos_token_id": START} | changes))


def weights(config: dict[str, Any], dtype: str = "BF16", seed: int = 1) -> Weights:
    """float32, rounded to what `dtype` holds."""
    made = random_qwen2.weights(config, seed)
    if dtype == "BF16":
        return {name: (value.view(np.uint32) & 0xFFFF0000).view(np.float32) for name, value in made.items()}
    return {name: value.astype({"F16": np.float16, "F32": np.float32}[dtype]).astype(np.float32) for name, value in made.items()}


def fused(weights: Weights) -> Weights:
    """The experts as transformers 5 keeps them: gate and up in one tensor."""
    out = random_qwen2.stacked(weights)
    for name in [name for name in out if ".switch_mlp." in name]:
        mlp, _, which = name.partition(".switch_mlp.")
        if which == "gate_proj.weight":
            out[f"{mlp}.experts.gate_up_proj"] = np.concatenate([out.pop(name), out.pop(f"{mlp}.switch_mlp.up_proj.weight")], axis=1)
        elif which == "down_proj.weight":
            out[f"{mlp}.experts.down_proj"] = out.pop(name)
    return out


def write(folder: Path, config: dict[str, Any], tensors: Weights, *, dtype: str = "BF16", shards: int = 1) -> Path:
    """The folder; its tensors dealt out to `shards` in turn. Those in float32 become `dtype`, all others are kept."""
    folder.mkdir(parents=True)
    for name, content in (
        ("config", config),
        ("generation_config", GENERATION),
        ("tokenizer", small_tokenizer.small_json()),
        (
            "tokenizer_config",
            {"tokenizer_class": "Qwen2Tokenizer", "chat_template": TEMPLATE, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        ),
    ):
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors, dtype)
        return folder
    names, weight_map = list(tensors), {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        write_safetensors(folder / file, {name: tensors[name] for name in names[shard::shards]}, dtype)
        weight_map |= dict.fromkeys(names[shard::shards], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def write_safetensors(path: Path, tensors: Weights, dtype: str) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    raws: list[bytes] = []
    offset = 0
    for name, value in tensors.items():
        kept = {"int32": "I32", "float16": "F16"}.get(value.dtype.name)
        raws.append(value.tobytes() if kept else _raw(value, dtype))
        header[name] = {"dtype": kept or dtype, "shape": value.shape, "data_offsets": [offset, offset + len(raws[-1])]}
        offset += len(raws[-1])
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + b"".join(raws))


def _raw(value: Array, dtype: str) -> bytes:
    if dtype == "BF16":
        return (np.ascontiguousarray(value, np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return value.astype({"F16": np.float16, "F32": np.float32}[dtype]).tobytes()

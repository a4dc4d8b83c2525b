"""Writes a checkpoint of random weights with the exact shapes of a Qwen2: for measuring loads and conversions without a download.

    python benchmarks/random_checkpoint.py 0.5b FOLDER      sizes: 0.5b 1.5b 7b 57b 72b, as Instruct

The tokenizer is the real one (dev dependency `dashscope`). Speed and sizes are those of the real model, its words are noise.
"""

from __future__ import annotations

import argparse
import json
import math
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from qwen2_local.catalog import SIZES, Size
from qwen2_local.formats.checkpoint import expected_tensors
from qwen2_local.formats.config import parse_config
from tests.support.qwen2_vocabulary import write_real_tokenizer

SHARD = 4_000_000_000
POOL = 4_194_301
"""Random numbers that are made; a prime, so that rows of a matrix, which take them in turn, are not alike."""


def config(size: Size) -> dict[str, Any]:
    """config.json as the official Instruct repository has it."""
    moe = size.name == "57b"
    made: dict[str, Any] = {
        "architectures": ["Qwen2MoeForCausalLM" if moe else "Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_act": "silu",
        "hidden_size": size.hidden,
        "initializer_range": 0.02,
        "intermediate_size": size.intermediate,
        "max_position_embeddings": size.context,
        "max_window_layers": size.layers,
        "model_type": "qwen2_moe" if moe else "qwen2",
        "num_attention_heads": size.heads,
        "num_hidden_layers": size.layers,
        "num_key_value_heads": size.kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": size.tied,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": size.vocabulary,
    }
    if moe:
        made |= {
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "moe_intermediate_size": 2560,
            "norm_topk_prob": False,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.001,
            "shared_expert_intermediate_size": 20480,
        }
    return made


class Noise:
    """Bytes of bf16 numbers from one pool, over and over."""

    def __init__(self, seed: int) -> None:
        self._pool = np.random.Generator(np.random.SFC64(seed)).standard_normal(POOL, dtype=np.float32)
        self._scaled: dict[tuple[float, float], bytes] = {}
        self._at = 0

    def take(self, count: int, mean: float, spread: float) -> Iterator[bytes]:
        """`count` numbers in pieces. A mean of 1 and no spread are a norm."""
        key = (mean, spread)
        if key not in self._scaled:
            self._scaled[key] = ((mean + spread * self._pool).astype(np.float32).view(np.uint32) >> 16).astype("<u2").tobytes()
        pool = self._scaled[key]
        while count:
            piece = min(count, POOL - self._at)
            yield pool[2 * self._at : 2 * (self._at + piece)]
            self._at = (self._at + piece) % POOL
            count -= piece


def write(size: Size, folder: Path, seed: int = 0) -> None:
    folder.mkdir(parents=True)
    raw = config(size)
    write_real_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(raw, indent=2))
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"repetition_penalty": size.repetition_penalty}, indent=2))
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = total = 0
    for name, shape in expected_tensors(parse_config(raw, folder / "config.json")):
        nbytes = 2 * math.prod(shape)
        if filled + nbytes > SHARD:
            shards.append([])
            filled = 0
        shards[-1].append((name, shape))
        filled += nbytes
        total += nbytes
    noise = Noise(seed)
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / file, tensors, noise)
        weight_map |= {name: file for name, _ in tensors}
    if len(shards) > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))


def _write_shard(path: Path, tensors: list[tuple[str, tuple[int, ...]]], noise: Noise) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors:
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for name, shape in tensors:
            norm = name.endswith("norm.weight")
            mean, spread = (1.0, 0.05) if norm else (0.0, 0.02 if "embed" in name else shape[-1] ** -0.5)
            for piece in noise.take(math.prod(shape), mean, spread):
                file.write(piece)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=[size.name for size in SIZES])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write(next(size for size in SIZES if size.name == arguments.size), arguments.folder, arguments.seed)

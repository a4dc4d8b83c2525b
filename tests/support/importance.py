"""Importance matrices as llama-imatrix writes them, of random numbers."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np

from qwen2_local.formats.config import Qwen2Config
from tests.support.random_qwen2 import Array

Sums = dict[str, tuple[Array, Array]]
"""By the GGUF name of a matrix: summed squares [experts, columns], counts [experts]."""


def sums(config: Qwen2Config, seed: int = 1) -> Sums:
    """Of all matrices in the layers; some columns are never driven, and of several experts the last is never reached."""
    random = np.random.RandomState(seed)
    made: Sums = {}
    shapes = {"attn_q": config.hidden, "attn_k": config.hidden, "attn_v": config.hidden, "attn_output": config.hidden}
    if config.moe:
        inner, shared, experts = config.moe.expert_size, config.moe.shared_size, config.moe.experts
        shapes |= {"ffn_gate_inp": config.hidden, "ffn_gate_inp_shexp": config.hidden}
        shapes |= {"ffn_gate_shexp": config.hidden, "ffn_up_shexp": config.hidden, "ffn_down_shexp": shared}
        shapes |= {"ffn_gate_exps": config.hidden, "ffn_up_exps": config.hidden, "ffn_down_exps": inner}
    else:
        experts = 1
        shapes |= {"ffn_gate": config.hidden, "ffn_up": config.hidden, "ffn_down": config.intermediate}
    for layer in range(config.layers):
        for name, columns in shapes.items():
            count = experts if name.endswith("_exps") else 1
            values = (100 * random.standard_normal((count, columns)) ** 4).astype(np.float32)
            values[:, :7] = 0
            counts = random.randint(1, 900, count).astype(np.float32)
            counts[-1] *= count == 1
            made[f"blk.{layer}.{name}.weight"] = values, counts
    return made


def write_gguf(path: Path, sums: Sums, *, kind: str = "imatrix") -> Path:
    """The file of today."""
    writer = gguf.GGUFWriter(str(path), "")
    writer.add_type(kind)
    writer.add_array("imatrix.datasets", ["text.txt"])
    writer.add_uint32("imatrix.chunk_count", 17)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, (values, counts) in sums.items():
        writer.add_tensor(f"{name}.in_sum2", values)
        writer.add_tensor(f"{name}.counts", counts.reshape(-1, 1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_dat(path: Path, sums: Sums, calls: int = 9) -> Path:
    """The file of 2023 to 2025: means, times the number of calls."""
    raw = [struct.pack("<i", len(sums))]
    for name, values in means(sums).items():
        raw += [struct.pack("<i", len(name)), name.encode(), struct.pack("<ii", calls, values.size), (values * np.float32(calls)).tobytes()]
    path.write_bytes(b"".join(raw) + struct.pack("<ii", 17, 8) + b"text.txt")
    return path


def means(sums: Sums) -> dict[str, Array]:
    """What llama-quantize makes of it."""
    return {
        name: np.stack([row / np.float32(count) if count else np.ones_like(row) for row, count in zip(values, counts, strict=True)])
        for name, (values, counts) in sums.items()
    }

"""PEFT adapters of random numbers, and by hand the weights that they make."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from tests.support import tiny_checkpoint
from tests.support.random_qwen2 import Weights

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def settings(**changes: Any) -> dict[str, Any]:
    """An adapter_config.json as PEFT writes it."""
    base: dict[str, Any] = {
        "alpha_pattern": {}, "auto_mapping": None, "base_model_name_or_path": "Qwen/Qwen2-0.5B-Instruct", "bias": "none", "fan_in_fan_out": False,
        "inference_mode": True, "init_lora_weights": True, "layer_replication": None, "layers_to_transform": None, "loftq_config": {},
        "lora_alpha": 16, "lora_bias": False, "lora_dropout": 0.05, "modules_to_save": None, "peft_type": "LORA", "r": 4, "rank_pattern": {},
        "target_modules": list(ALL), "task_type": "CAUSAL_LM", "use_dora": False, "use_rslora": False,
    }  # fmt: skip
    return base | changes


def tensors(weights: Weights, config: dict[str, Any], *, only: tuple[str, ...] = ALL) -> Weights:
    """A and B of the matrices whose names end so, small enough not to drown the weights. rank_pattern: by the ends of names."""
    made: Weights = {}
    for name, value in weights.items():
        module = name.removesuffix(".weight")
        if value.ndim == 2 and module.endswith(only):
            rank = next((rank for end, rank in config["rank_pattern"].items() if module.endswith(end)), config["r"])
            random = np.random.RandomState(zlib.crc32(name.encode()))
            rows, columns = value.shape
            made[f"base_model.model.{module}.lora_A.weight"] = (random.standard_normal((rank, columns)) / columns**0.5).astype(np.float32)
            made[f"base_model.model.{module}.lora_B.weight"] = (random.standard_normal((rows, rank)) * 0.1).astype(np.float32)
    return made


def write(folder: Path, config: dict[str, Any], tensors: Weights, *, dtype: str = "F32") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tiny_checkpoint.write_safetensors(folder / "adapter_model.safetensors", tensors, dtype)
    return folder


def merged(weights: Weights, tensors: Weights, scales: dict[str, float]) -> Weights:
    """W + scale * B @ A. scales: by the ends of modules' names."""
    out = dict(weights)
    for name, a in tensors.items():
        module, _, half = name.removeprefix("base_model.model.").partition(".lora_")
        if half == "A.weight":
            scale = next(scale for end, scale in scales.items() if module.endswith(end))
            b = tensors[name.replace("lora_A", "lora_B")]
            delta = scale * (b.astype(np.float64) @ a.astype(np.float64))
            out[f"{module}.weight"] = (out[f"{module}.weight"] + delta).astype(np.float32)
    return out

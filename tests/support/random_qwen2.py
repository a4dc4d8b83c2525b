"""Random small Qwen2 models whose every tensor matters, from NumPy alone: the same weights wherever and whenever they are made."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Weights = dict[str, Array]
"""Tensors in float32, by the names of a Hugging Face checkpoint of transformers 4 (each expert's matrices apart)."""

_TYPES = {"float32": "F32", "float16": "F16", "uint16": "BF16", "uint32": "U32"}


def config(**changes: Any) -> dict[str, Any]:
    """A config.json: a small dense Qwen2, or what `changes` make of it."""
    base: dict[str, Any] = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 192,
        "vocab_size": 320,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "use_sliding_window": False,
        "torch_dtype": "float32",
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return base | changes


def moe_config(**changes: Any) -> dict[str, Any]:
    """The same with experts in each layer."""
    moe: dict[str, Any] = {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "tie_word_embeddings": False,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 128,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": False,
    }
    return config(**(moe | changes))


def weights(config: dict[str, Any], seed: int) -> Weights:
    """Values that keep activations near 1, biases that are not 0 and norms that are not 1.

    The legacy RandomState, seeded by tensor: its stream is frozen, Generator's is not (NEP 19).
    """
    made: Weights = {}

    def add(name: str, *shape: int, spread: float, mean: float = 0.0) -> None:
        random = np.random.RandomState([seed, zlib.crc32(name.encode())])
        made[name] = (mean + spread * random.standard_normal(shape)).astype(np.float32)

    def matrix(name: str, rows: int, columns: int, gain: float = 1.0) -> None:
        add(f"{name}.weight", rows, columns, spread=gain / np.sqrt(columns))

    def mlp(at: str, inner: int) -> None:
        matrix(f"{at}.gate_proj", inner, hidden, 1.5)
        matrix(f"{at}.up_proj", inner, hidden, 1.5)
        matrix(f"{at}.down_proj", hidden, inner, 1.5)

    hidden, kv = config["hidden_size"], config["hidden_size"] // config["num_attention_heads"] * config["num_key_value_heads"]
    add("model.embed_tokens.weight", config["vocab_size"], hidden, spread=0.3)
    for index in range(config["num_hidden_layers"]):
        at = f"model.layers.{index}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            add(f"{at}.{norm}.weight", hidden, spread=0.2, mean=1.0)
        for name, rows in (("q", hidden), ("k", kv), ("v", kv)):
            matrix(f"{at}.self_attn.{name}_proj", rows, hidden)
            add(f"{at}.self_attn.{name}_proj.bias", rows, spread=0.5)
        matrix(f"{at}.self_attn.o_proj", hidden, hidden)
        if "num_experts" not in config:
            mlp(f"{at}.mlp", config["intermediate_size"])
            continue
        matrix(f"{at}.mlp.gate", config["num_experts"], hidden, 2.0)
        matrix(f"{at}.mlp.shared_expert_gate", 1, hidden, 2.0)
        mlp(f"{at}.mlp.shared_expert", config["shared_expert_intermediate_size"])
        for expert in range(config["num_experts"]):
            mlp(f"{at}.mlp.experts.{expert}", config["moe_intermediate_size"])
    add("model.norm.weight", hidden, spread=0.2, mean=1.0)
    if not config["tie_word_embeddings"]:
        matrix("lm_head", config["vocab_size"], hidden, 2.0)
    return made


def checksum(weights: Weights) -> int:
    """CRC-32 of all values: tells other weights from other arithmetic."""
    crc = 0
    for name in sorted(weights):
        crc = zlib.crc32(np.ascontiguousarray(weights[name]).tobytes(), crc)
    return crc


def write_hf(folder: Path, config: dict[str, Any], weights: Weights) -> Path:
    """A Hugging Face checkpoint in float32."""
    return _write(folder, config, weights, {"format": "pt"})


def write_mlx(
    folder: Path,
    config: dict[str, Any],
    weights: Weights,
    *,
    dtype: str = "float32",
    bits: int | None = None,
    group: int = 64,
    exceptions: dict[str, Any] | None = None,
) -> Path:
    """An MLX folder as mlx-lm writes it, by MLX's own hands.

    dtype: "float32", "float16" or "bfloat16". bits: quantize all matrices, as mlx-lm does (the gates of experts with 8).
    exceptions: by path, False or a recipe such as {"bits": 8, "group_size": 64}.
    """
    import mlx.core as mx

    kind = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}[dtype]
    plain = {name: mx.array(value).astype(kind) for name, value in stacked(weights).items()}
    config = dict(config)
    if bits is not None:
        recipes: dict[str, Any] = dict(exceptions or {})
        recipes |= {
            name.removesuffix(".weight"): {"bits": 8, "group_size": 64} for name in plain if name.endswith(("mlp.gate.weight", "expert_gate.weight"))
        }
        config["quantization"] = {"group_size": group, "bits": bits, **recipes}
        for name in [name for name in plain if name.endswith(".weight") and plain[name].ndim > 1]:
            module = name.removesuffix(".weight")
            recipe = recipes.get(module, {"bits": bits, "group_size": group})
            if recipe is False:
                continue
            parts = mx.quantize(plain[name], recipe["group_size"], recipe["bits"])
            plain |= dict(zip((name, f"{module}.scales", f"{module}.biases"), parts, strict=True))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), plain, metadata={"format": "mlx"})
    return folder


def stacked(weights: Weights) -> Weights:
    """The same with each layer's experts in one tensor, as MLX has them."""
    out: Weights = {}
    experts: dict[str, list[Array]] = {}
    for name, value in weights.items():
        layer, separator, rest = name.partition(".mlp.experts.")
        if separator:
            experts.setdefault(f"{layer}.mlp.switch_mlp.{rest.partition('.')[2]}", []).append(value)
        else:
            out[name] = value
    return out | {name: np.stack(parts) for name, parts in experts.items()}


def _write(folder: Path, config: dict[str, Any], tensors: Weights, metadata: dict[str, str]) -> Path:
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, value in tensors.items():
        header[name] = {"dtype": _TYPES[value.dtype.name], "shape": list(value.shape), "data_offsets": [offset, offset + value.nbytes]}
        offset += value.nbytes
    raw = json.dumps(header).encode()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for value in tensors.values():
            file.write(np.ascontiguousarray(value).tobytes())
    return folder

"""A config.json, read as what a stranger claims: every field that is used has its type and range checked, the rest is ignored.

Field names and defaults: transformers' Qwen2Config and Qwen2MoeConfig (4.x `rope_theta` and `rope_scaling`, 5.x `rope_parameters`),
the `quantization` block of mlx-lm, and the `quantization_config` of AutoGPTQ and AutoAWQ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qwen2_local.errors import BadFile, UnsupportedModel
from qwen2_local.formats.strict_json import read_object

MAX_CONFIG = 4_000_000
"""Bytes of config.json that are read at most (MLX's per-layer recipes make it large)."""

_ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM"}
_YARN_USUAL = {"attention_factor": None, "beta_fast": 32, "beta_slow": 1, "mscale": None, "mscale_all_dim": None, "truncate": True}
"""Values that YaRN has in every Qwen2; the backends compute no others."""
_PACKED_BITS = {"gptq": (4, 8), "awq": (4,)}
_PACKED_USUAL: dict[str, dict[str, object]] = {
    "gptq": {"sym": True, "checkpoint_format": "gptq", "is_marlin_format": False, "dynamic": {}},
    "awq": {"version": "gemm", "zero_point": True},
}
"""Settings of `quantization_config` that decide what the tensors mean, and the values that Qwen2's own have. The others do not."""
_MLX_MODES = {"affine": (64, 4), "mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}


@dataclass(frozen=True, slots=True)
class Yarn:
    """RoPE stretched by YaRN: `factor` times the `original` context, in tokens."""

    factor: float
    original: int


@dataclass(frozen=True, slots=True)
class Moe:
    """The mixture of experts of qwen2_moe. Sizes are rows of gate and up."""

    experts: int
    experts_per_token: int
    expert_size: int
    shared_size: int
    normalize: bool


@dataclass(frozen=True, slots=True)
class MlxQuantization:
    """MLX quantization of one matrix: `bits` a weight, scales for each `group` of a row; `mode` as mlx calls it ("affine", "mxfp4" …)."""

    bits: int
    group: int
    mode: str = "affine"


@dataclass(frozen=True, slots=True)
class PackedQuantization:
    """How GPTQ or AWQ keeps the matrices that it has quantized: `bits` a weight, a scale and a zero for each `group` of a row.

    ordered: is each group known to hold neighbouring columns (no act-order)? If not, the tensors g_idx tell.
    """

    method: Literal["gptq", "awq"]
    bits: int
    group: int
    ordered: bool = True

    def __str__(self) -> str:
        """For people: "GPTQ, 4-bit, groups of 128"."""
        return f"{self.method.upper()}, {self.bits}-bit, groups of {self.group}"


@dataclass(frozen=True, slots=True)
class Qwen2Config:
    """The shape of a Qwen2. `context`: tokens it was made for, YaRN included. `eos`: ids that end a reply, from config.json.

    quantization: MLX's default for all matrices, None where nothing is quantized; quantized: exceptions by the matrix's path, None = plain.
    packed: that of GPTQ or AWQ, for those matrices whose tensors say so.
    """

    model_type: str
    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    context: int
    rms_eps: float
    rope_theta: float
    tied: bool
    dtype: str
    eos: tuple[int, ...] = ()
    yarn: Yarn | None = None
    moe: Moe | None = None
    quantization: MlxQuantization | None = None
    quantized: Mapping[str, MlxQuantization | None] = field(default_factory=dict)
    packed: PackedQuantization | None = None

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.hidden // self.heads

    @property
    def kv_values_per_token(self) -> int:
        """Numbers that the KV cache holds for a token of one sequence: keys and values of all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim


def read_config(path: Path) -> Qwen2Config:
    """Reads and checks the config.json at `path`. Raises BadFile that names the field, UnsupportedModel for what is no Qwen2."""
    return parse_config(read_object(path, MAX_CONFIG), path)


def parse_config(raw: Mapping[str, Any], path: Path) -> Qwen2Config:
    """Like `read_config`, of a parsed config; `path` is for the messages."""
    fields = _Fields(raw, path)
    model_type = fields.text("model_type")
    if model_type not in _ARCHITECTURES:
        raise _unsupported(path, f"is of the model type {model_type[:60]!r}", "Only qwen2 and qwen2_moe are run here.")
    _refuse_foreign(fields, model_type)
    hidden = fields.count("hidden_size", 1 << 16)
    heads = fields.count("num_attention_heads", 1 << 10)
    kv_heads = fields.count("num_key_value_heads", 1 << 10, default=heads)
    if hidden % heads or hidden // heads % 2:
        raise fields.bad("num_attention_heads", f"{heads} heads do not divide hidden_size {hidden} into even parts")
    if heads % kv_heads:
        raise fields.bad("num_key_value_heads", f"{kv_heads} does not divide num_attention_heads {heads}")
    if fields.count("head_dim", 1 << 16, default=hidden // heads) != hidden // heads:
        raise _unsupported(path, "has a head_dim that is not hidden_size / num_attention_heads", "No Qwen2 has that.")
    layers = fields.count("num_hidden_layers", 1 << 10)
    declared = fields.count("max_position_embeddings", 1 << 24, default=32768)
    theta, yarn = _rope(fields, declared)
    packed = _packed(fields)
    quantization, quantized = _quantization(fields) if packed is None else (None, {})
    return Qwen2Config(
        model_type=model_type,
        vocabulary=fields.count("vocab_size", 1 << 20),
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        intermediate=fields.count("intermediate_size", 1 << 20),
        context=max(declared, round(yarn.factor * yarn.original)) if yarn else declared,
        rms_eps=fields.number("rms_norm_eps", 1e-12, 1e-2),
        rope_theta=theta,
        tied=fields.flag("tie_word_embeddings", default=False),
        dtype=fields.text("dtype", default=fields.text("torch_dtype", default="bfloat16")),
        eos=_ids(fields, "eos_token_id"),
        yarn=yarn,
        moe=_moe(fields, layers) if model_type == "qwen2_moe" else None,
        quantization=quantization,
        quantized=quantized,
        packed=packed,
    )


def _refuse_foreign(fields: _Fields, model_type: str) -> None:
    path = fields.path
    for name in ("model_file", "auto_map"):
        if fields.raw.get(name) is not None:
            raise _unsupported(path, f"asks to run code of its own ({name})", "That is never done. Look for the plain Qwen2 checkpoint.")
    architectures = fields.raw.get("architectures")
    if architectures is not None and architectures != [_ARCHITECTURES[model_type]]:
        raise _unsupported(path, f"has the architectures {str(architectures)[:100]}", f"Only {_ARCHITECTURES[model_type]} is run here.")
    if fields.text("hidden_act", default="silu") != "silu":
        raise _unsupported(path, "has another activation than silu (hidden_act)", "No Qwen2 has that.")
    if fields.flag("use_sliding_window", default=False):
        raise _unsupported(path, "uses a sliding window (use_sliding_window)", "No published Qwen2 does.")


def _rope(fields: _Fields, declared: int) -> tuple[float, Yarn | None]:
    modern = fields.table("rope_parameters")
    legacy = fields.table("rope_scaling")
    scaling, where = (modern, "rope_parameters") if modern is not None else (legacy, "rope_scaling")
    if modern is not None and "rope_theta" in modern.raw:
        theta = modern.number("rope_theta", 1.0, 1e12)
    else:
        theta = fields.number("rope_theta", 1.0, 1e12)
    if scaling is None:
        return theta, None
    kind = scaling.text("rope_type", default=scaling.text("type", default="default"))
    if kind == "default":
        return theta, None
    if kind != "yarn":
        raise _unsupported(fields.path, f"has the RoPE scaling {kind[:40]!r} ({where})", "Only YaRN is known for Qwen2.")
    for name, usual in _YARN_USUAL.items():
        if scaling.raw.get(name) not in (None, usual):
            raise _unsupported(fields.path, f"has the unusual YaRN setting {where}.{name}", "Leave it out, or set Qwen2's own values.")
    factor = scaling.number("factor", 1.0, 1000.0)
    return theta, Yarn(factor, scaling.count("original_max_position_embeddings", 1 << 24, default=declared))


def _moe(fields: _Fields, layers: int) -> Moe:
    if fields.count("decoder_sparse_step", 1 << 10, default=1) != 1 or fields.raw.get("mlp_only_layers") not in (None, []):
        raise _unsupported(fields.path, "has layers without experts (decoder_sparse_step, mlp_only_layers)", "No published Qwen2 has.")
    experts = fields.count("num_experts", 1 << 10)
    return Moe(
        experts=experts,
        experts_per_token=fields.count("num_experts_per_tok", experts),
        expert_size=fields.count("moe_intermediate_size", 1 << 20),
        shared_size=fields.count("shared_expert_intermediate_size", 1 << 20),
        normalize=fields.flag("norm_topk_prob", default=False),
    )


def _packed(fields: _Fields) -> PackedQuantization | None:
    block = fields.table("quantization_config")
    if block is None or "quant_method" not in block.raw:
        return None
    method = block.text("quant_method")
    hint = "Take the plain checkpoint, a GGUF file or an MLX folder of the same model."
    if method not in ("gptq", "awq") or fields.raw.get("quantization") is not None:
        raise _unsupported(fields.path, f"is quantized by {method[:40]}", hint)
    for name, usual in _PACKED_USUAL[method].items():
        value = block.raw.get(name)
        if (value.lower() if isinstance(value, str) else value) not in (None, usual):
            raise _unsupported(fields.path, f"is quantized by {method} in a way that is not known here ({name}: {str(value)[:40]})", hint)
    bits = block.count("bits", 8)
    if bits not in _PACKED_BITS[method]:
        raise _unsupported(fields.path, f"is quantized by {method} to {bits} bits", hint)
    if block.raw.get("group_size") == -1 or (group := block.count("group_size", 1 << 16)) % 32:
        raise _unsupported(fields.path, f"is quantized by {method} in groups that are no multiple of 32 (group_size)", hint)
    return PackedQuantization("gptq" if method == "gptq" else "awq", bits, group, not block.flag("desc_act", default=False))


def _quantization(fields: _Fields) -> tuple[MlxQuantization | None, dict[str, MlxQuantization | None]]:
    block = fields.table("quantization")
    if block is None:
        block = fields.table("quantization_config")
    if block is None:
        return None, {}
    default = _mlx(block)
    exceptions: dict[str, MlxQuantization | None] = {}
    for name, value in block.raw.items():
        if isinstance(value, dict):
            exceptions[name] = _mlx(_Fields(value, fields.path, f"{block.prefix}{name}."))
        elif value is False:
            exceptions[name] = None
        elif value is True:
            exceptions[name] = default
    return default, exceptions


def _mlx(block: _Fields) -> MlxQuantization:
    mode = block.text("mode", default="affine")
    if mode not in _MLX_MODES:
        raise block.bad("mode", f"{mode[:40]!r} is unknown")
    group, bits = _MLX_MODES[mode]
    # mlx_lm.convert writes `group_size: null` for its mixed recipes.
    group = block.count("group_size", 1 << 10, default=group)
    bits = block.count("bits", 8, default=bits)
    known = group in (32, 64, 128) and bits in (2, 3, 4, 5, 6, 8) if mode == "affine" else (group, bits) == _MLX_MODES[mode]
    if not known:
        raise block.bad("bits", f"{bits} bits in groups of {group} do not exist in mode {mode}")
    return MlxQuantization(bits, group, mode)


def _ids(fields: _Fields, name: str) -> tuple[int, ...]:
    value = fields.raw.get(name)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if len(ids) > 64 or not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 1 << 20 for i in ids):
        raise fields.bad(name, f"{str(value)[:80]} is no token id or list of them")
    return tuple(ids)


@dataclass(frozen=True, slots=True)
class _Fields:
    """A JSON object whose fields are asked for by name, type and range. null is as good as absent."""

    raw: Mapping[str, Any]
    path: Path
    prefix: str = ""

    def count(self, name: str, most: int, *, default: int | None = None) -> int:
        value = self._get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise self.bad(name, f"{str(value)[:60]} is no whole number from 1 to {most}")
        return value

    def number(self, name: str, least: float, most: float) -> float:
        value = self._get(name, None)
        # An integer of a thousand digits is too large for isfinite.
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not least <= value <= most or not math.isfinite(value):
            raise self.bad(name, f"{str(value)[:60]} is no number from {least:g} to {most:g}")
        return float(value)

    def flag(self, name: str, *, default: bool) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self.bad(name, f"{str(value)[:60]} is neither true nor false")
        return value

    def text(self, name: str, *, default: str | None = None) -> str:
        value = self._get(name, default)
        if not isinstance(value, str):
            raise self.bad(name, f"{str(value)[:60]} is no text")
        return value

    def table(self, name: str) -> _Fields | None:
        value = self.raw.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.bad(name, f"{str(value)[:60]} is no table")
        return _Fields(value, self.path, f"{self.prefix}{name}.")

    def bad(self, name: str, fault: str) -> BadFile:
        return BadFile(f"{self.path}: {self.prefix}{name}: {fault}.", hint="Fetch the model again from its original source.")

    def _get(self, name: str, default: object) -> object:
        value = self.raw.get(name)
        if value is not None:
            return value
        if default is None:
            raise self.bad(name, "it is missing")
        return default


def _unsupported(path: Path, fault: str, hint: str) -> UnsupportedModel:
    return UnsupportedModel(f"{path} {fault}.", hint=hint)

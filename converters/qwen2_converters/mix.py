"""Which ggml type each tensor of a GGUF file gets: what llama.cpp's own quantizer decides, written as tables.

Its `tensor_allows_quantization`, `llama_tensor_get_type_impl` and `tensor_type_fallback` (src/llama-quant.cpp of ggml 0.25), for the types that
`Target` knows. tests/parity/test_gguf_types.py holds all of it against the library.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from qwen2_local.formats.config import Qwen2Config
from qwen2_local.formats.ggml_types import BY_NAME, GgmlType

FILE_TYPES = {
    "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q2_k": 10, "q3_k_s": 11, "q3_k_m": 12, "q3_k_l": 13,
    "q4_k_s": 14, "q4_k_m": 15, "q5_k_s": 16, "q5_k_m": 17, "q6_k": 18, "iq4_nl": 25, "iq4_xs": 30, "bf16": 32,
}  # fmt: skip
"""general.file_type of a target's weights (LLAMA_FTYPE_* of llama.h)."""


@dataclass(frozen=True, slots=True)
class _Matrix:
    """What a rule looks at. grouped: 4 heads or more share a KV head. imatrix: the conversion is guided by one."""

    layer: int
    layers: int
    grouped: bool
    imatrix: bool


_When: TypeAlias = Callable[[_Matrix], bool]
_Rules: TypeAlias = dict[str, tuple[tuple[_When, str], ...]]
"""By matrix: in which case it gets which type. The first that holds counts; without one, the type is the target's own."""


def _always(_: _Matrix) -> bool:
    return True


def _first(count: int) -> _When:
    return lambda matrix: matrix.layer < count


def _first_part(parts: int) -> _When:
    return lambda matrix: matrix.layer < matrix.layers // parts


def _more(matrix: _Matrix) -> bool:
    """The first and the last eighth of the layers, and every third between them."""
    eighth = matrix.layers // 8
    return matrix.layer < eighth or matrix.layer >= 7 * matrix.layers // 8 or (matrix.layer - eighth) % 3 == 2


def _grouped(matrix: _Matrix) -> bool:
    return matrix.grouped


def _early_guided(matrix: _Matrix) -> bool:
    return matrix.imatrix and matrix.layer < matrix.layers // 8


def _early_unguided(matrix: _Matrix) -> bool:
    return not matrix.imatrix and matrix.layer < matrix.layers // 8


_MORE_Q6: _Rules = {"attn_v": ((_more, "Q6_K"),), "ffn_down": ((_more, "Q6_K"),)}
_IQ4: _Rules = {"attn_v": ((_grouped, "Q5_K"),), "ffn_down": ((_early_unguided, "Q5_K"),)}

_RULES: dict[str, _Rules] = {
    "q2_k": {"attn_v": ((_grouped, "Q4_K"), (_always, "Q3_K")), "ffn_down": ((_always, "Q3_K"),), "attn_output": ((_always, "Q3_K"),)},
    "q3_k_m": {
        "attn_v": ((_first(2), "Q5_K"), (_always, "Q4_K")),
        "ffn_down": ((_first_part(16), "Q5_K"), (_always, "Q4_K")),
        "attn_output": ((_always, "Q4_K"),),
    },
    "q3_k_l": {"attn_v": ((_always, "Q5_K"),), "ffn_down": ((_always, "Q5_K"),), "attn_output": ((_always, "Q5_K"),)},
    "q4_0": {"ffn_down": ((_early_guided, "Q4_1"),)},
    "q5_0": {"ffn_down": ((_early_guided, "Q5_1"),)},
    "q4_k_s": {"attn_v": ((_first(4), "Q5_K"),), "ffn_down": ((_first_part(8), "Q5_K"),)},
    "q4_k_m": _MORE_Q6,
    "q5_k_m": _MORE_Q6,
    "iq4_nl": _IQ4,
    "iq4_xs": _IQ4,
}

_BETTER_OUTPUT = ("q2_k", "q3_k_s", "q3_k_m", "q4_k_s", "q4_k_m", "iq4_nl", "iq4_xs")
"""Targets that give attn_output of a mixture of 8 experts Q5_K."""

_FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL"}
"""From blocks of 256 weights to blocks of 32, for rows that are not whole blocks of 256."""

_NAME = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<matrix>\w+?)(?P<expert>_exps|_shexp)?\.(?:weight|bias)")


def tensor_type(name: str, shape: tuple[int, ...], weights: str, config: Qwen2Config, *, imatrix: bool) -> GgmlType:
    """The type of the GGUF tensor `name`.

    shape: rows last but one, columns last. weights: of the target ("q4_k_m"). imatrix: whether it is quantized with one.
    """
    match = _NAME.fullmatch(name)
    assert match
    if math.prod(shape[:-1]) == 1 or match["matrix"] == "ffn_gate_inp":
        return BY_NAME["F32"]
    kind = BY_NAME[_base(weights)]
    if kind.block == 1:
        return kind
    if match["layer"] is None:
        # llama.cpp's qwen2moe has no tied head: its files hold the matrix twice.
        head = match["matrix"] == "output" or (config.tied and config.moe is None)
        return _fitting(_head(kind, shape[-1]) if head else kind, shape[-1])
    experts = config.moe.experts if config.moe else 0
    layer = int(match["layer"])
    if experts == 1 and match["matrix"] == "ffn_down":
        # Where there is but one expert, llama.cpp counts matrices, not layers; the shared expert's is the second of each.
        layer = 2 * layer + (match["expert"] == "_shexp")
    matrix = _Matrix(layer, config.layers, config.heads // config.kv_heads >= 4, imatrix)
    chosen = _of_eight(match["matrix"], weights) if experts == 8 else None
    return _fitting(chosen or _by_rule(match["matrix"], matrix, weights, kind, config), shape[-1])


def _base(weights: str) -> str:
    """The type that gives a target its name: "q4_k_m" is Q4_K."""
    return re.sub(r"(?<=_k)_[sml]$", "", weights).upper()


def _head(kind: GgmlType, columns: int) -> GgmlType:
    """The output matrix matters more than any other."""
    return BY_NAME["Q8_0" if columns % kind.block or kind.name == "Q8_0" else "Q6_K"]


def _of_eight(matrix: str, weights: str) -> GgmlType | None:
    """In a mixture of exactly 8 experts attention is small beside them, and gets more."""
    if matrix in ("attn_v", "attn_k"):
        return BY_NAME["Q8_0"]
    if matrix == "attn_output":
        return BY_NAME["Q5_K"] if weights in _BETTER_OUTPUT else BY_NAME[_base(weights)]
    return None


def _by_rule(name: str, matrix: _Matrix, weights: str, kind: GgmlType, config: Qwen2Config) -> GgmlType:
    for when, chosen in _RULES.get(weights, {}).get(name, ()):
        if when(matrix):
            kind = BY_NAME[chosen]
            break
    # llama.cpp takes a dense model of 80 layers for a 70B, where attn_v is small beside attn_q.
    if name == "attn_v" and config.layers == 80 and config.moe is None and kind.name in ("Q3_K", "Q4_K"):
        return BY_NAME["Q5_K"]
    return kind


def _fitting(kind: GgmlType, columns: int) -> GgmlType:
    """`kind`, or what llama.cpp takes where `columns` are not whole blocks."""
    if columns % kind.block:
        kind = BY_NAME[_FALLBACK.get(kind.name, "F16")]
    return BY_NAME["F16"] if columns % kind.block else kind

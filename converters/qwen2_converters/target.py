"""What to convert to: a format and how its weights are kept, as a person types it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal, Self

from qwen2_local.errors import UsageError

GGUF = (
    "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0", "q4_k_m", "q4_k_s", "q4_1", "q4_0", "iq4_nl", "iq4_xs",
    "q3_k_l", "q3_k_m", "q3_k_s", "q2_k",
)  # fmt: skip
"""How a GGUF file can keep its weights: llama.cpp's names."""

MLX = ("f32", "bf16", "f16", "8bit", "6bit", "5bit", "4bit", "3bit", "2bit", "mixed_4_6", "mixed_3_6", "mixed_3_4", "mixed_2_6")
"""How an MLX folder can. The quantized ones also take a group size: "4bit-g32", "mixed_3_6-g128"; 64 without one."""

VALID = (*(f"gguf:{weights}" for weights in GGUF), *(f"mlx:{weights}" for weights in MLX))
"""All targets, those with a group size left out."""

_GROUPS = (32, 64, 128)
_QUANTIZED = re.compile(r"(?P<kind>([234568])bit|mixed_(?:[234]_[46]))(?:-g(?P<group>\d+))?")


@dataclass(frozen=True, slots=True)
class Target:
    """A format and its weights ("q4_k_m", "4bit", "4bit-g32")."""

    format: Literal["gguf", "mlx"]
    weights: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """From "gguf:q4_k_m", "mlx:4bit" and the like, in any case. Raises UsageError that lists the valid ones."""
        match text.strip().lower().split(":"):
            case ["gguf", weights] if weights in GGUF:
                return cls("gguf", weights)
            case ["mlx", weights] if weights in MLX:
                return cls("mlx", weights)
            case ["mlx", weights] if (match := _QUANTIZED.fullmatch(weights)) and match["kind"] in MLX and int(match["group"] or 64) in _GROUPS:
                return cls("mlx", weights.removesuffix("-g64"))
        meant = get_close_matches(text.strip().lower().replace("mlx-", "mlx:"), [*VALID, *GGUF, *MLX], n=1)
        meant = [valid for valid in VALID if meant and valid.endswith(f":{meant[0].partition(':')[2] or meant[0]}")]
        ask = f"Did you mean {' or '.join(meant)}?\n  " if meant else ""
        hint = f"{ask}The targets are: gguf: {', '.join(GGUF)}; mlx: {', '.join(MLX)}, and the quantized ones of mlx with -g32 or -g128."
        raise UsageError(f"There is no target {text[:60]!r}.", hint=hint)

    def __str__(self) -> str:
        """The text that `parse` reads."""
        return f"{self.format}:{self.weights}"

    @property
    def label(self) -> str:
        """For names of models and files: "q4_0", "mlx-4bit"."""
        return self.weights if self.format == "gguf" else f"mlx-{self.weights}"

    @property
    def bits(self) -> int | None:
        """Bits of a weight that MLX quantizes to, of a mixed recipe the fewer; None where it does not, and for GGUF."""
        match = _QUANTIZED.fullmatch(self.weights) if self.format == "mlx" else None
        return int(match["kind"].removesuffix("bit").split("_")[-1 if match[2] else 1]) if match else None

    @property
    def more_bits(self) -> int | None:
        """Of a mixed recipe, the bits of what it gives more to; None for all else."""
        match = _QUANTIZED.fullmatch(self.weights) if self.format == "mlx" else None
        return int(match["kind"][-1]) if match and not match[2] else None

    @property
    def group(self) -> int:
        """Weights that share a scale in MLX's quantization."""
        match = _QUANTIZED.fullmatch(self.weights)
        return int(match["group"] or 64) if match else 64

"""What to convert to: a format and how its weights are kept, as a person types it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

from qwen2_local.errors import UsageError

_WEIGHTS = {"gguf": ("f32", "f16", "q8_0", "q4_0"), "mlx": ("f32", "bf16", "8bit", "4bit")}

VALID = tuple(f"{form}:{weights}" for form, kinds in _WEIGHTS.items() for weights in kinds)
"""All targets."""


@dataclass(frozen=True, slots=True)
class Target:
    """A format and its weights ("q4_0", "4bit")."""

    format: Literal["gguf", "mlx"]
    weights: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """From "gguf:q4_0", "mlx:4bit" and the like, in any case. Raises UsageError that lists the valid ones."""
        match text.strip().lower().split(":"):
            case ["gguf", weights] if weights in _WEIGHTS["gguf"]:
                return cls("gguf", weights)
            case ["mlx", weights] if weights in _WEIGHTS["mlx"]:
                return cls("mlx", weights)
        raise UsageError(f"There is no target {text[:60]!r}.", hint=f"The targets are: {', '.join(VALID)}.")

    def __str__(self) -> str:
        """The text that `parse` reads."""
        return f"{self.format}:{self.weights}"

    @property
    def label(self) -> str:
        """For names of models and files: "q4_0", "mlx-4bit"."""
        return self.weights if self.format == "gguf" else f"mlx-{self.weights}"

    @property
    def bits(self) -> int | None:
        """Bits of a weight that MLX quantizes to; None where it does not, and for GGUF."""
        return int(self.weights.removesuffix("bit")) if self.weights.endswith("bit") else None

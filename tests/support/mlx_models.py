"""MLX backends for tests, loaded with what a test cares about."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen2_local.backends.base import Layout, LoadOptions

if TYPE_CHECKING:
    from qwen2_local.backends.mlx import Mlx


def load(folder: Path, *, context: int, sequences: int = 1, yarn: bool = False, **options: Any) -> Mlx:
    """`options`: fields of LoadOptions."""
    from qwen2_local.backends import mlx

    return mlx.load(folder, layout=Layout(sequences, context, yarn), options=LoadOptions(**({"identity": "test", "context": context} | options)))

"""llama.cpp behind its self-test: this is what the registry loads.

A module of its own, as the self-test needs the backend and not the other way round.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from qwen2_local.backends import selftest
from qwen2_local.backends.base import Layout, LoadOptions
from qwen2_local.backends.llamacpp import LlamaCpp


def load(path: Path, *, layout: Layout, options: LoadOptions, cancelled: Callable[[], bool] | None = None) -> LlamaCpp:
    """Load a GGUF file, in safe mode if the library failed its self-test on this machine. Raises as `LlamaCpp.load` does."""
    verdict = selftest.verdict()
    return LlamaCpp.load(path, layout=layout, options=options, safe=verdict.safe, notes=verdict.notes, cancelled=cancelled)

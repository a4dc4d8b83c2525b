"""llama.cpp behind its self-test: this is what the registry loads.

A module of its own, as the self-test needs the backend and not the other way round.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from qwen2_local.backends import selftest
from qwen2_local.backends.base import Layout, LoadOptions
from qwen2_local.backends.llamacpp import LlamaCpp

_ASKED_FOR = "llama.cpp runs in safe mode, without its fast matrix code: slower."


def load(path: Path, *, layout: Layout, options: LoadOptions, cancelled: Callable[[], bool] | None = None) -> LlamaCpp:
    """Load a GGUF file, in safe mode if that is asked for or the library failed its self-test on this machine. Raises as `LlamaCpp.load` does."""
    verdict = selftest.verdict()
    notes = verdict.notes or ((_ASKED_FOR,) if options.safe else ())
    return LlamaCpp.load(path, layout=layout, options=options, safe=verdict.safe or options.safe, notes=notes, cancelled=cancelled)

"""Run Qwen2 language models on this computer, offline and private.

The public API is what this module names; everything else is internal. Importing it loads no backend.

    from qwen2_local import Qwen2
    with Qwen2("guide") as model:
        print(model.ask("What is GGUF?"))
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

__version__ = "0.1.0"

logging.getLogger("qwen2_local").addHandler(logging.NullHandler())  # a library writes nothing by itself

if TYPE_CHECKING:
    from qwen2_local.chat import Chat
    from qwen2_local.errors import Qwen2LocalError
    from qwen2_local.model import Qwen2
    from qwen2_local.types import Completion, Message, Piece, Sampling, Score, Usage

__all__ = ["Chat", "Completion", "Message", "Piece", "Qwen2", "Qwen2LocalError", "Sampling", "Score", "Usage", "__version__"]

_TYPES = ("Completion", "Message", "Piece", "Sampling", "Score", "Usage")
_HOMES = {"Chat": "chat", "Qwen2": "model", "Qwen2LocalError": "errors"} | dict.fromkeys(_TYPES, "types")


def __dir__() -> list[str]:
    return sorted(__all__)  # what completion offers


def __getattr__(name: str) -> object:
    # Lazily, so that `qwen2-local --help` pays for none of it.
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"qwen2_local.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'qwen2_local' has no attribute {name!r}")

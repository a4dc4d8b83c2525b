"""A model loaded for a command, with its progress and its notes on stderr."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from qwen2_local.cli import output

if TYPE_CHECKING:
    from qwen2_local.model import Qwen2


@contextmanager
def opened(model: str, loads: Mapping[str, Any]) -> Iterator[Qwen2]:
    """The model, for the block. loads: arguments of `Qwen2`. Raises as it does."""
    from qwen2_local.model import Qwen2

    with output.Status() as status:
        status.show(f"loading {model}")
        loaded = Qwen2(model, report=status.bytes, **loads)
    with loaded:
        for warning in loaded.notes:
            output.note(f"note: {warning}")
        yield loaded

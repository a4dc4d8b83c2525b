"""A real model that does not stop by itself: for what happens in the middle of a reply, and for measuring."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from qwen2_local.types import Completion


class Endless:
    """`model`, whose replies have `tokens` tokens each: those that would end it are forbidden. told: called with what each came to."""

    def __init__(self, model: Any, tokens: int = 7000, told: Callable[[Completion], None] = lambda done: None) -> None:
        self._model, self._tokens, self._told = model, tokens, told
        self._never = {number: -100.0 for number in model.tokenizer.special.values()}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def write(self, prompt: Sequence[int], **options: Any) -> _Told:
        """As `Qwen2.write`."""
        wishes = {**options, "temperature": 0.0, "max_tokens": self._tokens, "logit_bias": self._never}
        return _Told(self._model.write(prompt, **wishes), self._told)


class _Told:
    """A stream that tells of its end."""

    def __init__(self, stream: Any, told: Callable[[Completion], None]) -> None:
        self._stream, self._told = stream, told

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __iter__(self) -> _Told:
        return self

    def __next__(self) -> Any:
        try:
            return next(self._stream)
        except StopIteration:
            self._told(self._stream.completion)
            raise


def load(wish: Any, report: Any) -> Any:
    """Fits `Loader`: the wished model, in a worker, without an end."""
    from qwen2_tui.model import load

    return Endless(load(wish, report))

"""A model for the command line that says what a function of its prompt says, in the place of `Qwen2`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, Self

import pytest

from qwen2_local import chatml
from qwen2_local.options import Options, settle
from qwen2_local.types import Message, Sampling
from tests.support.scripted_chat import ScriptedModel, ScriptedStream


class ScriptedQwen2(ScriptedModel):
    """answer: the prompt, control tokens left out and turns joined by "|", and the seed -> the reply."""

    def __init__(self, answer: Callable[[str, int | None], str], sampling: Sampling) -> None:
        super().__init__()
        self.answer = answer
        self.sampling = sampling
        self.info = SimpleNamespace(name="scripted", context=self.longest)
        self.notes: tuple[str, ...] = ()
        self.loads: list[tuple[str, dict[str, Any]]] = []
        self.asked: list[tuple[str, Options]] = []

    def __call__(self, name: str, *, report: object = None, **loads: Any) -> Self:
        """Load it."""
        self.name = name
        self.loads.append((name, loads))
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def respond(self, messages: Sequence[Message], **options: Any) -> ScriptedStream:
        return self._say("|".join(f"{one.role[0]}:{one.content}" for one in messages), chatml.render(self.tokenizer, messages), options)

    def complete(self, text: str, **options: Any) -> ScriptedStream:
        return self._say(text, self.tokenizer.encode(text), options)

    def _say(self, asked: str, prompt: Sequence[int], options: Any) -> ScriptedStream:
        self.asked.append((asked, options))
        reply = self.answer(asked, settle(self.sampling, **options).sampling.seed)
        return ScriptedStream(self, self.tokenizer.encode(reply), len(prompt), options)


def install(patch: pytest.MonkeyPatch, answer: Callable[[str, int | None], str], sampling: Sampling | None = None) -> ScriptedQwen2:
    """From now on, whatever is loaded is this."""
    model = ScriptedQwen2(answer, sampling or Sampling(temperature=0.5))
    patch.setattr("qwen2_local.model.Qwen2", model)
    return model

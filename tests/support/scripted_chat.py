"""A model without an engine, for tests of chats: it says what it is told to say, and writes down what it was asked."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Unpack

from qwen2_local.detokenize import TextStream
from qwen2_local.options import Options, settle
from qwen2_local.tokens import Tokenizer
from qwen2_local.types import Completion, FinishReason, Piece, Sampling, Usage
from tests.support.small_tokenizer import small_gguf


class ScriptedModel:
    """Says `says` one after the other, then "ok". A piece is a token; `before` is called before each, with its number."""

    def __init__(self, *says: str | Sequence[int], longest: int = 100_000, keys: dict[str, Any] | None = None) -> None:
        self.name = "scripted"
        self.tokenizer = Tokenizer.from_gguf(keys or small_gguf())
        self.default_system: str | None = "S"
        self.sampling = Sampling(temperature=0.5)
        self.longest = longest
        self.says = list(says)
        self.before: Callable[[int], None] = lambda number: None
        self.prompts: list[list[int]] = []
        self.options: list[Options] = []
        self.forgotten: list[str] = []

    def write(self, prompt: Sequence[int], **options: Unpack[Options]) -> ScriptedStream:
        self.prompts.append(list(prompt))
        self.options.append(options)
        says = self.says.pop(0) if self.says else "ok"
        tokens = self.tokenizer.encode(says) if isinstance(says, str) else list(says)
        return ScriptedStream(self, tokens, len(prompt), options)

    def forget(self, chunks: Iterable[str]) -> None:
        self.forgotten += chunks

    @property
    def read(self) -> str:
        """The last prompt as text, control tokens by name."""
        return "".join(self.tokenizer.token_bytes(one).decode("latin-1") or self.tokenizer.describe(one) for one in self.prompts[-1])


class ScriptedStream:
    def __init__(self, model: ScriptedModel, tokens: list[int], prompt: int, options: Options) -> None:
        self.completion: Completion | None = None
        self._model = model
        self._wish = settle(model.sampling, **options)
        self._tokens = tokens if self._wish.max_tokens is None else tokens[: self._wish.max_tokens]
        self._full = len(self._tokens) == len(tokens)
        self._prompt = prompt
        self._text = TextStream(self._wish.stop)
        self._given: list[Piece] = []
        self._cancelled = threading.Event()

    def __iter__(self) -> ScriptedStream:
        return self

    def __next__(self) -> Piece:
        if self.completion is not None:
            raise StopIteration
        number = len(self._given)
        try:
            self._model.before(number)
        except Exception:
            self._end("cancelled")
            raise
        if self._cancelled.is_set():
            self._end("cancelled")
        elif self._text.stopped or number == len(self._tokens):
            self._end("stop" if self._full or self._text.stopped else "length")
        else:
            piece = Piece(self._text.push(self._model.tokenizer.token_bytes(self._tokens[number])), self._tokens[number])
            self._given.append(piece)
            return piece
        raise StopIteration

    def cancel(self) -> None:
        self._cancelled.set()

    def close(self) -> None:
        self.cancel()
        if self.completion is None:
            self._end("cancelled")

    def finish(self) -> Completion:
        for _ in self:
            pass
        assert self.completion is not None
        return self.completion

    def _end(self, reason: FinishReason) -> None:
        text = "".join(piece.text for piece in self._given) + self._text.finish()
        tokens = tuple(piece.token for piece in self._given)
        usage = Usage(self._prompt, 0, len(tokens), 0.1, 0.2)
        self.completion = Completion(text, reason, usage, tokens, chunks=(f"chunk-{len(self._model.prompts)}", "common"))

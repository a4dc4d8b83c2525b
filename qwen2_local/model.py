"""The public API: a Qwen2 model that answers.

with Qwen2("guide") as model:
    print(model.ask("What is GGUF?"))
    for piece in model.stream("And MLX?"):
        print(piece.text, end="", flush=True)
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from qwen2_local.backends.base import BackendInfo
from qwen2_local.chatml import render
from qwen2_local.detokenize import TextStream
from qwen2_local.engine import Engine, Finished, Prefilled, Request, Token
from qwen2_local.errors import InvalidPrompt, UsageError
from qwen2_local.loading import Opened, Report, installed_or_pulled, open_model
from qwen2_local.types import Completion, FinishReason, Message, Piece, Sampling, Usage

Progress = Callable[[int, int], None]
"""Called while a prompt is read: tokens done, tokens in all."""


class Stream:
    """A reply as it comes: iterate for `Piece`s; afterwards `completion` holds the whole. Closing it early stops the work.

    `completion` is there also after an early `close`, then with the finish_reason "cancelled" and what came until then.
    """

    def __init__(self, pieces: Generator[Piece, None, Completion], partial: Callable[[], Completion]) -> None:
        self._pieces = pieces
        self._partial = partial
        self.completion: Completion | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Piece:
        try:
            return next(self._pieces)
        except StopIteration as end:
            if self.completion is None:
                # Without a value where an error, a Ctrl-C say, has ended it before.
                self.completion = end.value or self._partial()
            raise StopIteration from None

    def close(self) -> None:
        """Stop the reply; what came so far is in `completion`."""
        self._pieces.close()
        if self.completion is None:
            self.completion = self._partial()

    def finish(self) -> Completion:
        """Read the rest and give the whole reply."""
        for _ in self:
            pass
        assert self.completion is not None
        return self.completion


@dataclass
class _Tally:
    """A reply under way."""

    prompt: int
    cached: int = 0
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    reason: FinishReason = "cancelled"
    began: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0

    def add(self, token: int, text: str) -> Piece:
        """One more token. The times hold for a reply that its reader stops; the engine tells the times of others."""
        since = time.perf_counter() - self.began
        if self.tokens:
            self.decode_s = since - self.prefill_s
        else:
            self.prefill_s = since
        self.tokens.append(token)
        self.text += text
        return Piece(text, token)

    def completion(self) -> Completion:
        usage = Usage(self.prompt, self.cached, len(self.tokens), self.prefill_s, self.decode_s)
        return Completion(self.text, self.reason, usage, tuple(self.tokens))


class Qwen2:
    """A loaded model. Use it in a `with` block, or call `close`, to give its memory back. Safe to share between threads."""

    def __init__(
        self,
        name: str = "guide",
        *,
        backend: str | None = None,
        context: int | None = None,
        report: Report | None = None,
        pull: bool = False,
    ) -> None:
        """Load a model by name ("guide", "0.5b:q4_0") or path (a GGUF file, an MLX folder, a Hugging Face folder).

        backend: "mlx" or "llama.cpp"; by default what fits the machine and the file. context: tokens of prompt and reply
        together; by default 8,192, or what the model has if that is less. report: told of the progress of a conversion, on the first use of
        a Hugging Face folder, and of a fetch. pull: fetch and install a model that is not here; without it, no network is touched.
        Raises UnknownModel, BadFile, BackendUnavailable, DoesNotFit; with `pull` also FetchFailed, and UsageError for a licence to accept.
        """
        if pull:
            name = installed_or_pulled(name, backend=backend, report=report)
        self._opened: Opened = open_model(name, backend=backend, context=context, report=report)
        self._engine = Engine(self._opened.load)
        # Also when it is forgotten, or the program ends: native code must not be at work while the interpreter goes down.
        weakref.finalize(self, self._engine.close)

    @property
    def info(self) -> BackendInfo:
        """What was loaded, and by which backend."""
        return self._engine.info

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences that a user should see once: why it is slow, or nothing can be kept."""
        return self._opened.notes + self.info.notes

    @property
    def sampling(self) -> Sampling:
        """The model's own sampling (its generation_config)."""
        return self._opened.sampling

    def ask(self, question: str, *, system: str | None = None, sampling: Sampling | None = None, max_tokens: int | None = None) -> str:
        """The reply to one question, as text. For its usage and timings, see `respond`."""
        return self.respond(_turns(question, system), sampling=sampling, max_tokens=max_tokens).finish().text

    def stream(self, question: str, *, system: str | None = None, sampling: Sampling | None = None, max_tokens: int | None = None) -> Stream:
        """The reply to one question, piece by piece."""
        return self.respond(_turns(question, system), sampling=sampling, max_tokens=max_tokens)

    def respond(
        self, messages: Sequence[Message], *, sampling: Sampling | None = None, max_tokens: int | None = None, progress: Progress | None = None
    ) -> Stream:
        """The next reply of a conversation, in ChatML; the model's own system message is put first where there is none.

        A conversation that goes on from the last one computes only what is new.
        """
        prompt = render(self._opened.tokenizer, messages, default_system=self._opened.default_system)
        return self._generate(prompt, self._opened.stops, sampling, max_tokens, progress)

    def complete(self, text: str, *, sampling: Sampling | None = None, max_tokens: int | None = None, progress: Progress | None = None) -> Stream:
        """Plain continuation of `text`, without a chat template: for base models. Iterate it, or call `finish`."""
        if not text:
            raise InvalidPrompt("There is nothing to continue: the text is empty.", hint="Give some text.")
        prompt = [*self._opened.bos, *self._opened.tokenizer.encode(text)]
        return self._generate(prompt, self._opened.stops, sampling, max_tokens, progress)

    def close(self) -> None:
        """Free the model; replies under way end as cancelled. Idempotent."""
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _generate(
        self, prompt: Sequence[int], stops: frozenset[int], sampling: Sampling | None, max_tokens: int | None, progress: Progress | None
    ) -> Stream:
        if max_tokens is not None and (type(max_tokens) is not int or max_tokens < 1):
            hint = "Leave it out for as much as the context holds."
            raise UsageError(f"max_tokens is {max_tokens!r}, but has to be a whole number, at least 1.", hint=hint)
        tokenizer = self._opened.tokenizer
        request = Request(tuple(prompt), sampling or self.sampling, stops, min(tokenizer.size, self.info.vocabulary), max_tokens)
        tally = _Tally(len(prompt))
        return Stream(self._pieces(request, tally, progress), tally.completion)

    def _pieces(self, request: Request, tally: _Tally, progress: Progress | None) -> Generator[Piece, None, Completion]:
        text = TextStream()
        tally.began = time.perf_counter()
        with closing(self._engine.generate(request)) as events:
            for event in events:
                match event:
                    case Token(token):
                        yield tally.add(token, text.push(self._opened.tokenizer.token_bytes(token)))
                    case Prefilled(done, total, cached):
                        tally.cached = cached
                        if progress is not None:
                            progress(done, total)
                    case Finished(reason, prefill_s, decode_s):
                        tally.reason, tally.prefill_s, tally.decode_s = reason, prefill_s, decode_s
        rest = text.finish()
        if rest:
            # Bytes of a character that never came whole.
            tally.text += rest
            yield Piece(rest, tally.tokens[-1])
        return tally.completion()


def _turns(question: str, system: str | None) -> list[Message]:
    if not question.strip():
        raise InvalidPrompt("The question is empty.", hint="Give some text.")
    return ([Message("system", system)] if system is not None else []) + [Message("user", question)]

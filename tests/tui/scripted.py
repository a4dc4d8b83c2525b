"""A model without an engine, for tests of the app: it says what it is told to say, as fast as it is told, and dies on command.

Its tokenizer is the guide's and its streams are the real `Stream`, so ids, texts and usage are what a real model gives.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Unpack

import qwen2_local
from qwen2_local import chatml
from qwen2_local.backends.base import BackendInfo
from qwen2_local.engine import Finished, Prefilled, Token
from qwen2_local.errors import ContextOverflow, WorkerDied
from qwen2_local.options import Options, Settled, settle
from qwen2_local.stream import Stream
from qwen2_local.tokens import Tokenizer
from qwen2_local.types import FinishReason, Message, Sampling, Score

GUIDE = Path(qwen2_local.__file__).parent / "guide"


@cache
def guide_tokenizer() -> Tokenizer:
    """The guide's own, read once."""
    return Tokenizer.from_json(GUIDE / "tokenizer.json")


@dataclass(frozen=True, slots=True)
class Say:
    """One reply, or how it fails.

    per_s: tokens a second; 0: as fast as they are read. reads: in so many slices the prompt is read, each taking `slice_s`.
    hold_reading, hold: before the first slice, or before token number `hold`, wait for `ScriptedModel.go` (or a cancel).
    error: raised before token number `after`. refuse: raised where the reply is asked for, before there is a stream.
    """

    text: str | Sequence[int] = "ok"
    per_s: float = 0
    reads: int = 1
    slice_s: float = 0
    hold_reading: bool = False
    hold: int | None = None
    error: Exception | None = None
    after: int = 0
    refuse: Exception | None = None


def dies(text: str, after: int, words: str = "The worker was killed by signal 9.") -> Say:
    """A reply whose worker dies before token number `after`."""
    return Say(text, error=WorkerDied(words, hint="The next request starts another."), after=after)


class ScriptedModel:
    """Fits `qwen2_tui.model.Model`. Says `says` one after the other, then `always`; each may be a text, a `Say`, or made from the prompt's text.

    prompts, options: what it was asked. known_ids: what its KV cache holds: every prompt with its reply.
    """

    def __init__(
        self,
        *says: str | Say | Callable[[str], str | Say],
        always: str | Say | Callable[[str], str | Say] = "ok",
        name: str = "guide",
        longest: int = 8192,
        backend: str = "scripted",
        notes: tuple[str, ...] = (),
        pid: int | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self.name = name
        self.tokenizer = tokenizer or guide_tokenizer()
        self.info = BackendInfo(backend, "1", "qwen2", longest, self.tokenizer.size, 4, 1024, notes=notes)
        self.notes = notes
        self.default_system: str | None = "You are a helpful assistant."
        self.sampling = Sampling()
        self.longest = longest
        self.pid = pid
        self.says = list(says)
        self.always = always
        self.go = threading.Semaphore(0)
        """Released once for each reply that is held."""
        self.before: Callable[[int], None] = lambda number: None
        """Called before each token, with its number."""
        self.prompts: list[list[int]] = []
        self.options: list[Options] = []
        self.forgotten: list[str] = []
        self.known_ids: list[tuple[int, ...]] = []
        self.closed = False
        self._died: Exception | None = None
        self._under_way: list[_Events] = []

    # What an app asks of it

    def write(self, prompt: Sequence[int], **options: Unpack[Options]) -> Stream:
        """The next of `says`."""
        wish = settle(self.sampling, **options)
        if len(prompt) >= self.longest:
            raise ContextOverflow(f"The prompt has {len(prompt):,} tokens, but the context holds {self.longest:,} with the reply.")
        self.prompts.append(list(prompt))
        self.options.append(options)
        say = self.says.pop(0) if self.says else self.always
        say = say(self.tokenizer.decode(prompt)) if callable(say) else say
        say = Say(say) if isinstance(say, str) else say
        if say.refuse is not None:
            raise say.refuse
        self._died = None  # a worker that died is started again by the next request
        events = _Events(self, say, prompt, wish)
        self._under_way.append(events)
        return Stream(events, self.tokenizer.token_bytes, len(prompt), wish.stop, wish.progress, self)  # type: ignore[arg-type]

    def respond(self, messages: Sequence[Message], **options: Unpack[Options]) -> Stream:
        """In ChatML."""
        return self.write(chatml.render(self.tokenizer, messages, default_system=self.default_system), **options)

    def known(self, prompt: Sequence[int]) -> int:
        """The longest beginning that some earlier prompt or reply has, too."""
        return max((_common(prompt, ids) for ids in self.known_ids), default=0)

    def score_ids(self, tokens: Sequence[int], first: int) -> Score:
        """Each is as likely as its number is small."""
        rest = tuple(tokens[first:])
        return Score(rest, tuple(-0.01 - token / 4000 for token in rest), greedy=True)

    def forget(self, chunks: Iterable[str]) -> None:
        self.forgotten += chunks

    def close(self) -> None:
        """Replies under way end as cancelled."""
        self.closed = True
        for events in self._under_way:
            events.cancel()

    # What a test does to it

    def die(self, words: str = "The worker was killed by signal 9.") -> None:
        """The worker of all replies under way is gone, now."""
        self._died = WorkerDied(words, hint="The next request starts another.")
        for events in self._under_way:
            events.wake.set()

    @property
    def read(self) -> str:
        """The last prompt as text, control tokens by name."""
        return "".join(self.tokenizer.token_bytes(one).decode("latin-1") or self.tokenizer.describe(one) for one in self.prompts[-1])


class _Events:
    """What an engine's `Reply` is: an iterator of events, and `cancel` from any thread."""

    def __init__(self, model: ScriptedModel, say: Say, prompt: Sequence[int], wish: Settled) -> None:
        self._model, self._say, self._prompt, self._wish = model, say, tuple(prompt), wish
        self._cancelled = False
        self.wake = threading.Event()
        self._events = self._all()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self._events)

    def cancel(self) -> None:
        self._cancelled = True
        self.wake.set()

    def _all(self) -> Iterator[Any]:
        say, model = self._say, self._model
        tokens = model.tokenizer.encode(say.text) if isinstance(say.text, str) else list(say.text)
        room = min(self._wish.max_tokens or model.longest, model.longest - len(self._prompt))
        reason: FinishReason = "stop" if len(tokens) <= room else "length" if room == self._wish.max_tokens else "context"
        cached = model.known(self._prompt)
        began = time.perf_counter()
        if say.hold_reading:
            self._held()
        for number in range(1, say.reads + 1):
            self._pause(say.slice_s)
            if self._over():
                break
            yield Prefilled(cached + (len(self._prompt) - cached) * number // say.reads, len(self._prompt), cached)
        first = time.perf_counter()
        written: list[int] = []
        for number, token in enumerate(tokens[:room]):
            model.before(number)
            if number == say.hold:
                self._held()
            if say.per_s:
                self._pause(first + number / say.per_s - time.perf_counter())
            if say.error is not None and number == say.after:
                raise say.error
            if self._over():
                break
            written.append(token)
            yield self._token(token)
        if say.error is not None and say.after >= len(written) and not self._cancelled:
            raise say.error
        model.known_ids.append((*self._prompt, *written))
        model._under_way.remove(self)
        chunks = (f"chunk-{len(model.known_ids)}", "common")
        now = time.perf_counter()
        yield Finished("cancelled" if self._cancelled else reason, first - began, now - first, chunks=chunks)

    def _token(self, token: int) -> Token:
        """With its probabilities, where they are wanted: itself first, then its neighbours by number."""
        if self._wish.logprobs is None:
            return Token(token)
        top = tuple((token + other, -0.1 - other) for other in range(self._wish.logprobs))
        return Token(token, -0.1, top)

    def _over(self) -> bool:
        """Raises where the worker is dead."""
        if self._model._died is not None:
            raise self._model._died
        return self._cancelled

    def _held(self) -> None:
        while not self._cancelled and self._model._died is None and not self._model.go.acquire(timeout=0.005):
            pass

    def _pause(self, seconds: float) -> None:
        if seconds > 0 and not self._cancelled:
            self.wake.wait(seconds)


class ScriptedLoader:
    """Fits `qwen2_tui.model.Loader`: gives `model` for every wish, or that of `models` with the wish's name.

    fails: raised by the first loads, one each. reports: told before. hold: wait for `go` before the end.
    """

    def __init__(
        self,
        model: ScriptedModel | None = None,
        *,
        models: dict[str, ScriptedModel] | None = None,
        fails: Sequence[Exception] = (),
        reports: Sequence[tuple[str, int, int]] = (),
        hold: bool = False,
    ) -> None:
        self.model = model or ScriptedModel()
        self.models = models or {}
        self.fails = list(fails)
        self.reports = list(reports)
        self.hold = hold
        self.go = threading.Semaphore(0)
        self.wishes: list[Any] = []

    def __call__(self, wish: Any, report: Callable[[str, int, int], None]) -> ScriptedModel:
        self.wishes.append(wish)
        for step in self.reports:
            report(*step)
        if self.hold:
            assert self.go.acquire(timeout=20), "no test let the model be loaded"
        if self.fails:
            raise self.fails.pop(0)
        model = self.models.get(wish.name, self.model)
        model.closed = False
        return model


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    length = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        length += 1
    return length

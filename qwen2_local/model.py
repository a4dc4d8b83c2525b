"""The public API: a Qwen2 model that answers.

with Qwen2("guide") as model:
    print(model.ask("What is GGUF?"))
    for piece in model.stream("And MLX?"):
        print(piece.text, end="", flush=True)

Every method that waits has an async twin, named with an `a` in front.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar, Unpack, overload

from qwen2_local.backends.base import BackendInfo, Scores
from qwen2_local.chatml import render
from qwen2_local.engine import Reply, Request
from qwen2_local.errors import InvalidPrompt, UsageError
from qwen2_local.loading import Opened, Report, installed_or_pulled, open_model
from qwen2_local.options import Options, Progress, Settled, Wishes, settle
from qwen2_local.stream import Stream
from qwen2_local.tokens import Tokenizer
from qwen2_local.types import Completion, Message, Sampling, Score

if TYPE_CHECKING:
    from qwen2_local.aio import AsyncStream
    from qwen2_local.chat import Chat
    from qwen2_local.grammar import Grammar, Spec

__all__ = ["Progress", "Qwen2", "Stream"]

T = TypeVar("T")
_KEPT_GRAMMARS = 16


class _Engine(Protocol):
    """The engine in this process, or in a worker."""

    @property
    def info(self) -> BackendInfo: ...

    def submit(self, request: Request) -> Reply: ...

    def score(self, tokens: Sequence[int], limit: int, first: int) -> Scores: ...

    def known(self, prompt: Sequence[int]) -> int: ...

    def forget(self, chunks: Iterable[str]) -> None: ...

    def close(self) -> None: ...


class Qwen2:
    """A loaded model. Use it in a `with` block, or call `close`, to give its memory back. Safe to share between threads."""

    def __init__(
        self,
        name: str | Path = "guide",
        *,
        backend: str | None = None,
        context: int | None = None,
        draft: str | Path | None = None,
        adapter: str | Path | None = None,
        kv_bits: int = 16,
        kv_cache: bool = True,
        parallel: int = 8,
        worker: bool = False,
        idle_s: float | None = None,
        force: bool = False,
        safe: bool = False,
        report: Report | None = None,
        pull: bool = False,
    ) -> None:
        """Load a model by name ("guide", "0.5b:q4_0") or path (a GGUF file, an MLX folder, a Hugging Face folder).

        backend: "mlx" or "llama.cpp"; by default what fits the machine and the file. context: tokens of prompt and reply together, at most;
        by default what the model and the memory allow. draft: a smaller model with the same vocabulary, whose guesses this one checks: the
        same replies, faster. adapter: a LoRA to put on it. kv_bits: keep keys and values in 16 or 8 bits. kv_cache: also on the disk.
        parallel: requests computed at once. worker: run the model in a process of its own, so that its crash is an error here; idle_s: give
        that one's memory back after so many seconds without a request. force: load it also where it will not fit. safe: let llama.cpp compute
        without its code for special processors: slower, for where that crashes. report: told of the progress of a conversion, on the first use
        of a Hugging Face folder, and of a fetch. pull: fetch and install a model that is not here; without it, no network is touched.
        Raises UnknownModel, BadFile, BackendUnavailable, DoesNotFit; with `pull` also FetchFailed, and UsageError for a licence to accept.
        """
        # Late, as they bring what only a loaded model needs.
        from qwen2_local.worker.setup import LocalEngine, Setup

        if idle_s is not None and not worker:
            raise UsageError("idle_s is for a model in a worker.", hint="Add worker=True.")
        if idle_s is not None and not idle_s > 0:
            raise UsageError(f"idle_s is {idle_s!r}, but has to be a number of seconds above 0.")
        name = _named(name)
        if pull:
            name = installed_or_pulled(name, backend=backend, report=report)
        self.name = name
        smaller = None if draft is None else open_model(_named(draft), report=report, kv_cache=False, parallel=1, safe=safe)
        opened = open_model(
            name, backend=backend, context=context, report=report, adapter=adapter, kv_bits=kv_bits, kv_cache=kv_cache, parallel=parallel,
            force=force, safe=safe, beside=smaller.memory if smaller else 0,
        )  # fmt: skip
        if smaller is not None and smaller.tokenizer.identity != opened.tokenizer.identity:
            raise UsageError(f"{draft} cannot draft for {name}: their vocabularies differ.", hint="Take a smaller model of the same family.")
        path = opened.plan.path
        setup = Setup(
            opened.plan, opened.label, smaller.plan if smaller else None, kv_cache, parallel, opened.kv_memory,
            path if path.is_file() else path / "tokenizer.json",
        )  # fmt: skip
        self._opened: Opened = opened
        self._grammars: dict[str, Grammar] = {}
        self._engine: _Engine
        self._worker_pid: Callable[[], int | None] = lambda: None
        if worker:
            from qwen2_local.worker.client import RemoteEngine

            remote = RemoteEngine(setup, idle_s=idle_s)
            self._engine, self._worker_pid = remote, lambda: remote.pid
        else:
            self._engine = LocalEngine(setup)
        # Also when it is forgotten, or the program ends: native code must not be at work while the interpreter goes down.
        weakref.finalize(self, self._engine.close)

    @property
    def info(self) -> BackendInfo:
        """What was loaded, and by which backend."""
        return self._engine.info

    @property
    def pid(self) -> int | None:
        """The process id of its worker; None without one, and while that is not running."""
        return self._worker_pid()

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences that a user should see once: why it is slow, or nothing can be kept."""
        return self._opened.notes + self.info.notes

    @property
    def sampling(self) -> Sampling:
        """The model's own sampling (its generation_config)."""
        return self._opened.sampling

    @property
    def tokenizer(self) -> Tokenizer:
        """Text to token ids and back."""
        return self._opened.tokenizer

    @property
    def default_system(self) -> str | None:
        """The system message of a conversation that brings none; None for nothing."""
        return self._opened.default_system

    @property
    def longest(self) -> int:
        """The most tokens of prompt and reply together, YaRN included."""
        return max(self.info.context, self.info.yarn_context)

    @overload
    def ask(self, question: str, *, system: str | None = None, schema: None = None, **options: Unpack[Wishes]) -> str: ...
    @overload
    def ask(self, question: str, *, system: str | None = None, schema: type[T], **options: Unpack[Wishes]) -> T: ...
    @overload
    def ask(self, question: str, *, system: str | None = None, schema: Mapping[str, Any], **options: Unpack[Wishes]) -> Any: ...
    def ask(self, question: str, *, system: str | None = None, schema: Any = None, **options: Unpack[Wishes]) -> Any:
        """The reply to one question, as text. For its usage and timings, see `respond`. options: see `options.Wishes`.

        schema: a JSON schema or a pydantic model: the reply as a checked value instead. Raises TruncatedReply where the limit came first,
        UnsupportedSchema for a schema that cannot be kept to.
        """
        completion = self.respond(_turns(question, system), schema=schema, **options).finish()
        return completion.text if schema is None else _parse(completion, schema)

    def stream(self, question: str, *, system: str | None = None, **options: Unpack[Options]) -> Stream:
        """The reply to one question, piece by piece."""
        return self.respond(_turns(question, system), **options)

    def respond(self, messages: Sequence[Message], **options: Unpack[Options]) -> Stream:
        """The next reply of a conversation, in ChatML; the model's own system message is put first where there is none.

        A conversation that goes on from an earlier one computes only what is new.
        """
        wish = settle(self.sampling, **options)
        return self._begin(render(self.tokenizer, messages, default_system=self.default_system), wish)

    def complete(self, text: str, **options: Unpack[Options]) -> Stream:
        """Plain continuation of `text`, without a chat template: for base models. Iterate it, or call `finish`."""
        wish = settle(self.sampling, **options)
        return self._begin(self._plain(text), wish)

    def write(self, prompt: Sequence[int], **options: Unpack[Options]) -> Stream:
        """The continuation of token ids."""
        return self._begin(prompt, settle(self.sampling, **options))

    def map(
        self, prompts: Iterable[str], *, concurrency: int = 8, system: str | None = None, schema: Any = None, progress: bool = True,
        **options: Unpack[Wishes],
    ) -> list[Any]:  # fmt: skip
        """The replies to many questions, in their order; so many are under way at once, computed together on the device.

        schema: as in `ask`. progress: on a terminal or in a notebook, show how far it is. Raises the first error, and stops the rest.
        """
        from qwen2_local.many import Meter, in_order

        _require_several(prompts)
        total = len(prompts) if isinstance(prompts, Sequence) else None
        meter = Meter(total, shown=progress)
        replies: list[Any] = []

        def begin(prompt: str) -> Stream:
            return self.respond(_turns(_line(prompt), system), schema=schema, **options)

        try:
            for result in in_order(begin, prompts, concurrency=concurrency):
                if isinstance(result, Exception):
                    raise result
                replies.append(result.text if schema is None else _parse(result, schema))
                meter.advance()
        finally:
            meter.close()
        return replies

    def score(self, text: str) -> Score:
        """How likely the model finds a text: the log-probability of each token but the first, and the perplexity of the whole.

        Raises InvalidPrompt for a text of a single token.
        """
        return self.score_ids(self._plain(text), 1)

    def loglikelihood(self, context: str, continuation: str) -> Score:
        """How likely `continuation` is behind `context`, as evaluations ask; only its tokens count. The two are tokenized apart."""
        before = self._plain(context)
        behind = self.tokenizer.encode(continuation)
        if not behind:
            raise InvalidPrompt("There is nothing to score: the continuation is empty.", hint="Give some text.")
        return self.score_ids([*before, *behind], len(before))

    def score_ids(self, tokens: Sequence[int], first: int) -> Score:
        """The same of token ids: how likely those from number `first` on are, each behind all before it. first: at least 1.

        Of those before it only what is not known is computed. Raises InvalidPrompt where none is left.
        """
        if not 1 <= first < len(tokens):
            what = f"the tokens from {first} on, of {len(tokens)}" if len(tokens) > 1 else "the text is a single token"
            raise InvalidPrompt(f"There is nothing to score: {what}.", hint="Give a longer text.")
        scores = self._engine.score(tokens, self._limit, first)
        return Score(tuple(tokens[first:]), tuple(map(float, scores.logprobs)), bool(scores.greedy.all()))

    def known(self, prompt: Sequence[int]) -> int:
        """How many leading tokens of a prompt would not be computed if it came now: their KV is on the device, in RAM or on the disk.

        Asking changes nothing.
        """
        return self._engine.known(prompt)

    def chat(self, system: str | None = None, **options: Any) -> Chat:
        """A conversation that remembers: see `Chat`. It is kept in memory; `save` puts it among the saved ones."""
        from qwen2_local.chat import Chat

        return Chat(self, system=system, **options)

    def forget(self, chunks: Iterable[str]) -> None:
        """Delete what the KV cache keeps under these names (`Completion.chunks`)."""
        self._engine.forget(chunks)

    def close(self) -> None:
        """Free the model; replies under way end as cancelled. Idempotent."""
        self._engine.close()

    async def aask(self, question: str, *, system: str | None = None, schema: Any = None, **options: Unpack[Wishes]) -> Any:
        """`ask`, awaited. A cancelled task stops the work."""
        completion = await self.arespond(_turns(question, system), schema=schema, **options).finish()
        return completion.text if schema is None else _parse(completion, schema)

    def astream(self, question: str, *, system: str | None = None, **options: Unpack[Options]) -> AsyncStream:
        """`stream`, for `async for`."""
        return self.arespond(_turns(question, system), **options)

    def arespond(self, messages: Sequence[Message], **options: Unpack[Options]) -> AsyncStream:
        """`respond`, for `async for`."""
        return _later(lambda: self.respond(messages, **options))

    def acomplete(self, text: str, **options: Unpack[Options]) -> AsyncStream:
        """`complete`, for `async for`."""
        return _later(lambda: self.complete(text, **options))

    async def amap(self, prompts: Iterable[str], *, concurrency: int = 8, progress: bool = True, **options: Any) -> list[Any]:
        """`map`, awaited. A cancelled task stops the work."""
        import asyncio

        from qwen2_local.many import Meter, checked

        _require_several(prompts)
        meter = Meter(len(prompts) if isinstance(prompts, Sequence) else None, shown=progress)
        numbered = enumerate(prompts)
        replies: dict[int, Any] = {}

        async def work() -> None:
            for number, prompt in numbered:
                replies[number] = await self.aask(_line(prompt), **options)
                meter.advance()

        tasks = [asyncio.create_task(work()) for _ in range(checked(concurrency))]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            meter.close()
        return [replies[number] for number in sorted(replies)]

    async def ascore(self, text: str) -> Score:
        """`score`, awaited. A cancelled task does not wait for the rest."""
        return await _threaded(lambda: self.score(text))

    async def aloglikelihood(self, context: str, continuation: str) -> Score:
        """`loglikelihood`, awaited, as `ascore`."""
        return await _threaded(lambda: self.loglikelihood(context, continuation))

    async def aclose(self) -> None:
        """`close`, awaited."""
        await _threaded(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.aclose()

    @property
    def _limit(self) -> int:
        """Ids from here on are padding of the vocabulary."""
        return min(self.tokenizer.size, self.info.vocabulary)

    def _plain(self, text: str) -> list[int]:
        if not text:
            raise InvalidPrompt("There is nothing to continue: the text is empty.", hint="Give some text.")
        return [*self._opened.bos, *self.tokenizer.encode(text)]

    def _begin(self, prompt: Sequence[int], wish: Settled) -> Stream:
        constraint = None if wish.form is None else self._grammar(wish.form).start()
        request = Request(
            tuple(prompt), wish.sampling, self._opened.stops, self._limit, wish.max_tokens, constraint, wish.logprobs, wish.lookup, wish.persist
        )
        return Stream(self._engine.submit(request), self.tokenizer.token_bytes, len(prompt), wish.stop, wish.progress, self)

    def _grammar(self, form: Spec) -> Grammar:
        from qwen2_local import grammar

        key = repr(form)  # a schema is a mapping, which has no hash
        known = self._grammars.get(key)
        if known is None:
            known = grammar.compile(form, self.tokenizer, self._limit, self._opened.stops)
            if len(self._grammars) >= _KEPT_GRAMMARS:
                self._grammars.clear()
            self._grammars[key] = known
        return known


def _named(name: str | Path) -> str:
    """A model's name as text. A `Path` is always a path, also where a model of that name is installed."""
    return str(name.expanduser().absolute()) if isinstance(name, Path) else name


def _parse(completion: Completion, schema: Any) -> Any:
    from qwen2_local import grammar

    return grammar.parse(completion.text, schema, whole=completion.finish_reason == "stop")


def _later(begin: Callable[[], Stream]) -> AsyncStream:
    from qwen2_local.aio import AsyncStream

    return AsyncStream(begin)


async def _threaded(work: Callable[[], T]) -> T:
    from qwen2_local.aio import in_thread

    return await in_thread(work)


def _require_several(prompts: Iterable[str]) -> None:
    if isinstance(prompts, str):
        raise UsageError("The questions are one text, not several.", hint="Give a list or any other iterable of texts; `ask` takes one question.")


def _line(prompt: str) -> str:
    """One of several prompts; lines of a file come with their end."""
    return prompt.removesuffix("\n") if isinstance(prompt, str) else prompt


def _turns(question: str, system: str | None) -> list[Message]:
    if not isinstance(question, str):
        raise InvalidPrompt(f"The question is a {type(question).__name__}, not a text.", hint="Give some text; `respond` takes messages.")
    if not question.strip():
        raise InvalidPrompt("The question is empty.", hint="Give some text.")
    return ([Message("system", system)] if system is not None else []) + [Message("user", question)]

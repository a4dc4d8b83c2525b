"""Engines over scripted backends, and what came of their requests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from qwen2_local.engine import Engine, Event, Finished, Prefilled, Request, Token
from qwen2_local.kvcache import KvCache
from qwen2_local.types import Sampling
from tests.support.scripted import VOCABULARY, Rule, Scripted


class Harness:
    """An engine and its backend."""

    def __init__(
        self,
        *,
        parallel: int = 8,
        kv: KvCache | None = None,
        kv_memory: int | None = None,
        draft: Callable[[], Scripted] | None = None,
        **settings: Any,
    ) -> None:
        made: list[Scripted] = []

        def load() -> Scripted:
            made.append(Scripted(**settings))
            return made[0]

        self.engine = Engine(load, kv=kv, draft=draft, parallel=parallel, kv_memory=kv_memory)
        self.backend = made[0]

    def run(self, *prompt: int, **more: Any) -> list[Event]:
        """All events of a request."""
        return list(self.engine.generate(request(*prompt, **more)))

    @contextmanager
    def held(self) -> Iterator[None]:
        """The next step that begins waits to the end of this block, so that requests made in it are there all at once after it."""
        self.backend.hold_from = len(self.backend.batches)
        yield
        self.backend.hold_from = None
        self.backend.go.release()


def request(
    *prompt: int,
    stops: Iterable[int] = (),
    max_tokens: int | None = 3,
    constraint: Any = None,
    logprobs: int | None = None,
    lookup: bool = False,
    persist: bool = True,
    **sampling: Any,
) -> Request:
    """A request with defaults for tests."""
    return Request(prompt, Sampling(**sampling), frozenset(stops), VOCABULARY, max_tokens, constraint, logprobs, lookup, persist)


def tokens(events: Iterable[Event]) -> list[int]:
    """The reply's."""
    return [event.id for event in events if isinstance(event, Token)]


def finished(events: Sequence[Event]) -> Finished:
    """Its end, which is the last event."""
    (last,) = [event for event in events if isinstance(event, Finished)]
    assert events[-1] is last
    return last


def end(events: Sequence[Event]) -> str:
    """Why it ended."""
    return finished(events).reason


def cached(events: Iterable[Event]) -> int:
    """Tokens of its prompt that were known."""
    (number,) = {event.cached for event in events if isinstance(event, Prefilled)}
    return number


def expected(prompt: Sequence[int], rule: Rule, *, stops: Iterable[int] = (), most: int) -> list[int]:
    """The reply that a scripted backend gives, by its rule alone."""
    sequence = list(prompt)
    for _ in range(most):
        token = rule(sequence) % VOCABULARY
        if token in stops:
            break
        sequence.append(token)
    return sequence[len(prompt) :]

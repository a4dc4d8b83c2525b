"""What is said over the pipe to a worker and back: plain dataclasses, sent as [name, fields]."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from qwen2_local import errors
from qwen2_local.backends.base import BackendInfo, Layout
from qwen2_local.engine import Finished, Prefilled, Token
from qwen2_local.errors import BackendError, Qwen2LocalError
from qwen2_local.types import Sampling
from qwen2_local.worker import codec, frames
from qwen2_local.worker.frames import FrameError
from qwen2_local.worker.setup import Setup

PROTOCOL = 2
"""Raise it with any change of a message."""

_MOST_TEXT = 4000


# To a worker


@dataclass(frozen=True, slots=True)
class Start:
    """The first message. version: of the program; parent: the process that the worker belongs to."""

    protocol: int
    version: str
    parent: int
    setup: Setup


@dataclass(frozen=True, slots=True)
class Generate:
    """A `Request` under a number of the parent's. constraint: what its grammar was made of (`Spec.plain`), as a text of JSON."""

    number: int
    prompt: tuple[int, ...]
    sampling: Sampling
    stops: frozenset[int]
    limit: int
    max_tokens: int | None
    constraint: str | None
    logprobs: int | None
    lookup: bool
    persist: bool


@dataclass(frozen=True, slots=True)
class Score:
    """How likely is each of these tokens from number `first` on?"""

    number: int
    tokens: tuple[int, ...]
    limit: int
    first: int


@dataclass(frozen=True, slots=True)
class Forget:
    """Delete KV by the names that `Finished` gave."""

    number: int
    chunks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Look:
    """How is the KV memory laid out?"""

    number: int


@dataclass(frozen=True, slots=True)
class Know:
    """How much of this prompt is known?"""

    number: int
    prompt: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Cancel:
    """Stop the request of this number, if it is still under way."""

    number: int


# From a worker


@dataclass(frozen=True, slots=True)
class Loaded:
    """The model is there; the first message, if not `Failed`."""

    protocol: int
    version: str
    info: BackendInfo


@dataclass(frozen=True, slots=True)
class Progress:
    """Of a request: a token, or what was read of the prompt."""

    number: int
    prefilled: Prefilled | None = None
    token: Token | None = None


@dataclass(frozen=True, slots=True)
class Ended:
    """The last message of a request that went well."""

    number: int
    finished: Finished


@dataclass(frozen=True, slots=True)
class Scored:
    """The last message of a score. logprobs, greedy: as in `Scores`."""

    number: int
    logprobs: tuple[float, ...]
    greedy: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Forgotten:
    """The KV is gone."""

    number: int


@dataclass(frozen=True, slots=True)
class Looked:
    """How the KV memory is laid out."""

    number: int
    layout: Layout


@dataclass(frozen=True, slots=True)
class Known:
    """So many of its leading tokens are."""

    number: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The last message of a request that failed, or (number 0) of a worker that cannot load. kind: the error's class."""

    number: int
    kind: str
    what: str
    hint: str

    @classmethod
    def of(cls, number: int, error: BaseException) -> Failed:
        """What `error` says; of one that is none of ours, that it happened."""
        if isinstance(error, Qwen2LocalError):
            return cls(number, type(error).__name__, error.what[:_MOST_TEXT], error.hint[:_MOST_TEXT])
        what = f"The worker process failed: {type(error).__name__}: {error}"
        return cls(number, "BackendError", what[:_MOST_TEXT], "Run `qwen2-local doctor`, and attach what it says to a bug report.")

    def error(self) -> Qwen2LocalError:
        """The error, of its own class where that is one of `errors`."""
        kind = getattr(errors, self.kind, BackendError)
        if not (isinstance(kind, type) and issubclass(kind, Qwen2LocalError)):
            kind = BackendError
        return kind(self.what, hint=self.hint)


Order = Start | Generate | Score | Forget | Look | Know | Cancel
Answer = Loaded | Progress | Ended | Scored | Forgotten | Looked | Known | Failed

_ORDERS: dict[str, type[Order]] = {kind.__name__: kind for kind in (Start, Generate, Score, Forget, Look, Know, Cancel)}
_ANSWERS: dict[str, type[Answer]] = {kind.__name__: kind for kind in (Loaded, Progress, Ended, Scored, Forgotten, Looked, Known, Failed)}


def encode(message: Order | Answer) -> bytes:
    """The frame of a message. Raises FrameError for one that is too large."""
    return frames.encode([type(message).__name__, codec.pack(message)])


def order(value: object) -> Order:
    """What a parent said. Raises FrameError."""
    name, body = _named(value, _ORDERS)
    return codec.unpack(_ORDERS[name], body)


def answer(value: object) -> Answer:
    """What a worker said. Raises FrameError."""
    name, body = _named(value, _ANSWERS)
    return codec.unpack(_ANSWERS[name], body)


def _named(value: object, known: Collection[str]) -> tuple[str, object]:
    if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and value[0] in known:
        return value[0], value[1]
    raise FrameError(f"{repr(value)[:60]} is no message that is known here")

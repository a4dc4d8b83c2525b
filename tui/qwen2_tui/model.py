"""What the app needs of a model. `Qwen2` in a worker is one; tests have a scripted one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Unpack

if TYPE_CHECKING:
    from qwen2_local.aio import Readable
    from qwen2_local.backends.base import BackendInfo
    from qwen2_local.loading import Report
    from qwen2_local.options import Options
    from qwen2_local.tokens import Tokenizer
    from qwen2_local.types import Message, Sampling, Score

DEFAULT = "guide"
"""The model that is always there."""


@dataclass(frozen=True, slots=True)
class LoadWish:
    """Which model, loaded how. The rest as in `Qwen2`; safe: without the special matrix code that has crashed."""

    name: str = DEFAULT
    backend: str | None = None
    context: int | None = None
    kv_bits: int = 16
    draft: str | None = None
    safe: bool = False
    adapter: str | None = None
    kv_cache: bool = True
    force: bool = False


class Model(Protocol):
    """A `chat.ChatModel`, and what is shown of it. `Qwen2` says what each is."""

    name: str

    @property
    def tokenizer(self) -> Tokenizer: ...  # noqa: D102
    @property
    def default_system(self) -> str | None: ...  # noqa: D102
    @property
    def sampling(self) -> Sampling: ...  # noqa: D102
    @property
    def longest(self) -> int: ...  # noqa: D102
    def write(self, prompt: Sequence[int], **options: Unpack[Options]) -> Readable: ...  # noqa: D102
    def forget(self, chunks: Iterable[str]) -> None: ...  # noqa: D102
    @property
    def info(self) -> BackendInfo: ...  # noqa: D102
    @property
    def notes(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def pid(self) -> int | None: ...  # noqa: D102
    def known(self, prompt: Sequence[int]) -> int: ...  # noqa: D102
    def score_ids(self, tokens: Sequence[int], first: int) -> Score: ...  # noqa: D102
    def respond(self, messages: Sequence[Message], **options: Unpack[Options]) -> Readable: ...  # noqa: D102
    def close(self) -> None: ...  # noqa: D102


Loader = Callable[[LoadWish, "Report"], Model]
"""Loads a model, in a thread; told of progress as in `loading`. Raises Qwen2LocalError. A report may raise, to end the work."""


def load(wish: LoadWish, report: Report) -> Model:
    """The real one: in a worker process, so that its crash is an error here."""
    from qwen2_local.model import Qwen2

    return Qwen2(
        wish.name, backend=wish.backend, context=wish.context, kv_bits=wish.kv_bits, draft=wish.draft, safe=wish.safe, adapter=wish.adapter,
        kv_cache=wish.kv_cache, force=wish.force, worker=True, report=report,
    )  # fmt: skip


def label_of(name: str) -> str:
    """The full name of the model that `name` finds; `name` itself where it finds none. Looks at the disk."""
    from qwen2_local.errors import Qwen2LocalError
    from qwen2_local.store import resolve

    try:
        return resolve(name).label
    except Qwen2LocalError:
        return name

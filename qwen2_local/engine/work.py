"""What the scheduler knows of a request under way, be it a reply (`generating`) or a score (`scoring`)."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from qwen2_local.backends.base import Row, RowResult
from qwen2_local.engine.device import Held, Parked
from qwen2_local.engine.reply import Mailbox
from qwen2_local.engine.speculation import Speculation


class Work(ABC):
    """A request under way.

    tokens: all that are known, the prompt first. mailbox: where its caller reads. held: its sequence on the device, None while it waits for
    one. parked: KV that left the device with it. began: when it first came to the device, 0 before.
    yarn: it needs stretched positions. kept: is its sequence worth keeping for later requests, and (persist) on the disk?
    speculation: None where nothing drafts for it.
    """

    yarn = False
    speculation: Speculation | None = None
    kept = True
    persist = True

    def __init__(self, tokens: list[int], mailbox: Mailbox[Any]) -> None:
        self.tokens = tokens
        self.mailbox = mailbox
        self.held: Held | None = None
        self.parked: Parked | None = None
        self.began = 0.0

    @property
    def sequence(self) -> Held:
        """Its sequence on the device, which it has."""
        assert self.held is not None
        return self.held

    @property
    def pending(self) -> int:
        """Tokens that are known and not in KV yet; 1 while it decodes."""
        return len(self.tokens) - self.sequence.length

    @property
    @abstractmethod
    def need(self) -> int:
        """Tokens that its sequence has to have room for, by what is known now."""

    @property
    @abstractmethod
    def reusable(self) -> int:
        """How many of its first tokens need not be computed where their KV is known."""

    def drafts(self, drafts: Sequence[int]) -> Sequence[int]:
        """Those of drafted tokens that are worth computing."""
        return drafts

    @property
    def most_drafts(self) -> int:
        """How many tokens may be drafted behind its last."""
        return 0

    def placed(self) -> None:
        """Its sequence is on the device."""
        self.began = self.began or time.perf_counter()

    @abstractmethod
    def row(self, count: int, drafts: Sequence[int]) -> Row:
        """Its next `count` tokens, and drafted ones behind its last."""

    @abstractmethod
    def take(self, result: RowResult, drafts: Sequence[int]) -> bool:
        """What came of its row; its sequence is as long as the row made it, and is cut to what stands by the scheduler. Is it over?"""

    @abstractmethod
    def finish(self, chunks: tuple[str, ...]) -> None:
        """Tell its caller the end."""

    @abstractmethod
    def stop(self, chunks: tuple[str, ...]) -> None:
        """Tell its caller that it ended as cancelled."""

    def fail(self, error: BaseException) -> None:
        """Tell its caller what went wrong."""
        self.mailbox.end(error)

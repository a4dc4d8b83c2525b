"""A conversation that is open, with the reply that is on its way. It goes on while a person looks at another one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from qwen2_tui.conversation import Conversation, Plan, Reading
from qwen2_tui.live import LiveReply
from qwen2_tui.widgets.transcript import Turn

if TYPE_CHECKING:
    from qwen2_local.chat import Reply
    from qwen2_tui.screens.writing import Task


class Session:
    """For the UI thread."""

    def __init__(self, conversation: Conversation) -> None:
        self.conversation = conversation
        self.live: LiveReply | None = None
        self.plan: Plan | None = None
        self.typed = ""
        """What a person typed for the reply that is under way."""
        self.task: Task | None = None
        """What it was typed for."""
        self._came: list[str] = []

    @property
    def running(self) -> bool:
        """Is a reply under way, or over but not looked at yet?"""
        return self.live is not None

    def begin(self, plan: Plan, typed: str, task: Task | None, begun: Callable[[], None]) -> None:
        """Ask for a reply. begun: called in its thread once the question is kept."""

        def begin(told: Reading) -> Reply:
            reply = plan.begin(told)
            begun()
            return reply

        self.plan, self.typed, self.task, self._came = plan, typed, task, []
        self.live = LiveReply(begin)

    def take(self) -> str:
        """The text that came since the last call."""
        text = self.live.take() if self.live is not None else ""
        self._came.append(text)
        return text

    def growing(self) -> Turn:
        """The reply as far as it was taken."""
        assert self.plan is not None
        return replace(self.plan.reply, text=self.plan.reply.text + "".join(self._came))

    def settle(self) -> tuple[Plan, LiveReply]:
        """The reply is over: what it was."""
        assert self.plan is not None and self.live is not None
        settled = self.plan, self.live
        self.plan = self.live = None
        return settled

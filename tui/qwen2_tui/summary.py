"""A summary of a conversation, written by its model, with which a new one can begin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qwen2_local import chatml
from qwen2_local.chats import ChatMessage
from qwen2_local.types import Message

if TYPE_CHECKING:
    from qwen2_local.aio import Readable
    from qwen2_tui.model import Model

_LONGEST = 400
_ASKED = (
    "Summarise our conversation so far, so that it can go on from your summary alone: facts, decisions, names and numbers, and what is still open."
)


def begin(model: Model, messages: Sequence[ChatMessage]) -> Readable:
    """The summary of `messages`, as it comes; of the latest ones, where all of them would not fit. For a thread."""
    turns = [Message(one.role, one.text) for one in messages if one.text.strip()]
    system = [turns.pop(0)] if turns and turns[0].role == "system" else []
    longest = min(_LONGEST, model.longest // 4)
    tail = Message("user", _ASKED)
    sizes = [len(chatml.turn(model.tokenizer, one)) for one in turns]
    room = model.longest - longest - len(chatml.render(model.tokenizer, [*system, tail], default_system=model.default_system))
    while sizes and sum(sizes) > room:
        del sizes[0], turns[0]
    while turns and turns[0].role != "user":  # a reply alone tells nothing
        del turns[0]
    # Its KV is of no use to anybody later, and would outlive the chat.
    return model.respond([*system, *turns, tail], max_tokens=longest, persist=False)


def system_with(summary: str, system: str | None) -> str:
    """The system message of the conversation that goes on. system: of the one before."""
    return "\n\n".join(part for part in (system, f"Summary of the conversation so far:\n{summary.strip()}") if part)

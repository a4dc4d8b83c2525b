"""Messages as they are shown: with their names, their files folded, and a word on how a reply ended."""

from __future__ import annotations

from dataclasses import replace

from qwen2_local.chats import ChatMessage
from qwen2_local.chats.attached import folded
from qwen2_local.sanitize import clean, clean_line
from qwen2_local.types import Role
from qwen2_tui.widgets.transcript import Turn

_NAMES: dict[Role, str] = {"system": "system", "user": "you", "assistant": "qwen2"}


def turn_of(message: ChatMessage, number: int = 1, count: int = 1) -> Turn:
    """A message as it is shown."""
    name = clean_line(message.model) if message.role == "assistant" and message.model else _NAMES[message.role]
    text = folded(message.text) if message.role == "user" else message.text
    return Turn(message.id, message.role, name, clean(text), message.state, number, count, footer_of(message))


def footer_of(message: ChatMessage) -> str:
    """What there is to say of how a reply ended; "" where it simply did."""
    if message.role != "assistant":
        return ""
    said = []
    if message.state == "partial":
        said.append("stopped" if message.finish_reason == "cancelled" else "broke off")
        said.append("c continues")
    elif message.finish_reason == "length":
        said.append("cut at the longest that replies may be (settings) · c continues")
    elif message.finish_reason == "context":
        said.append("the context is full")
    if message.left_out:
        said.append(f"written without the {message.left_out} oldest message{'s' * (message.left_out != 1)}")
    return " · ".join(said)


def question_turn(text: str, place: tuple[int, int]) -> Turn:
    """A question that is on its way."""
    return replace(turn_of(ChatMessage("user", text), *place), key=0)

"""ChatML, Qwen2's format of a conversation, written straight in token ids.

    <|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n<|im_start|>user\\n...<|im_end|>\\n<|im_start|>assistant\\n

The marks are ids put between encoded texts, so no text can forge one. Equal to Qwen2's own chat_template (its tokenizer_config.json)
for every content without marks.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import get_args

from qwen2_local.errors import InvalidPrompt, UnsupportedModel
from qwen2_local.tokens import Tokenizer, require_text
from qwen2_local.types import Message, Role

DEFAULT_SYSTEM = "You are a helpful assistant."
"""The system message that Qwen2's template puts in front of a conversation without one."""

_SYSTEMS = (
    ("You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",) * 2,
    # The template writes the backslash twice.
    ("Please reason step by step, and put your final answer within", "Please reason step by step, and put your final answer within \\boxed{}."),
    (DEFAULT_SYSTEM.removesuffix("."), DEFAULT_SYSTEM),
)
"""What the templates of Qwen2.5 and Coder, of Math and of Qwen2 hold, and the system message that it tells."""


def system_of(template: str | None) -> str | None:
    """The system message that a model's chat template puts first, told by the texts in it: a template is never run.

    Qwen2's where there is no template, or one of another kind; None for a ChatML template without any that is known.
    """
    if not template:
        return DEFAULT_SYSTEM
    for literal, system in _SYSTEMS:
        if literal in template:
            return system
    return None if "<|im_start|>" in template else DEFAULT_SYSTEM


def for_chats(tokenizer: Tokenizer, ends: Collection[int], template: str | None) -> bool:
    """Is a model made for chats? `ends`: the ids that its files name as the end of a text. Base models have a template too."""
    if tokenizer.special.get("<|im_end|>") in ends:
        return True
    return bool(template and ends) and tokenizer.special.get("<|endoftext|>") not in ends


def render(tokenizer: Tokenizer, messages: Sequence[Message], *, default_system: str | None = DEFAULT_SYSTEM) -> list[int]:
    """The ids of a conversation, and the opening of the reply that the model is to write.

    default_system: what to put first if the conversation does not start with a system message; None for nothing.
    Raises InvalidPrompt for no messages, an unknown role or lone surrogates; UnsupportedModel if the tokenizer has no ChatML marks.
    """
    if not messages:
        raise InvalidPrompt("The conversation is empty.", hint="Give at least one message.")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Message):
            raise InvalidPrompt(f"Message {number} is a {type(message).__name__}, not a Message.", hint='One is Message("user", "Hi").')
        if message.role not in get_args(Role):
            raise InvalidPrompt(f"Message {number} has the role {message.role!r}.", hint="Roles are system, user and assistant.")
        require_text(message.content, f"Message {number} ({message.role})")
    if messages[0].role != "system" and default_system is not None:
        messages = [Message("system", default_system), *messages]
    ids: list[int] = []
    for message in messages:
        ids += turn(tokenizer, message)
    return ids + open_reply(tokenizer)


def turn(tokenizer: Tokenizer, message: Message) -> list[int]:
    """The ids of one message, marks and closing newline included."""
    return [mark(tokenizer, "<|im_start|>"), *tokenizer.encode(f"{message.role}\n{message.content}"), *close_reply(tokenizer)]


def open_reply(tokenizer: Tokenizer) -> list[int]:
    """The ids after which the model writes a reply."""
    return [mark(tokenizer, "<|im_start|>"), *tokenizer.encode("assistant\n")]


def close_reply(tokenizer: Tokenizer) -> list[int]:
    """The ids between a reply, kept as the ids the model wrote, and the next turn."""
    return [mark(tokenizer, "<|im_end|>"), *tokenizer.encode("\n")]


def mark(tokenizer: Tokenizer, name: str) -> int:
    """The id of a control token. Raises UnsupportedModel if the tokenizer has none of that name."""
    try:
        return tokenizer.special[name]
    except KeyError:
        hint = "It is no chat model of Qwen2's kind: it continues plain text, with `run --raw` or `Qwen2.complete`."
        raise UnsupportedModel(f"The model's tokenizer has no {name} token.", hint=hint) from None

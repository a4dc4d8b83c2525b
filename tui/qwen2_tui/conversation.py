"""What the chat screen knows of a chat, without Textual: its turns as they are shown, and what each action asks of the model.

It is there before any model is: a saved chat is read at once, and can be written to as soon as a model has come (`use`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qwen2_local.chats import ChatMessage, ChatStore, path_to
from qwen2_local.chats.attached import Attached, split
from qwen2_local.errors import Qwen2LocalError
from qwen2_local.sanitize import clean, clean_line
from qwen2_tui.turns import question_turn, turn_of
from qwen2_tui.widgets.transcript import Turn

if TYPE_CHECKING:
    from qwen2_local.chat import Chat, Overflow, Reply
    from qwen2_tui.model import Model

Reading = Callable[[int, int], None]
"""Told while a prompt is read: tokens done, tokens in all."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A reply that is wanted. kept: so many turns stay as they are; then come `asked`, if it is new, and `reply`, which grows.

    begin: asks the model, in a thread. text: what a person wrote for it, to be given back if the model refuses it.
    """

    kept: int
    asked: Turn | None
    reply: Turn
    begin: Callable[[Reading], Reply]
    text: str = ""


@dataclass(frozen=True, slots=True)
class Measure:
    """The context, in tokens: used by the conversation with what is being written, of those known already, and at most."""

    used: int
    cached: int
    most: int

    @property
    def left(self) -> int:
        """For the reply."""
        return self.most - self.used


class Conversation:
    """A chat of `store`, saved or to be saved with its first question. Its methods are for one thread at a time; reading is always safe."""

    def __init__(self, store: ChatStore, number: int | None = None, *, message: int | None = None, temporary: bool = False) -> None:
        """number: a saved one; it is read here, which may take a while. message: one of its messages, whose branch is wanted.

        temporary: it is to leave nothing on the disk.

        Raises UnknownChat, and what a store raises.
        """
        self.store = ChatStore.temporary() if temporary else store
        self.temporary = temporary
        self.chat: Chat | None = None
        self.model: Model | None = None
        self.options: dict[str, Any] = {}
        """What this chat has otherwise than others: see `settings.with_options`."""
        self._number = number
        self._record: tuple[ChatMessage, ...] = ()
        self._all: Mapping[int, ChatMessage] = {}
        self.overflow: Overflow = "error"
        if number is not None:
            record = store.record(number)
            self.options = store.options(number)
            self._all = {message.id: message for message in record.messages}
            self._record = tuple(path_to(self._all, record.tip))
            if message in self._all and all(one.id != message for one in self._record):
                tip = _latest(self._all, message)
                store.end_with(number, tip)
                self._record = tuple(path_to(self._all, tip))
            # Who chose to leave old turns out does so again.
            if self._record and self._record[-1].left_out:
                self.overflow = "drop_oldest"

    @property
    def number(self) -> int | None:
        """That of the saved chat; None: it is not saved (yet)."""
        return None if self.temporary else self.chat.number if self.chat is not None else self._number

    @property
    def messages(self) -> tuple[ChatMessage, ...]:
        """The conversation as it is now."""
        return self.chat.messages if self.chat is not None else self._record

    @property
    def empty(self) -> bool:
        """Was nothing asked yet?"""
        return not any(message.role == "user" for message in self.messages)

    @property
    def unsaved(self) -> str:
        """Why it is not saved though it should be; "" where all is well."""
        return self.chat.unsaved if self.chat is not None else ""

    def use(self, model: Model, system: str | None = None) -> None:
        """Go on with this model. system: of a chat that is still empty. Reads a saved chat, which may take a while."""
        from qwen2_local.chat import Chat

        chat, number = self.chat, self._number if self.chat is None else self.chat.number
        if chat is not None and not self.empty and (number is None or chat.unsaved):
            self.chat = chat.with_model(model)  # what could not be saved is nowhere else
        elif number is None:
            self.chat = Chat(model, system=system, store=self.store, overflow=self.overflow)
        else:
            self.chat = Chat.load(model, number, self.store, overflow=self.overflow)
            self._record, self._all = (), {}
        self.model = model  # last: who looks meanwhile sees the one before

    def save(self) -> None:
        """Save what is not: the branch that one looks at, or what could not be saved before. For a thread."""
        if self.chat is not None and not self.empty:
            with suppress(Qwen2LocalError):
                self.chat.save()

    def keep_options(self) -> None:
        """Keep them with a saved chat. For a thread. What cannot be kept counts as long as the chat is open."""
        number = self.number
        with suppress(Qwen2LocalError):
            if number is not None and self.options != self.store.options(number):
                self.store.keep_options(number, self.options)

    def shorten(self) -> None:
        """From now on the model does not see the oldest turns where they do not fit."""
        self.overflow = "drop_oldest"
        if self.chat is not None:
            self.chat.overflow = "drop_oldest"

    # What is shown

    def turns(self, start: int = 0) -> tuple[Turn, ...]:
        """From the turn `start` on, for a transcript; a turn's place is its message's."""
        messages = self.messages
        return tuple(turn_of(message, *place) for message, place in list(zip(messages, self._places(messages), strict=True))[start:])

    def _places(self, messages: Sequence[ChatMessage]) -> Sequence[tuple[int, int]]:
        if self.chat is not None:
            return self.chat.places()
        siblings: dict[int | None, list[int]] = {}
        for one in self._all.values():
            siblings.setdefault(one.parent, []).append(one.id)
        return [(siblings[one.parent].index(one.id) + 1, len(siblings[one.parent])) for one in messages]

    def broken(self) -> str:
        """A sentence, if the conversation ends in the middle, and nobody stopped it there; "" if it does not."""
        last = self.messages[-1] if self.messages else None
        if last is not None and last.role == "user":
            return "The last question has no reply."
        if last is not None and last.state == "partial" and last.finish_reason is None:
            return "The last reply broke off."
        return ""

    def question(self, index: int) -> tuple[str, Mapping[str, Attached]]:
        """The question at `index` as a person wrote it, and its files by their names."""
        question, files = split(self.messages[index].text)
        return question, {file.name: file for file in files}

    # What is asked of the model. wishes: `Options` of the API.

    def send(self, text: str, wishes: Mapping[str, Any]) -> Plan:
        """The reply to a new question. One without a reply makes way."""
        chat, messages = self._ready(), self.messages
        unanswered = bool(messages) and messages[-1].role == "user"
        kept = len(messages) - unanswered
        place = self._next(len(messages) - 1) if unanswered else (1, 1)
        return self._plan(kept, text, (1, 1), lambda told: chat.stream(text, **wishes, progress=told), question=question_turn(text, place))

    def edit(self, index: int, text: str, wishes: Mapping[str, Any]) -> Plan:
        """The reply to another wording of the question at `index`, as a branch."""
        chat = self._ready()
        asked = question_turn(text, self._next(index))
        return self._plan(index, text, (1, 1), lambda told: chat.stream_edit(index, text, **wishes, progress=told), question=asked)

    def regenerate(self, index: int, wishes: Mapping[str, Any]) -> Plan:
        """Another reply: in place of the one at `index`, or to the question at `index`. As a branch."""
        chat, messages = self._ready(), self.messages
        reply = index if messages[index].role == "assistant" else index + 1
        place = self._next(reply) if reply < len(messages) else (1, 1)

        def begin(told: Reading) -> Reply:
            given = dict(wishes)
            if given.get("seed") is not None:
                # The same seed would give the same reply.
                given["seed"] = (given["seed"] + place[0] - 1) % 2**64
            return chat.stream_regenerate(index, **given, progress=told)

        return self._plan(reply, "", place, begin)

    def go_on(self, index: int, wishes: Mapping[str, Any], text: str | None = None) -> Plan:
        """The reply at `index` goes on from where it ended, or as a branch that begins with `text`. One that others follow stays as it is."""
        chat, messages = self._ready(), self.messages
        last = index == len(messages) - 1
        begun = messages[index].text if text is None else text
        place = self._place(index) if last and text is None else self._next(index)
        return self._plan(index, text or "", place, lambda told: chat.stream_continue(text, index, **wishes, progress=told), begun=begun)

    def switch(self, index: int, step: int) -> bool:
        """To the alternative of the turn at `index` that is `step` further. Is there one? `save` keeps that."""
        chat = self._ready()
        number, count = self._place(index)
        wanted = number - 1 + step
        if not 0 <= wanted < count:
            return False
        chat.switch(index, wanted, keep=False)
        return True

    def repeated(self, index: int) -> bool:
        """Does the reply at `index` say what an older alternative of it says?"""
        *before, last = self._ready().branches(index)
        return any(one.text == last.text for one in before)

    def measure(self, draft: str) -> Measure:
        """The context, if `draft` were sent now. Tokenizes, and asks the model's process: for a thread."""
        chat = self._ready()
        known = self.model.known(chat.ids()) if self.model is not None and self.messages else 0
        used = chat.count(draft)
        return Measure(used, min(known, used), chat.model.longest)

    def _ready(self) -> Chat:
        assert self.chat is not None, "there is no model yet"
        return self.chat

    def _place(self, index: int) -> tuple[int, int]:
        return self._ready().places()[index]

    def _next(self, index: int) -> tuple[int, int]:
        """The place of one more alternative of the turn at `index`."""
        count = self._place(index)[1] + 1
        return count, count

    def _plan(
        self, kept: int, text: str, place: tuple[int, int], begin: Callable[[Reading], Reply], *, question: Turn | None = None, begun: str = ""
    ) -> Plan:
        name = self._ready().model.name
        return Plan(kept, question, Turn(0, "assistant", clean_line(str(name)), clean(begun), "partial", *place), begin, text)


def _latest(messages: Mapping[int, ChatMessage], message: int) -> int:
    """The end of the branch that `message` is in: the latest that came of it."""
    latest = {one.parent: one.id for one in messages.values()}
    while message in latest:
        message = latest[message]
    return message

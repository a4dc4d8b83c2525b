"""What is being written: what it is for (a question, an edit), its draft, and how much room it takes."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal

from qwen2_local.chats.attached import Attached, joined
from qwen2_local.errors import Qwen2LocalError
from qwen2_local.sanitize import clean_line
from qwen2_tui import attach
from qwen2_tui.conversation import Conversation, Measure

if TYPE_CHECKING:
    from qwen2_tui.screens.chat import ChatScreen

_COUNT_S = 0.25
_DRAFT_S = 0.5


@dataclass(frozen=True, slots=True)
class Task:
    """What the message is for: a new question, or another wording of the turn `index`. files: that it had before, by their names."""

    kind: Literal["question", "edit", "reply"] = "question"
    index: int = 0
    files: Mapping[str, Attached] = field(default_factory=dict)


_NEW = Task()
_TITLES = {"edit": "editing the question · enter asks it, esc gives up", "reply": "editing the reply · enter lets it go on, esc gives up"}


class Writing:
    """For the UI thread; disks and tokenizers are asked in threads."""

    def __init__(self, screen: ChatScreen) -> None:
        self._screen = screen
        self._composer = screen.composer
        self.task = _NEW
        self.waiting = False
        """Is the message to be sent as soon as there is a model?"""
        self.counted: str | None = None
        """The message that was counted last."""
        self.warned: str | None = None
        """The message of which was said that not all its files can be sent."""
        self._choosing: str | None = None
        self.unsent = ""
        """The draft of the chat that is not there yet."""
        self._begun = False
        self._stash = ""
        self._turn = 0
        self._drafts: dict[int | None, str] = {}
        self._storing = threading.Lock()
        self._count_timer = screen.set_timer(_COUNT_S, self._count, pause=True)
        self._draft_timer = screen.set_timer(_DRAFT_S, self.keep_draft, pause=True)

    @property
    def draft(self) -> str:
        """The message to be, also while something else is edited."""
        return self._composer.text if self.task is _NEW else self._stash

    # What is written for

    def begin(self, unsent: str) -> None:
        """unsent: the draft that the last visit left; what was typed meanwhile comes behind it."""
        conversation = self._screen.session.conversation
        here = conversation.number is None and not conversation.temporary
        if here:
            self.unsent = self._composer.text
        self._begun = True
        self.unsent = unsent + self.unsent
        if here and unsent:
            self._composer.write(self.unsent)
        self._drafts[None] = self.unsent

    def ask(self, text: str) -> None:
        """Write a question that was not typed. The draft waits."""
        if self.task is _NEW:
            self._stash = self._composer.text
        self.task = Task()
        self._composer.name_task("")
        self._composer.write(text)

    def open(self, draft: str) -> None:
        """Begin with the draft of another conversation."""
        self.task, self.waiting, self._stash = _NEW, False, ""
        self._composer.name_task("")
        self._composer.write(draft)
        self.say("")

    def edit(self, kind: Literal["edit", "reply"], index: int, text: str, files: Mapping[str, Attached]) -> None:
        """Write the turn `index` anew. The draft waits."""
        if self.task is _NEW:
            self._stash = self._composer.text
        self.task = Task(kind, index, files)
        self._composer.name_task(_TITLES[kind])
        self._composer.write(text)
        self._composer.focus()

    def give_up(self) -> bool:
        """Back to the draft, or take a waiting message back. Was there anything to give up?"""
        if self.waiting:
            self.waiting = False
            self._composer.name_task("")
            return True
        if self.task is _NEW:
            return False
        self.open(self._stash)
        return True

    def sent(self, text: str) -> None:
        """`text` is on its way. What was typed behind it since then stays."""
        since = self._composer.text.removeprefix(text) if self._composer.text.startswith(text) else ""
        self.open((self._stash if self.task is not _NEW else "") + since)
        self.warned = None

    def give_back(self, text: str, task: Task) -> None:
        """What was sent and could not be asked. What is being written since comes behind it, or waits."""
        if task.kind == "question":
            self._composer.write("\n".join(filter(None, (text, self._composer.text))))
        else:
            self.edit(task.kind, task.index, text, task.files)

    def give_back_later(self, number: int | None, text: str) -> None:
        """In a thread: the same in a chat that is not open."""
        with suppress(Qwen2LocalError):
            before = self.unsent if number is None else self._screen.qwen.store.draft(number)
            self._drafts[number] = "\n".join(filter(None, (text, before)))
            if number is None:
                self.unsent = self._drafts[None]
        self.store_drafts()

    def wait(self) -> None:
        """Send it as soon as there is a model, as it is written by then."""
        self.waiting = True
        self._composer.name_task("sent as soon as the model is there · esc takes it back")

    def choose(self, words: str) -> None:
        """How the path before the cursor could go on; said as long as nothing else is typed."""
        self._choosing = self._composer.text
        self.say(words)

    # Files, and how much room it takes

    def tokens(self, text: str) -> int:
        """Of a text, as the model counts them."""
        model = self._screen.qwen.host.model
        return len(model.tokenizer.encode(text)) if model is not None else 0

    def say(self, words: str) -> None:
        """A line above the message; "" for nothing."""
        self._screen.notes.update(clean_line(words))
        self._screen.notes.display = bool(words)

    def changed(self) -> None:
        """Something was typed: count and keep it soon, not at every key."""
        self._turn += 1
        self._count_timer.stop()
        self._count_timer = self._screen.set_timer(_COUNT_S, self._count)
        self._draft_timer.stop()
        self._draft_timer = self._screen.set_timer(_DRAFT_S, self.keep_draft)

    def count(self) -> None:
        """Count anew at once."""
        self._turn += 1
        self._count()

    def _count(self) -> None:
        screen = self._screen
        conversation = screen.session.conversation
        if screen.busy or conversation.chat is None:
            return
        text = self._composer.text if self.task is _NEW else ""
        screen.run_worker(partial(self._measure, self._turn, conversation, text), thread=True, group="count", exclusive=True)

    def _measure(self, turn: int, conversation: Conversation, text: str) -> None:
        """In a thread."""
        reading = attach.read(text, self.tokens) if attach.mentions(text) else attach.Reading()
        try:
            measure = conversation.measure(joined(text, reading.files) if text.strip() else "")
        except Qwen2LocalError:
            return  # the model is gone; whoever asks it something will hear of it
        self._screen.app.call_later(self._measured, turn, conversation, text, measure, reading)

    def _measured(self, turn: int, conversation: Conversation, text: str, measure: Measure, reading: attach.Reading) -> None:
        if turn == self._turn and conversation is self._screen.session.conversation:
            self.counted = text
            if text not in (self.warned, self._choosing):
                self.say(" · ".join(attach.summary(reading)))
            self._screen.gauges.measured(measure)

    def keep_draft(self) -> None:
        """Keep what was typed, in the background."""
        self._note_draft()
        self._screen.run_worker(self.store_drafts, thread=True, group="draft")

    def _note_draft(self) -> None:
        conversation = self._screen.session.conversation
        if conversation.temporary:
            return
        if conversation.number is None:
            self.unsent = self.draft
        if conversation.number is not None or self._begun:  # else it would come in place of what is about to be read
            self._drafts[conversation.number] = self.draft

    def store_drafts(self) -> None:
        """In a thread: drafts as they are by now."""
        with self._storing:
            while self._drafts:
                number, text = self._drafts.popitem()
                # A chat that is gone, a full disk: what was sent is what counts.
                with suppress(Qwen2LocalError):
                    self._screen.qwen.store.keep_draft(number, text)

    def clear_draft(self, conversation: Conversation, number: int | None) -> None:
        """In a thread: it was sent, from what was the chat `number` then. What is being written since is kept instead."""
        if conversation is self._screen.session.conversation:
            if number is None:
                self.unsent = self._drafts[None] = ""
            self._drafts[conversation.number] = self.draft
            self.store_drafts()

    def keep_last(self) -> None:
        """In a thread, at the app's end."""
        self._note_draft()
        if not self._begun and self.unsent:
            with suppress(Qwen2LocalError):
                self._drafts[None] = self._screen.qwen.store.draft(None) + self.unsent
        self.store_drafts()

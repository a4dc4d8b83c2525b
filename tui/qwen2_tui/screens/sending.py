"""From enter to the reply: is there a model, which files are meant, does it fit."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from qwen2_local.chats.attached import Attached, joined
from qwen2_tui import attach
from qwen2_tui.screens.writing import Task

if TYPE_CHECKING:
    from qwen2_tui.screens.chat import ChatScreen


class Sending:
    """For the UI thread. What is written stays in the message until it can be asked."""

    def __init__(self, screen: ChatScreen) -> None:
        self._screen = screen

    def send(self, text: str) -> None:
        """What was written: now, or as soon as there is a model."""
        screen, host = self._screen, self._screen.qwen.host
        if screen.busy:
            screen.qwen.tell("The reply is still being written: esc stops it.")
        elif screen.entering.ready:
            if attach.mentions(text):
                screen.run_worker(partial(self._read, text, screen.writing.task), thread=True, group="attach", exclusive=True)
            else:
                self._ask(text, (), screen.writing.task)
        elif host.state.phase == "failed" and not host.state.crashed:
            screen.qwen.tell(f"There is no model: {host.state.words}", problem=True)
        else:
            screen.writing.wait()
            if host.state.crashed:
                host.restart(safe=host.state.wish.safe)

    def _read(self, text: str, task: Task) -> None:
        """In a thread: the files that it mentions."""
        reading = attach.read(text, self._screen.writing.tokens, kept=task.files)
        self._screen.app.call_later(self._was_read, text, task, reading)

    def _was_read(self, text: str, task: Task, reading: attach.Reading) -> None:
        writing = self._screen.writing
        if text != self._screen.composer.text or task is not writing.task:
            return  # more was written meanwhile
        if reading.problems and writing.warned != text:
            writing.warned = text
            writing.say(" ".join([*reading.problems, "Enter again sends it as it is."]))
        elif self._screen.busy or not self._screen.entering.ready:
            self.send(text)
        else:
            self._ask(text, reading.files, task)

    def _ask(self, text: str, files: Sequence[Attached], task: Task) -> None:
        screen = self._screen
        if task.kind == "question" and screen.gauges.refuses(text):
            return
        plan = screen.acting.plan(task, joined(text, files))
        screen.writing.sent(text)
        if task.kind == "question":
            screen.composer.questions = [text, *(one for one in screen.composer.questions if one != text)]
        screen.replying.begin(plan, text, task)

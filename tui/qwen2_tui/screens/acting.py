"""What is done with a turn, by a key, a command or a choice that is offered."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from textual.app import SystemCommand

from qwen2_local.chats.attached import split
from qwen2_local.errors import Qwen2LocalError
from qwen2_tui.conversation import Conversation, Plan
from qwen2_tui.screens.writing import Task
from qwen2_tui.session import Session

if TYPE_CHECKING:
    from qwen2_local.aio import Readable
    from qwen2_tui.model import Model
    from qwen2_tui.screens.chat import ChatScreen


class Acting:
    """For the UI thread."""

    def __init__(self, screen: ChatScreen) -> None:
        self._screen = screen
        self._summary: Readable | None = None

    @property
    def _conversation(self) -> Conversation:
        return self._screen.session.conversation

    def act(self, name: str, index: int) -> None:
        """What the transcript's keys say. index: the turn."""
        if index >= len(self._conversation.messages):
            return  # the reply that is on its way
        actions: Mapping[str, Callable[[int], None]] = {
            "edit": self.edit, "regenerate": self.regenerate, "continue": self.go_on, "copy": self.copy, "tokens": self.tokens,
            "prompt": self.prompt, "previous": partial(self.switch, step=-1), "next": partial(self.switch, step=1),
        }  # fmt: skip
        if name == "write":
            self._screen.focus_composer()
        elif name == "copy" or self._ready():
            actions[name](index)

    def choose(self, key: str) -> None:
        """What was chosen of an offer."""
        screen, last = self._screen, len(self._conversation.messages) - 1
        host = screen.qwen.host
        match key:
            case "again" | "safe":
                host.restart(safe=key == "safe" or host.state.wish.safe)
            case "shorten":
                self._conversation.shorten()
                screen.writing.count()
            case "new":
                text = screen.composer.text
                screen.new_chat(temporary=self._conversation.temporary)
                if text:
                    screen.composer.write(text)
            case "larger":
                screen.qwen.switch_model(replace(host.state.wish, context=None))
            case "summarise" if self._ready():
                self._summarise()
            case "retry" if last >= 0 and self._ready():
                self.regenerate(last)
            case "continue" if last >= 0 and self._ready():
                self.go_on(last)

    # Turns

    def plan(self, task: Task, text: str) -> Plan:
        """What a message asks for, as it was written for `task`."""
        match task.kind:
            case "question":
                return self._conversation.send(text, self._wishes())
            case "edit":
                return self._conversation.edit(task.index, text, self._wishes())
            case "reply":
                return self._conversation.go_on(task.index, self._wishes(), text)

    def select(self, message: int | None) -> None:
        """The turn of this message, by its number; back to where one writes if it is none of this branch."""
        index = next((index for index, one in enumerate(self._conversation.messages) if one.id == message), None)
        if index is None:
            self._screen.focus_composer()
        else:
            self._screen.transcript.focus()
            self._screen.transcript.selected = index

    def edit(self, index: int) -> None:
        """Another wording of a question, or another beginning of a reply."""
        message = self._conversation.messages[index]
        if message.role == "user":
            question, files = self._conversation.question(index)
            self._screen.writing.edit("edit", index, question, files)
        elif message.role == "assistant":
            self._screen.writing.edit("reply", index, message.text, {})
        else:
            self._screen.qwen.tell("The system message stays; the settings have that of new chats.")

    def regenerate(self, index: int) -> None:
        """Another reply."""
        if self._conversation.messages[index].role == "system":
            self._screen.qwen.tell("The system message has no reply.")
        else:
            self._screen.replying.begin(self._conversation.regenerate(index, self._wishes()))

    def go_on(self, index: int) -> None:
        """The reply goes on; a question gets one."""
        match self._conversation.messages[index].role:
            case "assistant":
                self._screen.replying.begin(self._conversation.go_on(index, self._wishes()))
            case "user" if index == len(self._conversation.messages) - 1:
                self.regenerate(index)
            case _:
                self._screen.qwen.tell("Only a reply can go on: select one.")

    def switch(self, index: int, step: int) -> None:
        """To another alternative."""
        screen = self._screen
        if self._conversation.switch(index, step):
            screen.run_worker(self._conversation.save, thread=True, group="place")
            screen.transcript.truncate(index)
            for turn in self._conversation.turns(index):
                screen.transcript.append(turn)
            screen.transcript.selected = index
            screen.writing.count()

    def copy(self, index: int) -> None:
        """The focused code block, or all of the turn; of a question, what was typed."""
        message = self._conversation.messages[index]
        code = self._screen.transcript.selected_code()
        text = split(message.text)[0] if message.role == "user" else message.text
        self._screen.qwen.copy_to_clipboard(text if code is None else code)

    def tokens(self, index: int) -> None:
        """The tokens of a turn, and their probabilities; one of them may be chosen otherwise."""
        from qwen2_tui.screens.tokens import TokensScreen

        def chosen(text: str | None) -> None:
            if text is not None and self._ready():
                self._screen.replying.begin(self._conversation.go_on(index, self._wishes(), text))

        screen, conversation = self._screen, self._conversation
        assert conversation.model is not None and conversation.chat is not None
        screen.app.push_screen(TokensScreen(conversation.model, conversation.chat, index), chosen)

    def prompt(self, index: int) -> None:
        """The prompt as the model sees it."""
        from qwen2_tui.screens.prompt import PromptScreen

        conversation = self._conversation
        assert conversation.model is not None and conversation.chat is not None
        self._screen.app.push_screen(PromptScreen(conversation.model, conversation.chat, index))

    def _ready(self) -> bool:
        screen = self._screen
        if screen.busy:
            screen.qwen.tell("The reply is still being written: esc stops it.")
        elif not screen.entering.ready:
            screen.qwen.tell("The model is not there yet.")
        return screen.entering.ready and not screen.busy

    def _wishes(self) -> dict[str, Any]:
        """How replies are asked for in this chat."""
        return self._screen.chat_settings.wishes()

    # A summary

    def _summarise(self) -> None:
        conversation = self._conversation
        assert conversation.model is not None
        self._screen.writing.say("The conversation is being summarised … esc stops that.")
        self._screen.run_worker(partial(self._write_summary, conversation, conversation.model), thread=True, group="summary", exclusive=True)

    def _write_summary(self, conversation: Conversation, model: Model) -> None:
        """In a thread."""
        from qwen2_tui import summary

        text = ""
        try:
            stream = self._summary = summary.begin(model, conversation.messages)
            text = "".join(piece.text for piece in stream)
            done = stream.completion
            stopped = done is None or done.finish_reason == "cancelled"
        except Qwen2LocalError as error:
            stopped = True
            self._screen.app.call_later(self._screen.qwen.problem, error)
        finally:
            self._summary = None
        self._screen.app.call_later(self._summarised, conversation, "" if stopped else text.strip())

    def _summarised(self, conversation: Conversation, text: str) -> None:
        screen = self._screen
        screen.writing.say("")
        if not text or conversation is not self._conversation:
            return
        from qwen2_tui import summary

        first = conversation.messages[0]
        system = summary.system_with(text, first.text if first.role == "system" else screen.qwen.settings.chat.system)
        draft = screen.composer.text
        new = Conversation(screen.qwen.store, temporary=conversation.temporary)
        new.options = {**conversation.options, "system": system}
        screen.entering.enter(Session(new), draft)

    def stop(self) -> bool:
        """Stops a summary. Was one being written?"""
        stream = self._summary
        if stream is not None:
            stream.cancel()
        return stream is not None

    # The palette

    def commands(self) -> Iterable[SystemCommand]:
        """What can be done with the selected turn, or the last one."""
        messages = self._conversation.messages
        if not messages:
            return
        chosen = self._screen.transcript.selected
        index = chosen if chosen is not None and chosen < len(messages) else len(messages) - 1
        which = "the selected turn" if chosen is not None else "the last turn"
        key = self._screen.qwen.key_of
        for id, title, name in (
            ("turn.regenerate", "Another reply", "regenerate"),
            ("turn.continue", "Let the reply go on", "continue"),
            ("turn.edit", "Edit", "edit"),
            ("turn.copy", "Copy", "copy"),
            ("turn.tokens", "Tokens and probabilities", "tokens"),
            ("turn.prompt", "The raw prompt", "prompt"),
        ):
            yield SystemCommand(title, f"{which} · {key(id)} in the conversation", partial(self.act, name, index))
        if any(message.role == "user" for message in messages):
            yield SystemCommand("Go on from a summary", "a new chat that begins with a summary of this one", partial(self.choose, "summarise"))

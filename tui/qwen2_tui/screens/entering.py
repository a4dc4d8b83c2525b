"""Which conversation is open, and with which model: a new one, a saved one, one whose reply went on behind another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from qwen2_local.errors import Qwen2LocalError
from qwen2_tui.conversation import Conversation
from qwen2_tui.session import Session
from qwen2_tui.widgets.limit import Choice, Offer

if TYPE_CHECKING:
    from qwen2_tui.model import Model
    from qwen2_tui.screens.chat import ChatScreen

_LEAVE = Choice("leave", "leave it")


@dataclass(frozen=True, slots=True)
class _Left:
    """What the last visit left. number: of the chat to open; broken: of one that ended in the middle."""

    number: int | None
    questions: Sequence[str]
    draft: str
    broken: int | None
    title: str


class Entering:
    """For the UI thread. Disks and models are asked in threads: what comes back is dropped if a person has gone on meanwhile."""

    def __init__(self, screen: ChatScreen) -> None:
        self._screen = screen
        self._turn = 0
        self._broken: int | None = None
        self._lost = False

    def begin(self) -> None:
        """With the chat that was asked for, or an empty one."""
        self._screen.run_worker(self._look, thread=True, group="open")

    def open(self, number: int, message: int | None = None) -> None:
        """A saved chat, at its message `message` if that is named."""
        self._turn += 1
        # Of the replies that go on behind it, one may be this chat's.
        session = self._screen.replying.come_back(number)
        self._screen.run_worker(partial(self._read, self._turn, number, message, session), thread=True, group="open")

    def open_broken(self) -> None:
        """The chat that the last visit left in the middle."""
        if self._broken is not None:
            self.open(self._broken)

    def enter(self, session: Session, draft: str) -> None:
        """Shows another conversation. draft: what was being written there."""
        screen = self._screen
        self._turn += 1
        screen.writing.keep_draft()
        screen.replying.leave(screen.session)
        screen.session = session
        screen.offers.hide()
        screen.gauges.forget()
        screen.writing.open(draft)
        screen.replying.show(session)
        screen.focus_composer()
        self._offer_broken()
        screen.reply_changed()

    # Chats

    def _look(self) -> None:
        """In a thread."""
        qwen = self._screen.qwen
        opening, store = qwen.opening, qwen.store
        try:
            number = opening.chat
            if number is None and opening.continue_last:
                newest = max(store.summaries(), key=lambda one: (one.used, one.id), default=None)
                number = newest.id if newest is not None else None
            broken = store.last_broken() if number is None and not opening.temporary else None
            title = store.summary(broken).title if broken is not None else ""
            left = _Left(number, store.questions(), store.draft(None), broken, title)
        except Qwen2LocalError as error:
            qwen.call_later(qwen.problem, error)
            left = _Left(opening.chat, (), "", None, "")
        qwen.call_later(self._begun, left)

    def _begun(self, left: _Left) -> None:
        screen = self._screen
        screen.composer.questions = left.questions
        screen.writing.begin(left.draft)
        if self._turn:
            return  # somebody was faster
        if left.number is not None:
            self.open(left.number)
            return
        if screen.qwen.opening.temporary:
            screen.new_chat(temporary=True)
        self._broken = left.broken
        if left.broken is not None and screen.offers.offer is None:
            words = f"The last chat ended in the middle: {left.title}"
            screen.offers.show(Offer("last", words, (Choice("open", "open it"), _LEAVE)))
        self.use()

    def _read(self, turn: int, number: int, message: int | None, session: Session | None) -> None:
        """In a thread."""
        qwen = self._screen.qwen
        try:
            if session is None:
                session = Session(Conversation(qwen.store, number, message=message))
                model = qwen.host.model
                if model is not None:
                    session.conversation.use(model)
            draft = qwen.store.draft(number)
        except Qwen2LocalError as error:
            qwen.call_later(qwen.problem, error)
            return
        qwen.call_later(self._was_read, turn, message, session, draft)

    def _was_read(self, turn: int, message: int | None, session: Session, draft: str) -> None:
        if turn == self._turn:
            self.enter(session, draft)
            if message is not None:
                self._screen.acting.select(message)
        else:
            self._screen.replying.leave(session)

    def _offer_broken(self) -> None:
        """Whoever comes to a conversation that ends in the middle may go on with it."""
        screen = self._screen
        conversation = screen.session.conversation
        broken = conversation.broken()
        if broken and screen.offers.offer is None and not screen.busy and not screen.writing.waiting:
            asked = conversation.messages[-1].role == "user"
            choices = (Choice("retry", "answer it"),) if asked else (Choice("continue", "go on with it"), Choice("retry", "write another"))
            screen.offers.show(Offer("broken", broken, (*choices, _LEAVE)))

    # The model

    @property
    def ready(self) -> bool:
        """Can the conversation be gone on with at once?"""
        host = self._screen.qwen.host
        return host.state.phase == "ready" and host.model is not None and self._screen.session.conversation.model is host.model

    def use(self) -> None:
        """Takes the host's model for the conversation, as soon as there is one and nothing is under way."""
        screen = self._screen
        model, session = screen.qwen.host.model, screen.session
        if screen.qwen.host.state.phase != "ready" or model is None:
            self._lost = True
            return
        if session.running:
            return
        if session.conversation.model is model:
            (self._taken if self._lost else self._used)(session)
        else:
            system = screen.chat_settings.system
            screen.run_worker(partial(self._take, session, model, system), thread=True, group="use", exclusive=True)

    def _take(self, session: Session, model: Model, system: str | None) -> None:
        """In a thread."""
        qwen = self._screen.qwen
        try:
            session.conversation.use(model, system)
        except Qwen2LocalError as error:
            qwen.call_later(qwen.problem, error)
            return
        qwen.call_later(self._taken, session)

    def _taken(self, session: Session) -> None:
        """The model is there for a conversation that was just opened, or that had another, or one that died."""
        screen = self._screen
        if session is screen.session:
            self._lost = False
            screen.offers.hide("crash", "failed", "context")
            self._offer_broken()
        self._used(session)

    def _used(self, session: Session) -> None:
        screen = self._screen
        if session is not screen.session or session.conversation.model is not screen.qwen.host.model:
            self.use()
            return
        screen.writing.count()
        screen.gauges.show()
        if screen.writing.waiting:
            screen.writing.give_up()
            screen.composer.action_send()

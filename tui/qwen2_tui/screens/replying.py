"""Replies on their way, in the conversation that is shown and behind it: they grow in the transcript, and what ends them is said."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from qwen2_local.errors import ContextOverflow, Qwen2LocalError, UsageError, WorkerDied
from qwen2_local.sanitize import clean_line
from qwen2_tui.conversation import Plan
from qwen2_tui.live import LiveReply
from qwen2_tui.pace import Pace
from qwen2_tui.session import Session
from qwen2_tui.widgets.limit import Choice, Offer
from qwen2_tui.widgets.transcript import Turn

if TYPE_CHECKING:
    from qwen2_local.chats import ChatMessage
    from qwen2_tui.screens.chat import ChatScreen
    from qwen2_tui.screens.writing import Task

_TICK_S = 0.05
_NUMBERS_S = 0.25


class Replying:
    """Nothing is told per token: a tick, twenty times a second while something is under way, looks at what came and shows it when it is time."""

    def __init__(self, screen: ChatScreen) -> None:
        self._screen = screen
        self._pace = Pace()
        self._numbers = 0.0
        self._unsaved = ""
        self._behind: list[Session] = []
        self._unsaved_ones: list[Session] = []
        self._timer = screen.set_interval(_TICK_S, self._tick, pause=True)

    def begin(self, plan: Plan, typed: str = "", task: Task | None = None) -> None:
        """Ask for a reply, and show it as it comes. typed: what a person wrote for it, and what for."""
        screen, transcript = self._screen, self._screen.transcript
        session = screen.session
        screen.offers.hide()
        screen.show_turns()
        transcript.truncate(plan.kept)
        if plan.asked is not None:
            transcript.append(plan.asked)
        transcript.begin_stream(plan.reply)
        transcript.selected = len(transcript.turns) - 1 if transcript.has_focus else None
        conversation = session.conversation
        number = conversation.number

        def begun() -> None:
            if number is None:
                conversation.keep_options()
            if typed and not conversation.temporary:
                screen.writing.clear_draft(conversation, number)

        session.begin(plan, typed, task, begun)
        self._timer.resume()
        screen.reply_changed()

    def leave(self, session: Session) -> None:
        """The person looks at another conversation; a reply goes on, and what could not be saved is not let go of."""
        if session.running:
            self._behind.append(session)
        elif session.conversation.unsaved:
            self._unsaved_ones.append(session)
            self._screen.run_worker(self.save, thread=True, group="save")

    def save(self) -> None:
        """In a thread: try again to save what could not be."""
        for session in (*self._unsaved_ones, self._screen.session):
            session.conversation.save()

    def come_back(self, number: int) -> Session | None:
        """The conversation of that number, if a reply went on in it meanwhile, or the disk does not have all of it."""
        self._unsaved_ones = [one for one in self._unsaved_ones if one.conversation.unsaved]
        for kept in (self._behind, self._unsaved_ones):
            found = next((one for one in kept if one.conversation.number == number), None)
            if found is not None:
                kept.remove(found)
                return found
        return None

    def show(self, session: Session) -> None:
        """All of a conversation, with the reply that is on its way."""
        transcript, plan = self._screen.transcript, session.plan
        if plan is None:
            transcript.show(session.conversation.turns())
            return
        before = session.conversation.turns()[: plan.kept]
        transcript.show((*before, plan.asked) if plan.asked is not None else before)
        transcript.begin_stream(session.growing())
        self._timer.resume()

    def leave_all(self) -> list[LiveReply]:
        """The app ends: all of them stop. Those to wait for."""
        running = [session.live for session in self.all() if session.live is not None]
        for live in running:
            live.stop()
        return running

    def all(self) -> list[Session]:
        """Those with a reply under way."""
        return [one for one in (self._screen.session, *self._behind) if one.running]

    def _tick(self) -> None:
        screen = self._screen
        session = screen.session
        for other in [one for one in self._behind if one.live is not None and one.live.over]:
            self._behind.remove(other)
            plan, live = other.settle()
            self.leave(other)
            conversation = other.conversation
            if other.typed and not conversation.temporary and not _kept(plan, conversation.messages):
                screen.run_worker(partial(screen.writing.give_back_later, conversation.number, other.typed), thread=True, group="draft")
            if isinstance(live.error, WorkerDied):
                self._failed(live.error)
            elif live.error is not None:
                screen.qwen.problem(live.error)
            screen.chats_changed()
        if session.live is not None:
            if session.live.over:
                self._end(session)
            elif self._pace.wait() == 0.0:
                self._pace.flushed()
                text = session.take()
                if text:
                    screen.transcript.feed(text)
                # With the text: each drawing costs about the same, whatever changed.
                if time.monotonic() - self._numbers >= _NUMBERS_S:
                    self._numbers = time.monotonic()
                    screen.gauges.show()
        if not self.all():
            self._timer.pause()

    def _end(self, session: Session) -> None:
        screen, conversation = self._screen, session.conversation
        growing = session.growing()
        plan, live = session.settle()
        error = live.error
        note = clean_line(error.what) if isinstance(error, WorkerDied) else ""
        self._settle(plan, growing, conversation.turns(plan.kept), note)
        messages = conversation.messages
        if session.task is not None and not _kept(plan, messages):
            screen.writing.give_back(session.typed, session.task)
        screen.gauges.last = live.progress()
        if error is not None:
            self._failed(error)
        elif plan.asked is None and plan.reply.count > 1 and len(messages) > plan.kept and conversation.repeated(plan.kept):
            screen.qwen.tell("The same reply again: sampling is greedy, or has a fixed seed. The settings change that.")
        if conversation.unsaved and conversation.unsaved != self._unsaved:
            screen.qwen.tell(f"The chat is not saved: {conversation.unsaved}", problem=True)
        self._unsaved = conversation.unsaved
        screen.reply_changed()

    def _settle(self, plan: Plan, growing: Turn, turns: tuple[Turn, ...], note: str) -> None:
        """The transcript as the conversation is now. note: under its end."""
        transcript = self._screen.transcript
        if turns and note:
            footer = " · ".join(part for part in (note, turns[-1].footer) if part)
            turns = (*turns[:-1], replace(turns[-1], footer=footer))
        shown = transcript.turns[plan.kept :]
        if [one.role for one in turns] == [one.role for one in shown]:
            for index, (old, new) in enumerate(zip(shown[:-1], turns[:-1], strict=True), plan.kept):
                if old != new:
                    transcript.replace(index, new)
            transcript.end_stream(turns[-1])
            return
        # The reply came to nothing: what was there before is there again.
        transcript.end_stream(growing)
        transcript.truncate(plan.kept)
        for turn in turns:
            transcript.append(turn)

    def _failed(self, error: Exception) -> None:
        screen = self._screen
        if isinstance(error, WorkerDied):
            screen.qwen.host.crash(error)
            words = f"{error.what} The conversation is safe, and so is what came of the reply."
            screen.offers.show(Offer("crash", words, (Choice("again", "start it again"), Choice("safe", "start it in safe mode")), grave=True))
        elif isinstance(error, ContextOverflow):
            screen.gauges.overflowed(error)
        elif isinstance(error, UsageError):
            screen.qwen.problem(error)
        elif isinstance(error, Qwen2LocalError):
            screen.offers.show(Offer("failed", str(error), (Choice("retry", "try again"),), grave=True))
        else:
            screen.qwen.problem(error)
            screen.offers.show(Offer("failed", "The reply failed.", (Choice("retry", "try again"),), grave=True))


def _kept(plan: Plan, messages: Sequence[ChatMessage]) -> bool:
    """Is what a person wrote for a reply that is over in its conversation?"""
    there = messages[plan.kept].text if len(messages) > plan.kept else ""
    return there == plan.text if plan.asked is not None else there.startswith(plan.text)

"""The chat: the list of chats, the conversation, the message, and honest numbers. It joins them; each has a room of its own.

replying   replies on their way
writing    what is being written: draft, files, edits
acting     what is done with a turn
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, ClassVar, cast

from textual import on
from textual.app import ComposeResult, SystemCommand
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.screen import Screen
from textual.widgets import Footer, Static, TextArea

from qwen2_local.chats.attached import Attached, joined
from qwen2_local.errors import ContextOverflow, Qwen2LocalError
from qwen2_tui.conversation import Conversation, Measure
from qwen2_tui.events import ChatsChanged, HostChanged, SettingsChanged
from qwen2_tui.keys import bind
from qwen2_tui.live import Progress
from qwen2_tui.screens.acting import Acting
from qwen2_tui.screens.replying import Replying
from qwen2_tui.screens.writing import Task, Writing
from qwen2_tui.session import Session
from qwen2_tui.widgets.composer import Composer
from qwen2_tui.widgets.limit import Choice, Offer, OfferBar, of_context
from qwen2_tui.widgets.sidebar import Sidebar
from qwen2_tui.widgets.statusline import Numbers, StatusLine
from qwen2_tui.widgets.topline import TopLine
from qwen2_tui.widgets.transcript import Transcript
from qwen2_tui.widgets.welcome import Welcome

if TYPE_CHECKING:
    from qwen2_local.chat import Chat
    from qwen2_tui.app import QwenApp
    from qwen2_tui.model import Model

_MEMORY_S = 2.0
_LEAVE_S = 1.0


class ChatScreen(Screen[None]):
    """See the module."""

    CSS = """
    ChatScreen {
        #body { height: 1fr; }
        #main { width: 1fr; }
        #transcript { height: 1fr; }
        #notes { height: auto; max-height: 4; padding: 0 2; color: $text-muted; display: none; }
    }
    """
    AUTO_FOCUS = "#composer"
    BINDINGS: ClassVar[list[BindingType]] = [
        *(bind(f"offer.{number}", f"offer({number})", priority=True) for number in range(1, 5)),
        # From the message, which is last on the screen, to the conversation, and on to the chats.
        Binding("tab", "app.focus_previous", show=False),
        Binding("shift+tab", "app.focus_next", show=False),
    ]

    def compose(self) -> ComposeResult:
        """From the top to the bottom."""
        self.session = Session(Conversation(self.qwen.store))
        self.last: Progress | None = None
        self._measure: Measure | None = None
        self._opening = 0
        yield TopLine()
        with Horizontal(id="body"):
            yield Sidebar(self.qwen.store, shown=self.qwen.settings.sidebar, id="sidebar")
            with Vertical(id="main"):
                yield Welcome(id="welcome")
                yield Transcript(id="transcript")
                yield OfferBar(id="offers")
                yield Static(id="notes", markup=False)
                yield Composer(id="composer")
        yield StatusLine(id="status")
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        """Begin with the chat that was asked for."""
        self.transcript = self.query_one("#transcript", Transcript)
        self.offers = self.query_one("#offers", OfferBar)
        self.composer = self.query_one("#composer", Composer)
        self.sidebar = self.query_one("#sidebar", Sidebar)
        self.writing = Writing(self, self.composer, self.query_one("#notes", Static))
        self.replying = Replying(self)
        self.acting = Acting(self)
        self.set_interval(_MEMORY_S, self.show_numbers)
        self.show_turns()
        self.run_worker(self._begin, thread=True, group="open")

    # What others ask

    @property
    def qwen(self) -> QwenApp:
        """The app, by its own type."""
        return cast("QwenApp", self.app)

    @property
    def number(self) -> int | None:
        """Of the chat that is open; None: it is not saved (yet)."""
        return self.session.conversation.number

    @property
    def chat(self) -> Chat | None:
        """The chat that is open; None until there is a model."""
        return self.session.conversation.chat

    @property
    def temporary(self) -> bool:
        """Does this chat leave nothing on the disk?"""
        return self.session.conversation.temporary

    @property
    def busy(self) -> bool:
        """Is a reply under way in this chat?"""
        return self.session.running

    def new_chat(self, temporary: bool = False) -> None:
        """An empty one. A reply that is under way goes on behind it."""
        session = Session(Conversation(self.qwen.store, temporary=temporary))
        self.enter(session, "" if temporary else None)

    def open_chat(self, number: int) -> None:
        """A saved one. A reply that is under way goes on behind it."""
        if number == self.number:
            self.focus_composer()
            return
        self._opening += 1
        self.run_worker(partial(self._open, self._opening, number, self.qwen.host.model), thread=True, group="open")

    def ask(self, text: str) -> None:
        """As if it had been typed and sent."""
        self.composer.write(text)
        self.composer.action_send()

    def stop(self) -> bool:
        """Ends the reply that is under way, and keeps what came. False: there is none. Does not wait."""
        live = self.session.live
        if live is None:
            return self.acting.stop()
        live.stop()
        return True

    def back(self) -> None:
        """Escape: the reply stops; else what was begun is given up; else back to the message."""
        if self.stop() or self.writing.give_up():
            return
        if self.composer.has_focus:
            self.offers.hide()
        self.transcript.selected = None
        self.focus_composer()

    def focus_composer(self) -> None:
        """To where one writes."""
        self.composer.focus()

    def search(self) -> None:
        """To the search in the list of chats."""
        self.sidebar.focus_search()

    def toggle_sidebar(self) -> None:
        """Shows the list of chats, or hides it."""
        self.sidebar.toggle()
        if not (self.sidebar.shown or self.sidebar.drawer):
            self.focus_composer()

    def undo(self) -> None:
        """The chats that were deleted last come back."""
        from qwen2_tui import arrange

        self.run_worker(arrange.undo(self.qwen))

    def leave(self) -> None:
        """In a thread, at the app's end: the draft and what came of replies are kept."""
        running = [session.live for session in self.replying.all() if session.live is not None]
        for live in running:
            live.stop()
        self.writing.keep_last()
        for live in running:
            live.wait(_LEAVE_S)

    def commands(self) -> Iterable[SystemCommand]:
        """For the palette."""
        return self.acting.commands()

    # Chats

    def _begin(self) -> None:
        """In a thread: the chat that the app was opened with, or the empty one; and what the last visit left."""
        opening, store = self.qwen.opening, self.qwen.store
        number = opening.chat
        if number is None and opening.continue_last:
            newest = max(store.summaries(), key=lambda one: (one.used, one.id), default=None)
            number = newest.id if newest is not None else None
        questions = store.questions()
        broken = store.last_broken() if number is None and not opening.temporary else None
        title = store.summary(broken).title if broken is not None else ""
        draft = store.draft(None)
        self.app.call_from_thread(self._began, number, questions, broken, title, draft)

    def _began(self, number: int | None, questions: Sequence[str], broken: int | None, title: str, draft: str) -> None:
        self.composer.questions = questions
        if number is not None:
            self.open_chat(number)
            return
        if self.qwen.opening.temporary:
            self.new_chat(temporary=True)
        elif not self.composer.text:
            self.writing.open(draft)
        if broken is not None:
            self._broken = broken
            self.offers.show(Offer("last", f"The last chat ended in the middle: {title}", (Choice("open", "open it"), Choice("leave", "leave it"))))
        self._use()

    def _open(self, turn: int, number: int, model: Model | None) -> None:
        """In a thread."""
        try:
            session = self.replying.come_back(number)
            if session is None:
                session = Session(Conversation(self.qwen.store, number))
                if model is not None:
                    session.conversation.use(model)
            draft = self.qwen.store.draft(number)
        except Qwen2LocalError as error:
            self.app.call_from_thread(self.qwen.problem, error)
            return
        self.app.call_from_thread(self._opened, turn, session, draft)

    def _opened(self, turn: int, session: Session, draft: str) -> None:
        if turn == self._opening:
            self.enter(session, draft)

    def enter(self, session: Session, draft: str | None) -> None:
        """Shows another conversation. draft: what was being written there; None: ask the store."""
        self._opening += 1
        self.writing.keep_draft()
        self.replying.leave(self.session)
        self.session, self.last, self._measure = session, None, None
        self.offers.hide()
        if draft is None:
            draft = self.qwen.store.draft(None)
        self.writing.open(draft)
        self.replying.show(session)
        self.show_turns()
        self.focus_composer()
        self._offer_broken()
        self.reply_changed()

    # The model

    @property
    def ready(self) -> bool:
        """Can this conversation be gone on with at once?"""
        host = self.qwen.host
        return host.state.phase == "ready" and host.model is not None and self.session.conversation.model is host.model

    def _use(self) -> None:
        """Takes the host's model for this conversation, as soon as there is one and nothing is under way."""
        model, session = self.qwen.host.model, self.session
        if self.qwen.host.state.phase != "ready" or model is None or session.running:
            return
        if session.conversation.model is model:
            self._used(session)
        else:
            self.run_worker(partial(self._take, session, model), thread=True, group="use", exclusive=True)

    def _take(self, session: Session, model: Model) -> None:
        """In a thread."""
        try:
            session.conversation.use(model, self.qwen.settings.chat.system)
        except Qwen2LocalError as error:
            self.app.call_from_thread(self.qwen.problem, error)
            return
        self.app.call_from_thread(self._taken, session)

    def _taken(self, session: Session) -> None:
        """The model is there for a conversation that was just opened, or that another model, or one that died, was used for."""
        if session is self.session:
            self.offers.hide("crash", "failed", "context")
            self._offer_broken()
        self._used(session)

    def _offer_broken(self) -> None:
        """Whoever comes to a conversation that ends in the middle may go on with it."""
        conversation = self.session.conversation
        broken = conversation.broken()
        if broken and self.offers.offer is None and not self.busy and self.writing.waiting is None:
            asked = conversation.messages[-1].role == "user"
            choices = (Choice("retry", "answer it"),) if asked else (Choice("continue", "go on with it"), Choice("retry", "write another"))
            self.offers.show(Offer("broken", broken, (*choices, Choice("leave", "leave it"))))

    def _used(self, session: Session) -> None:
        if session is not self.session or session.conversation.model is not self.qwen.host.model:
            self._use()
            return
        self.writing.count()
        self.show_numbers()
        if self.writing.waiting is not None:
            text, self.writing.waiting = self.writing.waiting, None
            self.writing.submit(text)

    def on_host_changed(self, event: HostChanged) -> None:
        """The model came, went, or is on its way."""
        self._use()
        self.show_numbers()

    def on_chats_changed(self, event: ChatsChanged) -> None:
        """Chats were renamed, deleted or brought back."""
        if self.number is not None and self.number in event.gone:
            self.stop()
            self.new_chat()
        self.chats_changed()

    def on_settings_changed(self, event: SettingsChanged) -> None:
        """An empty chat begins as the settings say now."""
        self.sidebar.shown = event.settings.sidebar
        if self.ready and self.session.conversation.empty and not self.busy:
            self.session.conversation.model = None
            self._use()

    # What is sent

    @on(Composer.Sent)
    def _sent(self, event: Composer.Sent) -> None:
        self._send(event.text)

    @on(Welcome.Picked)
    def _picked(self, event: Welcome.Picked) -> None:
        self.ask(event.text)

    def _send(self, text: str) -> None:
        host = self.qwen.host
        if self.busy:
            self.qwen.tell("The reply is still being written: esc stops it.")
        elif self.ready:
            self.writing.submit(text)
        elif host.state.phase == "failed" and not host.state.crashed:
            self.qwen.tell(f"There is no model: {host.state.words}", problem=True)
        else:
            self.writing.wait(text)
            if host.state.crashed:
                host.restart(safe=host.state.wish.safe)

    def ask_with(self, text: str, files: Sequence[Attached], task: Task) -> None:
        """What was written, with the files that it mentions: a question, or another wording of a turn."""
        if not self.ready or self.busy:
            self._send(text)
            return
        message = joined(text, files)
        if task.kind == "question" and self._measure is not None and self._measure.left <= 0 and self.writing.counted == text:
            self.measured(self._measure)  # what is known not to fit is not sent: the choices say what can be done
            return
        plan = self.acting.plan(task, message)
        if plan is None:
            return
        self.writing.sent()
        if task.kind == "question":
            self.composer.questions = [text, *(one for one in self.composer.questions if one != text)]
        self.replying.begin(plan, text)

    # What is shown

    def show_turns(self) -> None:
        """The conversation, or the welcome where there is none."""
        empty = self.session.conversation.empty and not self.busy
        self.query_one("#welcome", Welcome).display = empty
        self.transcript.display = not empty

    def reply_changed(self) -> None:
        """A reply began, or is over."""
        self.show_turns()
        if not self.busy:
            self._use()
        self.chats_changed()
        self.show_numbers()
        self.refresh_bindings()

    def chats_changed(self) -> None:
        """Something is new in the list of chats."""
        running = {session.conversation.number for session in self.replying.all()}
        self.sidebar.mark(self.number, running=running, temporary=self.temporary)
        self.sidebar.refresh_chats()

    def measured(self, measure: Measure) -> None:
        """The context was counted."""
        self._measure = measure
        conversation = self.session.conversation
        offer = of_context(
            measure, turns=sum(one.role == "user" for one in conversation.messages), shortened=conversation.overflow != "error",
            bounded=self.qwen.host.state.wish.context is not None,
        )  # fmt: skip
        if offer is None:
            self.offers.hide("context")
        elif self.offers.offer is None or self.offers.offer.kind in ("context", "broken", "last"):
            self.offers.show(offer)
        self.show_numbers()

    def overflowing(self, error: ContextOverflow) -> Offer:
        """What can be done where the model refused a message as too long."""
        turns = sum(one.role == "user" for one in self.session.conversation.messages)
        full = Measure(1, 0, 1)
        wish = self.qwen.host.state.wish
        offer = of_context(full, turns=turns + 1, shortened=self.session.conversation.overflow != "error", bounded=wish.context is not None)
        return Offer("context", error.what, offer.choices if offer is not None else ())

    def show_numbers(self) -> None:
        """The status line, as things are now."""
        host, live = self.qwen.host, self.session.live
        progress = live.progress() if live is not None else self.last
        measure, words = self._measure, ""
        if live is not None and progress is not None and measure is not None and progress.prompt:
            measure = Measure(progress.prompt + progress.written, progress.cached, measure.most)
        if host.state.phase == "loading" or host.state.phase == "failed":
            words = host.state.words
        self.query_one("#status", StatusLine).show(Numbers(words, progress, host.memory(), measure, live is None))

    # What happens

    @on(TextArea.Changed, "#composer")
    def _typed(self) -> None:
        self.writing.changed()

    @on(Composer.Choices)
    def _choices(self, event: Composer.Choices) -> None:
        self.writing.say(event.words)

    @on(Transcript.Action)
    def _act(self, event: Transcript.Action) -> None:
        self.acting.act(event.name, event.index)

    @on(OfferBar.Chosen)
    def _chosen(self, event: OfferBar.Chosen) -> None:
        self.offers.hide()
        if event.kind == "last" and event.key == "open":
            self.open_chat(self._broken)
        else:
            self.acting.choose(event.key)

    def action_walk(self, step: int) -> None:
        """From the message to the conversation, to the list of chats, and round."""
        conversation = self.transcript if self.transcript.display else self.query_one("#choices")
        rooms = [(self.composer, self.composer), (self.query_one("#main"), conversation)]
        if self.sidebar.display:
            rooms.append((self.sidebar, self.sidebar.query_one("#chats")))
        focused = self.focused
        at = next((number for number, (room, _) in enumerate(rooms) if focused is not None and (room is focused or room in focused.ancestors)), 0)
        rooms[(at + step) % len(rooms)][1].focus()

    def action_offer(self, number: int) -> None:
        """One of the choices that are offered."""
        self.offers.choose(number)

    @on(Sidebar.Opened)
    def _wanted(self, event: Sidebar.Opened) -> None:
        self.open_chat(event.chat)

    @on(Sidebar.New)
    def _new(self, event: Sidebar.New) -> None:
        self.new_chat(temporary=event.temporary)

    @on(Sidebar.Left)
    def _left(self) -> None:
        self.focus_composer()

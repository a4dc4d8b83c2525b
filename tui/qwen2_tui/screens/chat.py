"""The chat: the list of chats, the conversation, the message, and honest numbers. It joins them; each has a room of its own.

replying   replies on their way
writing    what is being written: draft, files, edits
acting     what is done with a turn
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace
from typing import TYPE_CHECKING, ClassVar

from textual import on
from textual.app import SystemCommand
from textual.binding import Binding, BindingType
from textual.widgets import TextArea

from qwen2_tui.conversation import Conversation
from qwen2_tui.events import ChatsChanged, HostChanged, SettingsChanged
from qwen2_tui.keys import bind
from qwen2_tui.screens.acting import Acting
from qwen2_tui.screens.entering import Entering
from qwen2_tui.screens.gauging import Gauges
from qwen2_tui.screens.layout import ChatLayout
from qwen2_tui.screens.replying import Replying
from qwen2_tui.screens.sending import Sending
from qwen2_tui.screens.writing import Writing
from qwen2_tui.session import Session
from qwen2_tui.settings import ChatSettings, differing, with_options
from qwen2_tui.widgets.composer import Composer
from qwen2_tui.widgets.limit import OfferBar
from qwen2_tui.widgets.sidebar import Sidebar
from qwen2_tui.widgets.transcript import Transcript
from qwen2_tui.widgets.welcome import Welcome

if TYPE_CHECKING:
    from qwen2_local.chat import Chat

_LEAVE_S = 1.0
_OF_CHATS = {one.name for one in fields(ChatSettings)}


class ChatScreen(ChatLayout):
    """See the module."""

    AUTO_FOCUS = "#composer"
    BINDINGS: ClassVar[list[BindingType]] = [
        bind("turn.stop", "stop_reply", show=True),
        *(bind(f"offer.{number}", f"offer({number})", priority=True) for number in range(1, 5)),
        # From the message, which is last on the screen, to the conversation, and on to the chats.
        Binding("tab", "app.focus_previous", show=False),
        Binding("shift+tab", "app.focus_next", show=False),
        # Global ones, that the footer teaches them here.
        *(bind(f"app.{name}", f"app.{name}", show=True, priority=True) for name in ("new", "models", "help")),
    ]

    def on_mount(self) -> None:
        """Begin with the chat that was asked for."""
        self.writing = Writing(self)
        self.replying = Replying(self)
        self.acting = Acting(self)
        self.sending = Sending(self)
        self.entering = Entering(self)
        self.gauges = Gauges(self)
        self.show_turns()
        self.entering.begin()

    # What others ask

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

    @property
    def chat_settings(self) -> ChatSettings:
        """How replies are asked for in this chat."""
        return with_options(self.qwen.settings.chat, self.session.conversation.options)

    def change_chat(self, settings: ChatSettings) -> None:
        """Ask for replies in this chat like that. A system prompt counts only in an empty one."""
        conversation = self.session.conversation
        others = {name: value for name, value in conversation.options.items() if name not in _OF_CHATS}
        conversation.options = {**others, **differing(settings, self.qwen.settings.chat)}
        self.run_worker(conversation.keep_options, thread=True, group="options")
        self._renew()

    def new_chat(self, temporary: bool = False) -> None:
        """An empty one. A reply that is under way goes on behind it."""
        here = self.number is None and not self.temporary  # what is being written is for a new chat already
        draft = "" if temporary else self.writing.draft if here else self.writing.unsent
        self.entering.enter(Session(Conversation(self.qwen.store, temporary=temporary)), draft)

    def open_chat(self, number: int, message: int | None = None) -> None:
        """A saved one, at its message `message` if that is named. A reply that is under way goes on behind it."""
        here = message is None or any(one.id == message for one in self.session.conversation.messages)
        if number == self.number and (here or self.busy):
            self.acting.select(message)
        else:
            self.entering.open(number, message)

    def ask(self, text: str) -> None:
        """As if it had been typed and sent."""
        self.writing.ask(text)
        self.composer.action_send()

    def stop(self) -> bool:
        """Ends the reply that is under way, and keeps what came. False: there is none. Does not wait."""
        live = self.session.live
        if live is None:
            return self.acting.stop()
        live.stop()
        return True

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """The footer says how to stop a reply while there is one."""
        return action != "stop_reply" or (self.is_mounted and self.busy)

    def action_stop_reply(self) -> None:
        """Escape, while a reply is under way."""
        self.back()

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
        settings = self.qwen.settings
        if self.sidebar.shown != settings.sidebar:
            self.qwen.change_settings(replace(settings, sidebar=self.sidebar.shown))
        if not (self.sidebar.shown or self.sidebar.drawer):
            self.focus_composer()

    def undo(self) -> None:
        """The chats that were deleted last come back."""
        from qwen2_tui import arrange

        self.run_worker(arrange.undo(self.qwen))

    def leave(self) -> None:
        """In a thread, at the app's end: the draft and what came of replies are kept."""
        running = self.replying.leave_all()
        self.writing.keep_last()
        for live in running:
            live.wait(_LEAVE_S)
        self.replying.save()

    def commands(self) -> Iterable[SystemCommand]:
        """For the palette."""
        return self.acting.commands()

    # What changed elsewhere

    def on_host_changed(self, event: HostChanged) -> None:
        """The model came, went, or is on its way."""
        self.entering.use()
        self.gauges.show()

    def on_chats_changed(self, event: ChatsChanged) -> None:
        """Chats were renamed, deleted or brought back."""
        if self.number is not None and self.number in event.gone:
            self.stop()
            self.new_chat()
        self.chats_changed()

    def on_settings_changed(self, event: SettingsChanged) -> None:
        """An empty chat begins as the settings say now."""
        self.sidebar.shown = event.settings.sidebar
        self.composer.name_keys()
        self._renew()

    def _renew(self) -> None:
        if self.session.conversation.empty and not self.busy:
            self.session.conversation.model = None
            self.entering.use()

    # What is sent

    @on(Composer.Sent)
    def _sent(self, event: Composer.Sent) -> None:
        self.sending.send(event.text)

    @on(Welcome.Picked)
    def _picked(self, event: Welcome.Picked) -> None:
        self.ask(event.text)

    # What is shown

    def reply_changed(self) -> None:
        """A reply began, or is over."""
        self.composer.cursor_blink = not self.busy  # each blink draws the screen, and the processor is the model's
        self.show_turns()
        if not self.busy:
            self.entering.use()
        self.chats_changed()
        self.gauges.show()
        self.refresh_bindings()

    def chats_changed(self) -> None:
        """Something is new in the list of chats."""
        running = {session.conversation.number for session in self.replying.all()}
        self.sidebar.mark(self.number, running=running, temporary=self.temporary)
        self.sidebar.refresh_chats()

    # What happens

    @on(TextArea.Changed, "#composer")
    def _typed(self) -> None:
        self.writing.changed()

    @on(Composer.Choices)
    def _choices(self, event: Composer.Choices) -> None:
        self.writing.choose(event.words)

    @on(Transcript.Action)
    def _act(self, event: Transcript.Action) -> None:
        self.acting.act(event.name, event.index)

    @on(OfferBar.Chosen)
    def _chosen(self, event: OfferBar.Chosen) -> None:
        self.offers.hide()
        if event.kind == "last" and event.key == "open":
            self.entering.open_broken()
        else:
            self.acting.choose(event.key)

    def action_offer(self, number: int) -> None:
        """One of the choices that are offered."""
        self.offers.choose(number)

    @on(Sidebar.Opened)
    def _wanted(self, event: Sidebar.Opened) -> None:
        self.open_chat(event.chat, event.message)

    @on(Sidebar.New)
    def _new(self, event: Sidebar.New) -> None:
        self.new_chat(temporary=event.temporary)

    @on(Sidebar.Left)
    def _left(self) -> None:
        self.focus_composer()

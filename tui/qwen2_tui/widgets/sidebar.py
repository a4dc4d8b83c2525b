"""The saved chats beside the conversation: newest first, found by their words as one types. Below 80 columns it is a drawer over it.

It asks the store in threads, and does nothing with chats itself: `arrange` renames and deletes, the chat screen opens.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar, cast

from textual import events, on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.message import Message
from textual.reactive import reactive
from textual.widget import Widget
from textual.widgets import Button, Input, Static

from qwen2_local.chats import ChatStore
from qwen2_local.chats.words import words_of
from qwen2_local.errors import Qwen2LocalError
from qwen2_local.sanitize import clean_line
from qwen2_tui import keys
from qwen2_tui.widgets.chatlist import ChatList, Row
from qwen2_tui.widgets.dialogs import Line

if TYPE_CHECKING:
    from qwen2_tui.app import QwenApp

NARROW = 80
"""Below so many columns it is a drawer."""

_FOUND = 100
_TYPING_S = 0.06


class Sidebar(Vertical):
    """Chats to open.

    shown: beside the conversation, where there is room. drawer: over it, where there is none.
    """

    DEFAULT_CSS = """
    Sidebar {
        width: 30; height: 1fr; border-right: solid $surface-lighten-1; display: none;
        &.-shown, &.-drawer { display: block; }
        &.-drawer { overlay: screen; position: absolute; width: 40; max-width: 90%; background: $surface; border-right: outer $primary; }
        #search { padding: 0 1; background: $boost; }
        #temporary { display: none; color: $text-warning; text-style: italic; }
        #temporary.-shown { display: block; }
        #new { height: 1; }
        #new Button { min-width: 0; background: transparent; color: $text-muted; }
        #new Button:hover { color: $text; }
    }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        keys.bind("chats.search", "search"),
        keys.bind("chats.rename", "arrange('rename')", show=True),
        keys.bind("chats.pin", "arrange('pin')", show=True),
        keys.bind("chats.delete", "arrange('delete')", show=True),
        keys.bind("chats.export", "arrange('export')", show=True),
        Binding("escape", "leave", show=False),
    ]

    shown: reactive[bool] = reactive(True)
    drawer: reactive[bool] = reactive(False)
    query_text: reactive[str] = reactive("", init=False)

    @dataclass
    class Opened(Message):
        """A chat is to be opened, at one of its messages if that was searched for."""

        chat: int
        message: int | None

    @dataclass
    class New(Message):
        """A new chat is wanted; temporary: one that leaves nothing on the disk."""

        temporary: bool

    @dataclass
    class Looked(Message, bubble=False):
        """What a thread has found in the store; posted, not called, as the app may be gone meanwhile."""

        asked: int
        words: list[str]
        rows: list[Row]
        problem: str = ""

    @dataclass
    class Left(Message):
        """The keyboard is to go back to where one writes."""

    def __init__(self, store: ChatStore, *, shown: bool = True, id: str | None = None) -> None:
        super().__init__(id=id)
        self._store = store
        self._narrow = False
        self._asked = 0
        self.set_reactive(Sidebar.shown, shown)

    def compose(self) -> ComposeResult:
        """A line to search in, the chats, and two ways to begin."""
        yield Line(placeholder="/ search", id="search")
        yield Static("▌ temporary chat: not saved", id="temporary", markup=False)
        yield ChatList(id="chats")
        with Horizontal(id="new"):
            for name, label in (("new-chat", "+ new"), ("new-temporary", "+ temporary")):
                button = Button(label, id=name, compact=True)
                button.can_focus = False  # the keyboard has ctrl+n and ctrl+t
                yield button

    def on_mount(self) -> None:
        """Fills it, and keeps its times true."""
        self.screen.screen_layout_refresh_signal.subscribe(self, lambda _: self._fit())
        self.watch(self.screen, "focused", self._focus_moved, init=False)
        self.set_interval(60, self.refresh_chats)
        self._fit()
        self._place()
        self.refresh_chats()

    @property
    def highlighted(self) -> int | None:
        """The chat under the cursor."""
        row = self._list.row
        return row.chat if row is not None else None

    @property
    def _list(self) -> ChatList:
        return self.query_one("#chats", ChatList)

    # What others ask of it

    def refresh_chats(self) -> None:
        """Looks again at what there is, in the background."""
        self._asked += 1
        self.run_worker(partial(self._look, self._asked, self.query_text), thread=True, group="chats", exclusive=True)

    def mark(self, chat: int | None, *, running: Collection[int | None] = (), temporary: bool = False) -> None:
        """Which chat is open, and in which a reply is under way: None stands for one that is not saved. temporary: the open one is none of these."""
        self._list.opened, self._list.running = chat, frozenset(running)
        said = self.query_one("#temporary", Static)
        said.set_class(temporary, "-shown")
        said.update(f"{'●' if None in running else '▌'} temporary chat: not saved", layout=False)

    def focus_search(self) -> None:
        """To the search, wherever it is."""
        self._open()
        # At once: `focus` would wait behind letters that are typed right after the key, and they would go into the message.
        self.screen.set_focus(self.query_one("#search", Line))

    def toggle(self) -> None:
        """Shows it, or hides it; where there is little room, for as long as it is used."""
        if self._narrow:
            self.drawer = not self.drawer
            if self.drawer:
                self._list.focus()
        else:
            self.shown = not self.shown

    # What it does

    def _open(self) -> None:
        if self._narrow:
            self.drawer = True
        else:
            self.shown = True

    def _fit(self) -> None:
        narrow = self.app.size.width < NARROW
        if narrow != self._narrow:
            self._narrow = narrow
            self.drawer = False
            if narrow and self.has_focus_within:  # else what is typed goes into a list that nobody sees
                self.post_message(self.Left())
            self._place()

    def _focus_moved(self, focused: Widget | None) -> None:
        """Who goes on elsewhere is done with the drawer."""
        if focused is not None and self not in focused.ancestors:
            self.drawer = False

    def watch_shown(self) -> None:
        """Makes room."""
        self._place()

    def watch_drawer(self) -> None:
        """Over the conversation."""
        self._place()

    def _place(self) -> None:
        self.set_class(self.drawer, "-drawer")
        self.set_class(self.shown and not self._narrow, "-shown")

    def _look(self, asked: int, query: str) -> None:
        """In a thread: what there is, or what was found."""
        try:
            words = words_of(query)
            if words:
                hits = self._store.search(query, limit=_FOUND)
                rows = [Row(one.chat.id, one.chat.title, one.chat.used, one.chat.pinned, one.message, one.excerpt) for one in hits]
            else:
                rows = [Row(one.id, one.title, one.used, one.pinned) for one in self._store.summaries()]
        except Qwen2LocalError as error:
            self.post_message(self.Looked(asked, [], [], error.what))
        else:
            self.post_message(self.Looked(asked, words, rows))

    def on_sidebar_looked(self, event: Sidebar.Looked) -> None:
        """Shows it, unless another answer is on its way."""
        if event.problem:
            self.notify(clean_line(event.problem), severity="warning", markup=False)
        elif event.asked == self._asked:
            empty = "Nothing was found." if event.words else "No chats yet."
            self._list.show(event.rows, now=time.time(), words=event.words, empty=empty)

    @on(Input.Changed, "#search")
    def _typed(self, event: Input.Changed) -> None:
        self.query_text = event.value
        # A fast typist asks once.
        self.set_timer(_TYPING_S, lambda: self.refresh_chats() if event.value == self.query_text else None)

    @on(Input.Submitted, "#search")
    def _entered(self) -> None:
        self._list.action_choose()

    @on(ChatList.Chosen)
    def _chosen(self, event: ChatList.Chosen) -> None:
        self.drawer = False
        self.post_message(self.Opened(event.row.chat, event.row.message))

    @on(Button.Pressed)
    def _begin(self, event: Button.Pressed) -> None:
        event.stop()
        self.drawer = False
        self.post_message(self.New(temporary=event.button.id == "new-temporary"))

    def on_key(self, event: events.Key) -> None:
        """Down leads from the search into what was found."""
        if event.key == "down" and self.query_one("#search").has_focus:
            self._list.focus()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """What is done with a chat needs one, and the keyboard in the list."""
        return action != "arrange" or (self._list.has_focus and self.highlighted is not None)

    def action_arrange(self, what: str) -> None:
        """Does something with the chat under the cursor."""
        chat, app = self.highlighted, cast("QwenApp", self.app)
        if chat is None:
            return
        from qwen2_tui import arrange

        doing = {"rename": arrange.rename, "pin": arrange.pin, "export": arrange.export, "delete": arrange.delete}
        app.run_worker(doing[what](app, chat))

    def action_search(self) -> None:
        """Types what to search for."""
        self.focus_search()

    def action_leave(self) -> None:
        """First the search goes, then the keyboard."""
        if self.query_text:
            self.query_one("#search", Line).value = ""
        else:
            self.drawer = False
            self.post_message(self.Left())

"""A list of chats that draws the lines it shows and no others: as fast with 20,000 chats as with 20."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from rich.cells import cell_len, set_cell_size
from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Size
from textual.message import Message
from textual.reactive import reactive
from textual.scroll_view import ScrollView
from textual.strip import Strip

from qwen2_local.sanitize import clean_line
from qwen2_tui import keys
from qwen2_tui.widgets.rowtext import ago, around, fitted


@dataclass(frozen=True, slots=True)
class Row:
    """A chat in the list. used: seconds since 1970; message and excerpt: of what a search has found in it."""

    chat: int
    title: str
    used: float
    pinned: bool = False
    message: int | None = None
    excerpt: str = ""


class ChatList(ScrollView, can_focus=True):
    """Rows of one line; while `words` are searched for, of two: the title, and the place with the words."""

    ALLOW_SELECT = False
    COMPONENT_CLASSES: ClassVar[set[str]] = {"chats--mark", "chats--open", "chats--muted", "chats--found", "chats--cursor", "chats--hover"}
    DEFAULT_CSS = """
    ChatList {
        height: 1fr; scrollbar-size-vertical: 1; overflow-x: hidden;
        & > .chats--mark { color: $text-accent; }
        & > .chats--open { color: $text-primary; text-style: bold; }
        & > .chats--muted { color: $text-muted; }
        & > .chats--found { color: $text-warning; text-style: bold; }
        & > .chats--hover { background: $panel; }
        & > .chats--cursor { background: $block-cursor-background; color: $block-cursor-foreground; text-style: $block-cursor-text-style; }
    }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "move(-1)", show=False),
        Binding("down,j", "move(1)", show=False),
        Binding("pageup", "page(-1)", show=False),
        Binding("pagedown", "page(1)", show=False),
        Binding("home", "to(0)", show=False),
        Binding("end", "to(-1)", show=False),
        keys.bind("chats.open", "choose", show=True),
    ]

    cursor: reactive[int] = reactive(0, repaint=False)
    hovered: reactive[int | None] = reactive(None, repaint=False)
    opened: reactive[int | None] = reactive(None, init=False)
    running: reactive[frozenset[int | None]] = reactive(frozenset())

    @dataclass
    class Chosen(Message):
        """A row was opened, by key or mouse."""

        row: Row

    def __init__(self, id: str | None = None) -> None:
        super().__init__(id=id)
        self.rows: tuple[Row, ...] = ()
        self.words: tuple[str, ...] = ()
        self.empty = ""
        """What is said where there are no rows."""
        self._now = 0.0
        self._places: dict[int | None, int] = {}
        self._following = False

    @property
    def row(self) -> Row | None:
        """The row under the cursor."""
        return self.rows[self.cursor] if self.cursor < len(self.rows) else None

    @property
    def row_height(self) -> int:
        """Lines of a row."""
        return 2 if self.words else 1

    def show(self, rows: Sequence[Row], *, now: float, words: Sequence[str] = (), empty: str = "") -> None:
        """Other rows; the cursor stays with its chat, or its place. A new search begins at the top."""
        at = self.row
        same = self.words == tuple(words)
        self.rows, self.words, self.empty, self._now = tuple(rows), tuple(words), empty, now
        self._places = {row.chat: place for place, row in enumerate(self.rows)}
        self.hovered = None
        self._arrange()
        if at is None or not same:
            self.set_reactive(ChatList.cursor, 0)
            self.scroll_to(y=0, animate=False)
        else:
            self.set_reactive(ChatList.cursor, max(0, min(self._places.get(at.chat, self.cursor), len(rows) - 1)))
        self._follow()
        self.refresh()

    def watch_opened(self) -> None:
        """The cursor comes to the chat that was opened, once it is in the list: what is done with a chat is done with the one that one sees."""
        self._following = True
        self._follow()

    def _follow(self) -> None:
        if self._following and self.opened in self._places:
            self._following = False
            self.cursor = self._places[self.opened]

    def on_resize(self) -> None:
        """Rows are as wide as the list."""
        self._arrange()

    def _arrange(self) -> None:
        self.virtual_size = Size(self.scrollable_content_region.width, len(self.rows) * self.row_height)

    # Drawing

    def render_line(self, y: int) -> Strip:
        """One line of what is seen."""
        width = self.scrollable_content_region.width
        place, part = divmod(y + self.scroll_offset.y, self.row_height)
        if place >= len(self.rows):
            words = self.empty if y == 0 and not self.rows else ""
            return Strip([Segment(set_cell_size(f" {words}", width), self._style("chats--muted"))]).apply_style(self.rich_style)
        row = self.rows[place]
        strip = self._excerpt(row, width) if part else self._title(row, width)
        if place == self.cursor and self.has_focus:
            strip = Strip([Segment(strip.text)]).apply_style(self._style("chats--cursor"))  # one colour: others might not be read on it
        elif place == self.hovered or (place == self.cursor and self.words):
            strip = strip.apply_style(self._style("chats--hover"))
        return strip.apply_style(self.rich_style)

    def _title(self, row: Row, width: int) -> Strip:
        is_open = row.chat == self.opened
        mark = "●" if row.chat in self.running else "▌" if is_open else " "
        when = f" {ago(self._now - row.used)} " if width >= 20 else ""
        pin = "★ " if row.pinned else ""
        room = max(0, width - 2 - cell_len(pin) - cell_len(when))
        title = fitted(clean_line(row.title) or "(no question yet)", room)
        return Strip([
            Segment(f"{mark} ", self._style("chats--mark")),
            Segment(pin, self._style("chats--mark")),
            Segment(title, self._style("chats--open") if is_open else None),
            Segment(when, self._style("chats--muted")),
        ])  # fmt: skip

    def _excerpt(self, row: Row, width: int) -> Strip:
        text = clean_line(row.excerpt) if row.message is not None else ""
        text, places = around(text, self.words, max(0, width - 3))
        segments, end = [Segment("  ")], 0
        for start, stop in places:
            segments += [Segment(text[end:start], self._style("chats--muted")), Segment(text[start:stop], self._style("chats--found"))]
            end = stop
        segments.append(Segment(text[end:], self._style("chats--muted")))
        return Strip(segments).adjust_cell_length(width)

    def _style(self, name: str) -> Style:
        if name == "chats--muted":
            # Its colour is made of text and background: by itself it would be plain black or white.
            return Style(color=self.get_component_rich_style(name).color)
        return self.get_component_rich_style(name, partial=True)

    # Moving

    def validate_cursor(self, place: int) -> int:
        """Inside of the list."""
        return max(0, min(place, len(self.rows) - 1))

    def watch_cursor(self, old: int, new: int) -> None:
        """The row under it is seen."""
        height, top, seen = self.row_height, self.scroll_offset.y, self.scrollable_content_region.height
        if new * height < top:
            self.scroll_to(y=new * height, animate=False)
        elif (new + 1) * height > top + seen:
            self.scroll_to(y=(new + 1) * height - seen, animate=False)
        self._repaint(old, new)

    def watch_hovered(self, old: int | None, new: int | None) -> None:
        """The row under the mouse."""
        self._repaint(*(place for place in (old, new) if place is not None))

    def _repaint(self, *places: int) -> None:
        for place in places:
            self.refresh_lines(place * self.row_height, self.row_height)

    def action_move(self, by: int) -> None:
        """Some rows on."""
        self.cursor += by

    def action_page(self, by: int) -> None:
        """A screen on."""
        self.cursor += by * max(1, self.scrollable_content_region.height // self.row_height - 1)

    def action_to(self, place: int) -> None:
        """The first row, or the last."""
        self.cursor = place if place >= 0 else len(self.rows) + place

    def action_choose(self) -> None:
        """Opens the row under the cursor."""
        if self.row is not None:
            self.post_message(self.Chosen(self.row))

    def on_click(self, event: events.Click) -> None:
        """Opens the row under the mouse."""
        place = self._at(event)
        if place is not None:
            self.cursor = place
            self.action_choose()

    def on_mouse_move(self, event: events.MouseMove) -> None:
        """Shows which row a click would open."""
        self.hovered = self._at(event)

    def on_leave(self) -> None:
        """None."""
        self.hovered = None

    def _at(self, event: events.MouseEvent) -> int | None:
        place = (event.y + self.scroll_offset.y) // self.row_height
        return place if 0 <= place < len(self.rows) else None

"""A window on a flow of turns: where it stands, what of it is drawn, what the mouse selects in it."""

from __future__ import annotations

from typing import ClassVar

from textual.geometry import Region, Size
from textual.scroll_view import ScrollView
from textual.selection import Selection
from textual.strip import Strip
from textual.widget import Widget

from qwen2_local.sanitize import clean
from qwen2_tui.widgets.drawing import MARGIN, Look, drawn, hinted
from qwen2_tui.widgets.flow import FOOT, HEAD, Flow, Place
from qwen2_tui.widgets.palette import COMPONENTS, CSS, Palette


class Window(ScrollView):
    """Shows `flow`, and renders of it what is seen.

    What is at the top of the window stays there, whatever comes below and however wrong the heights above were estimated; except at the
    end, where the end stays in sight. Mouse selections are kept as places (turn, block, line), so they move with the text.
    """

    COMPONENT_CLASSES: ClassVar[set[str]] = set(COMPONENTS.values())
    DEFAULT_CSS = CSS

    def __init__(self, *, id: str | None = None, classes: str | None = None) -> None:
        super().__init__(id=id, classes=classes)
        self.flow = Flow()
        self.follow = True  # the end stays in sight
        self.unseen = False  # more came below
        self._top = Place(0, HEAD, 0)  # what is at the top
        self._reading: tuple[Place, int] | None = None  # the same since the reader last scrolled: place, characters of the block before it
        self._moving = False  # the window is being moved by us
        self._laid = Size(0, 0)  # the size that all this is for
        self._rows: list[object] = []  # what each row showed last
        self._palette: Palette | None = None
        self._painting = False

    # What a subclass says of a line

    def marked(self) -> int | None:
        """The turn that is marked."""
        return None

    def focused(self) -> tuple[Place, Place] | None:
        """From where to where code has the focus."""
        return None

    def growing(self) -> bool:
        """Whether text comes at the end."""
        return False

    # Where the window is

    @property
    def text_width(self) -> int:
        """Cells of a line of text."""
        return max(self.size.width - 2 * MARGIN, 10)

    def place_at(self, turn: int, *, end: bool) -> None:
        """For another flow: its end is in sight and stays so, or a turn is at the top."""
        self._top, self._reading, self.follow, self.unseen = Place(turn, HEAD, 0), None, end, False

    def changed(self, *, came: bool = False, unsettled: bool = False) -> None:
        """The flow is another. came: there is more at its end. unsettled: what was selected with the mouse may be gone."""
        self.unseen = (self.unseen or came) and not self.follow
        if unsettled and self.text_selection is not None:
            self.screen.clear_selection()
        self._settle()

    def _settle(self) -> None:
        """Renders what is seen, and puts the window where it belongs."""
        height = self.size.height
        if not height:
            self._laid = Size(0, 0)  # hidden: all of this is to be done once it is shown, be it in the size that it had
            return
        while True:
            last = self._last()
            y = last if self.follow or not len(self.flow) else min(self.flow.number(self._top), last)
            if not self.flow.prepare(y, y + height):
                break
        self._move(y)

    def _last(self) -> int:
        """Where the window is at the end, a line below which is free."""
        return max(self.flow.height + 1 - self.size.height, 0)

    def _move(self, y: int) -> None:
        """The window begins at line y, all of it being rendered."""
        if len(self.flow):
            self._top = self.flow.place(y)
        self._reading = None
        size = Size(self.size.width, self.flow.height + 1 if len(self.flow) else 0)
        self._moving = True
        if size != self.virtual_size:
            # Not through the reactive, which would lay out the whole screen for a line more: nothing but the scroll bar depends on it.
            self.set_reactive(Widget.virtual_size, size)
            self._scroll_update(size)
        if y != self.scroll_offset.y:
            self.scroll_target_y = self.scroll_y = y
        self._moving = False
        self._repaint()

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        """The reader scrolls."""
        self.vertical_scrollbar.position = new_value
        distance = round(new_value) - round(old_value)
        if self._moving or not distance or not len(self.flow):
            return
        height = self.size.height
        near = abs(distance) <= 3 * height
        anchor, beyond = (self._top, distance) if near else (self.flow.place(round(new_value)), 0)
        while True:
            start = self.flow.number(anchor)
            y = min(max(start + beyond, 0), self._last())
            if not self.flow.prepare(min(start, y), max(start, y + height)):
                break
        self._stay(y)

    def reveal(self, turn: int, blocks: tuple[int, int] | None = None) -> None:
        """Scrolls so that a turn, or some blocks of it, are seen; the first of it where it is too much."""
        height = self.size.height
        if not height:
            return
        while True:
            y = min(self.flow.number(self._top), self._last())
            start = self.flow.start(turn) if blocks is None else self.flow.number(Place(turn, blocks[0], 0))
            stop = self.flow.start(turn + 1) if blocks is None else self.flow.number(Place(turn, blocks[1], 1 << 20)) + 1
            long = stop - start > height
            if start < y or (long and start >= y + height // 2):
                y = start
            elif stop > y + height and not long:
                y = stop - height
            y = min(max(y, 0), self._last())
            if not self.flow.prepare(min(start, y), y + height):
                break
        self._stay(y)

    def _stay(self, y: int) -> None:
        """The reader went to line y."""
        self.follow = y >= self._last()
        self.unseen = self.unseen and not self.follow
        self._move(y)

    def scroll_to(self, x: float | None = None, y: float | None = None, *, animate: bool = True, **options: object) -> None:
        """Scrolls at once: what is passed on the way need not be rendered."""
        super().scroll_to(x, y, animate=False, **options)  # type: ignore[arg-type]

    def action_scroll_end(self) -> None:
        """To the end, and stay there."""
        self.follow, self.unseen = True, False
        self._settle()

    def action_scroll_home(self) -> None:
        """To the start."""
        self.scroll_to(y=0)

    def on_resize(self) -> None:
        """The window has another size."""
        self._resized()

    def _resized(self) -> None:
        """Wraps again; what was at the top stays there, through any number of sizes."""
        if self.size == self._laid:
            return
        self._laid = self.size
        self._rows = []
        reading = self._reading or self._read()
        if self.flow.resize(self.text_width) and self.text_selection is not None:
            self.screen.clear_selection()
        if reading is not None:
            place, offset = reading
            self._top = place._replace(line=self.flow[place.turn].document.line_at(place.block, offset))
        self._settle()
        self._reading = reading

    def _read(self) -> tuple[Place, int] | None:
        """The text at the top of the window; None where that is no text."""
        place = self._top
        if place.turn >= len(self.flow) or place.block in (HEAD, FOOT) or not self.flow[place.turn].opened:
            return None
        document = self.flow[place.turn].document
        return (place, document.offset(place.block, place.line)) if place.block < document.blocks else None

    # Drawing

    def repaint(self) -> None:
        """Has all of it drawn: something changed that lines do not tell."""
        self._rows = []
        self.refresh()

    def _repaint(self) -> None:
        """Has those rows drawn whose line is another."""
        y, height = self.scroll_offset.y, self.size.height
        end = self.flow.height
        rows: list[object] = [self.flow.line(number) if number < end else None for number in range(y, y + height)]
        if self.growing() and y < end <= y + height:
            rows[end - 1 - y] = (rows[end - 1 - y], "cursor")
        if self.unseen:
            rows[-1] = (rows[-1], "hint")
        before, self._rows = self._rows, rows
        if len(before) != height:
            self.refresh()
            return
        changed = [row for row in range(height) if not _same(rows[row], before[row])]
        if changed:
            self.refresh(Region(0, changed[0], self.size.width, changed[-1] + 1 - changed[0]))

    def notify_style_update(self) -> None:
        """Another theme, or another style sheet."""
        super().notify_style_update()
        self._palette = None

    def render_lines(self, crop: Region) -> list[Strip]:
        """Draws. Outside of this, `render_line` is asked by the screen what is under the pointer."""
        self._resized()  # a new size may have to be drawn before the event that tells of it
        self._painting = True
        try:
            return super().render_lines(crop)
        finally:
            self._painting = False

    def render_line(self, y: int) -> Strip:
        """A row of the window."""
        if self._palette is None:
            self._palette = Palette(self)
        number, width = self.scroll_offset.y + y, self.size.width
        if number >= self.flow.height:
            strip, place, start = Strip.blank(width, self._palette.blank), Place(max(len(self.flow) - 1, 0), FOOT, 0), 0
        else:
            place, start = self.flow.place(number), -MARGIN
            focused = self.focused()
            look = Look(
                self._palette,
                width,
                marked=place.turn == self.marked() and place[1:] != (HEAD, 0),
                focused=focused is not None and focused[0] <= place <= focused[1],
                cursor=self.growing() and number == self.flow.height - 1,
            )
            selection = self.text_selection
            strip = drawn(self.flow.line(number), look, selection.get_span(place.code) if selection is not None else None)
        if not self._painting:
            strip = strip.apply_offsets(start, place.code)
        return hinted(strip, self._palette) if self.unseen and y == self.size.height - 1 else strip

    # What the mouse selects

    def selection_updated(self, selection: Selection | None) -> None:
        """What is selected looks so."""
        self.repaint()

    def get_selection(self, selection: Selection) -> tuple[str, str] | None:
        """The text between two places, as it was written: lines that were only wrapped are joined, bars and margins left out."""
        if selection.start is None and selection.end is None:
            return "\n\n".join(clean(turn.text) for turn in self.flow.turns), "\n"
        first = Place.of(selection.start.y).turn if selection.start is not None else 0
        last = Place.of(selection.end.y).turn if selection.end is not None else len(self.flow) - 1
        found: list[str] = []
        for turn in range(max(first, 0), min(last, len(self.flow) - 1) + 1):
            for block, lines in self.flow[turn].all():
                for number, line in enumerate(lines):
                    span = selection.get_span(Place(turn, block, number).code)
                    if span is not None:
                        text = line.text[max(span[0], line.start) : span[1] if span[1] >= 0 else None]
                        found += [text.rstrip(), line.joint]
        return "".join(found[:-1]), "\n"


def _same(one: object, other: object) -> bool:
    """Whether a row shows the same: the very same line, with the same signs on it."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return one[1] == other[1] and _same(one[0], other[0])
    return one is other

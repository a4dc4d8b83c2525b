"""The conversation: role lines, Markdown, code, tables; only the lines that are seen are rendered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from rich.cells import cell_len, set_cell_size
from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.binding import BindingType
from textual.geometry import Region, Size
from textual.message import Message
from textual.reactive import reactive
from textual.scroll_view import ScrollView
from textual.selection import Selection
from textual.strip import Strip
from textual.widget import Widget

from qwen2_local.sanitize import clean
from qwen2_tui.keys import bind
from qwen2_tui.markdown.ink import Kind, ink
from qwen2_tui.markdown.render import Line
from qwen2_tui.widgets.flow import FOOT, HEAD, Flow, Place, Turn
from qwen2_tui.widgets.palette import COMPONENTS, CSS, Palette

__all__ = ["Transcript", "Turn"]

Name = Literal["edit", "regenerate", "continue", "copy", "tokens", "prompt", "previous", "next", "write"]

MARGIN = 2  # columns left of the text: the mark of the selected turn is there
_OF_REPLIES = ("regenerate", "continue", "tokens")


class Transcript(ScrollView, can_focus=True):
    """The conversation.

    What is at the top of the window stays there, whatever comes below and however wrong the heights above were estimated; except at the
    end, where the end stays in sight. Mouse selections are kept as places (turn, block, line), so they move with the text.
    """

    COMPONENT_CLASSES: ClassVar[set[str]] = set(COMPONENTS.values())
    DEFAULT_CSS = CSS
    BINDINGS: ClassVar[list[BindingType]] = [
        bind("turn.up", "turn(-1)"),
        bind("turn.down", "turn(1)"),
        bind("turn.page_up", "page_up"),
        bind("turn.page_down", "page_down"),
        bind("turn.first", "scroll_home"),
        bind("turn.last", "scroll_end"),
        bind("turn.edit", "act('edit')", show=True),
        bind("turn.regenerate", "act('regenerate')", show=True),
        bind("turn.continue", "act('continue')", show=True),
        bind("turn.copy", "act('copy')", show=True),
        bind("turn.code_next", "code(1)"),
        bind("turn.code_previous", "code(-1)"),
        bind("turn.tokens", "act('tokens')", show=True),
        bind("turn.prompt", "act('prompt')"),
        bind("turn.previous", "act('previous')"),
        bind("turn.next", "act('next')"),
        bind("turn.write", "act('write')"),
    ]

    class Action(Message):
        """A key was pressed on the selected turn. index: which turn."""

        def __init__(self, name: Name, index: int) -> None:
            self.name, self.index = name, index
            super().__init__()

    selected: reactive[int | None] = reactive(None)
    """The turn that keys are about; marked while the conversation has the focus."""
    code: reactive[int | None] = reactive(None)
    """The focused code block of the selected turn."""

    def __init__(self, *, id: str | None = None, classes: str | None = None) -> None:
        super().__init__(id=id, classes=classes)
        self._flow = Flow()
        self._top = Place(0, 0, 0)  # what is at the top of the window
        self._follow = True  # the end stays in sight
        self._unseen = False  # more came below
        self._fed: str | None = None  # the text of the turn that grows
        self._moving = False  # the window is being moved by us
        self._palette: Palette | None = None
        self._rows: list[object] = []  # what each row of the window showed last
        self._laid = Size(0, 0)  # the size that all this is for
        self._reading: tuple[Place, int] | None = None  # what is at the top since the reader last scrolled: place, characters before it
        self._painting = False

    # What is shown

    @property
    def turns(self) -> tuple[Turn, ...]:
        """What is shown; the text of a growing turn is what came of it."""
        turns = self._flow.turns
        return turns if self._fed is None else (*turns[:-1], replace(turns[-1], text=self._fed))

    @property
    def at_end(self) -> bool:
        """The end is in sight, and stays so."""
        return self._follow

    def show(self, turns: Sequence[Turn], *, end: bool = True) -> None:
        """A whole conversation in place of what was there; at its end, or at its start."""
        self._flow = Flow(turns, self._text_width)
        self._fed = None
        self._top, self._follow, self._unseen = Place(0, -1, 0), end, False
        self._select_last(only_if=self.has_focus)
        self._changed(unsettled=True)

    def append(self, turn: Turn) -> None:
        """One more turn at the end. Who wrote it sees it."""
        self._flow.append(turn)
        self._follow = self._follow or turn.role == "user"
        self._changed(came=True)

    def replace(self, index: int, turn: Turn) -> None:
        """Another turn in place of the one at `index`."""
        self._flow.replace(index, turn)
        self._changed(unsettled=True)

    def truncate(self, count: int) -> None:
        """Only the first `count` turns stay."""
        self._flow.truncate(count)
        self._fed = None
        if self.selected is not None and self.selected >= count:
            self.selected = count - 1 if count else None
        self._changed(unsettled=True)

    def begin_stream(self, turn: Turn) -> None:
        """One more turn at the end, which `feed` lets grow. Its text, if any, is what the reply begins with."""
        self._flow.append(turn)
        self._flow.grow()
        self._fed = clean(turn.text)
        self._changed(came=True)

    def feed(self, text: str) -> None:
        """What came of the last turn."""
        text = clean(text)
        if text and self._fed is not None:
            self._fed += text
            self._flow.feed(text)
            self._changed(came=True)

    def end_stream(self, turn: Turn) -> None:
        """The last turn is whole: this is it."""
        self._flow.end(turn, self._fed or "")
        self._fed = None
        self._changed()

    def selected_code(self) -> str | None:
        """The text of the focused code block, as it was written."""
        if self.selected is None or self.code is None:
            return None
        return self._flow[self.selected].document.code(self.code)

    # Where the window is

    @property
    def _text_width(self) -> int:
        return max(self.size.width - 2 * MARGIN, 10)

    def _changed(self, *, came: bool = False, unsettled: bool = False) -> None:
        """The turns are others. came: there is more at the end. unsettled: what was selected with the mouse may be gone."""
        self._unseen = (self._unseen or came) and not self._follow
        if unsettled and self.text_selection is not None:
            self.screen.clear_selection()
        self._settle()

    def _settle(self) -> None:
        """Renders what is seen, and puts the window where it belongs."""
        height = self.size.height
        if not height:
            return
        while True:
            last = max(self._flow.height + 1 - height, 0)
            y = last if self._follow or not len(self._flow) else min(self._flow.number(self._top), last)
            if not self._flow.prepare(y, y + height):
                break
        self._move(y)

    def _move(self, y: int) -> None:
        """The window begins at line y, all of it being rendered."""
        if len(self._flow):
            self._top = self._flow.place(y)
        self._reading = None
        size = Size(self.size.width, self._flow.height + 1 if len(self._flow) else 0)
        self._moving = True
        if size != self.virtual_size:
            # Not through the reactive, which would lay out the whole screen for a line more: nothing but the scroll bar depends on it.
            self.set_reactive(Widget.virtual_size, size)
            self._scroll_update(size)
        if y != self.scroll_offset.y:
            self.scroll_target_y = self.scroll_y = y
        self._moving = False
        self._repaint()

    def _repaint(self) -> None:
        """Has those rows drawn whose line is another."""
        y, height = self.scroll_offset.y, self.size.height
        end = self._flow.height
        rows: list[object] = [self._flow.line(number) if number < end else None for number in range(y, y + height)]
        if self._fed is not None and y < end <= y + height:
            rows[end - 1 - y] = (rows[end - 1 - y], "cursor")
        if self._unseen:
            rows[-1] = (rows[-1], "hint")
        before = self._rows
        self._rows = rows
        if len(before) != height:
            self.refresh()
            return
        changed = [row for row in range(height) if not _same(rows[row], before[row])]
        if changed:
            self.refresh(Region(0, changed[0], self.size.width, changed[-1] + 1 - changed[0]))

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        """The reader scrolls."""
        self.vertical_scrollbar.position = new_value
        distance = round(new_value) - round(old_value)
        if self._moving or not distance or not len(self._flow):
            return
        height = self.size.height
        near = abs(distance) <= 3 * height
        anchor, beyond = (self._top, distance) if near else (self._flow.place(round(new_value)), 0)
        while True:
            start = self._flow.number(anchor)
            last = max(self._flow.height + 1 - height, 0)
            y = min(max(start + beyond, 0), last)
            if not self._flow.prepare(min(start, y), max(start, y + height)):
                break
        self._follow = y >= last
        self._unseen = self._unseen and not self._follow
        self._move(y)

    def scroll_to(self, x: float | None = None, y: float | None = None, *, animate: bool = True, **options: object) -> None:
        """Scrolls at once: what is passed on the way need not be rendered."""
        super().scroll_to(x, y, animate=False, **options)  # type: ignore[arg-type]

    def action_scroll_end(self) -> None:
        """To the end, and stay there."""
        self._follow, self._unseen = True, False
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
        if self._flow.resize(self._text_width) and self.text_selection is not None:
            self.screen.clear_selection()
        if reading is not None:
            place, offset = reading
            self._top = place._replace(line=self._flow[place.turn].document.line_at(place.block, offset))
        self._settle()
        self._reading = reading

    def _read(self) -> tuple[Place, int] | None:
        """The text at the top of the window; None where that is no text."""
        place = self._top
        if place.turn >= len(self._flow) or place.block in (HEAD, FOOT) or not self._flow[place.turn].opened:
            return None
        document = self._flow[place.turn].document
        return (place, document.offset(place.block, place.line)) if place.block < document.blocks else None

    # Selecting with keys and mouse

    def watch_selected(self) -> None:
        """The mark moves."""
        self.code = None
        self._rows = []
        if self.selected is not None and self.is_mounted:
            self._reveal(self._flow.start(self.selected), self._flow.start(self.selected + 1))
        self.refresh_bindings()

    def watch_code(self) -> None:
        """The focus moves to another code block."""
        self._rows = []
        if self.selected is not None and self.code is not None:
            first, last = self._flow[self.selected].document.codes()[self.code]
            start = self._flow.number(Place(self.selected, first, 0))
            self._reveal(start, self._flow.number(Place(self.selected, last, 1 << 20)) + 1)
        else:
            self.refresh()

    def _reveal(self, start: int, stop: int) -> None:
        """Scrolls so that these lines are seen, or the first of them where they are too many."""
        height, y = self.size.height, self.scroll_offset.y
        if stop - start > height or start < y:
            if not (y <= start < y + height // 2 and stop - start > height):
                self.scroll_to(y=start)
        elif stop > y + height:
            self.scroll_to(y=stop - height)
        self.refresh()

    def action_turn(self, step: int) -> None:
        """Select the turn above or below."""
        if len(self._flow):
            here = self.selected if self.selected is not None else len(self._flow) if step < 0 else -1
            self.code = None
            self.selected = min(max(here + step, 0), len(self._flow) - 1)

    def action_act(self, name: Name) -> None:
        """Tell the screen that something is wanted of the selected turn."""
        if self.selected is not None:
            self.post_message(self.Action(name, self.selected))

    def action_code(self, step: int) -> None:
        """Focus the next or previous code block: from the focused one, or from what is seen."""
        if not len(self._flow):
            return
        here = self._here(step)
        turn = here.turn
        while 0 <= turn < len(self._flow):
            codes = self._flow[turn].document.codes()
            numbered = list(enumerate(Place(turn, first, 0) for first, _ in codes))
            for number, place in numbered if step > 0 else reversed(numbered):
                if place > here if step > 0 else place < here:
                    self.selected, self.code = turn, number
                    return
            turn += step

    def _here(self, step: int) -> Place:
        """Where to look for code from: the focused block, or the edge of the window."""
        if self.selected is not None and self.code is not None:
            return Place(self.selected, self._flow[self.selected].document.codes()[self.code][0], 0)
        y, height = self.scroll_offset.y, self.size.height
        top, bottom = self._flow.place(y), self._flow.place(min(y + height, self._flow.height) - 1)
        return Place(top.turn, top.block, -1) if step > 0 else bottom

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Which keys mean something on the selected turn."""
        if action != "act" or parameters == ("write",):
            return True
        if self.selected is None or self.selected >= len(self._flow):
            return False
        turn = self._flow[self.selected].turn
        if parameters[0] in _OF_REPLIES:
            # A question can be answered anew as well: it may have no reply yet.
            return turn.role == "assistant" or (turn.role == "user" and parameters[0] == "regenerate")
        return turn.count > 1 if parameters[0] in ("previous", "next") else True

    def on_focus(self) -> None:
        """Keys are about a turn: the last, unless another was selected."""
        if self.selected is None:
            self._select_last()
        self._rows = []
        self.refresh()

    def _select_last(self, *, only_if: bool = True) -> None:
        """Whatever was selected is gone. Nothing is scrolled."""
        self.set_reactive(Transcript.selected, len(self._flow) - 1 if only_if and len(self._flow) else None)
        self.set_reactive(Transcript.code, None)
        if self.is_mounted:
            self.refresh_bindings()

    def on_blur(self) -> None:
        """No turn is marked."""
        self._rows = []
        self.refresh()

    def on_click(self, event: events.Click) -> None:
        """Selects the turn under the pointer, and the code block; or goes to the end."""
        if self.text_selection is not None or not len(self._flow):
            return
        if self._unseen and event.y == self.size.height - 1:
            self.action_scroll_end()
            return
        place = self._flow.place(self.scroll_offset.y + event.y)
        self.selected = place.turn
        for number, (first, last) in enumerate(self._flow[place.turn].document.codes()):
            if first <= place.block <= last:
                self.code = number

    # Copying what is selected with the mouse

    def get_selection(self, selection: Selection) -> tuple[str, str] | None:
        """The text between two places, as it was written: lines that were only wrapped are joined, bars and margins left out."""
        if selection.start is None and selection.end is None:
            return "\n\n".join(clean(turn.text) for turn in self.turns), "\n"
        first = Place.of(selection.start.y).turn if selection.start is not None else 0
        last = Place.of(selection.end.y).turn if selection.end is not None else len(self._flow) - 1
        found: list[str] = []
        for turn in range(max(first, 0), min(last, len(self._flow) - 1) + 1):
            for block, lines in self._flow[turn].all():
                for number, line in enumerate(lines):
                    span = selection.get_span(Place(turn, block, number).code)
                    if span is not None:
                        text = line.text[max(span[0], line.start) : span[1] if span[1] >= 0 else None]
                        found += [text.rstrip(), line.joint]
        return "".join(found[:-1]), "\n"

    def selection_updated(self, selection: Selection | None) -> None:
        """What is selected looks so."""
        self._rows = []
        self.refresh()

    # Drawing

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
        if number >= self._flow.height:
            end = Place(max(len(self._flow) - 1, 0), FOOT, 0)
            strip = Strip.blank(width, self._palette.blank)
            return strip if self._painting else strip.apply_offsets(0, end.code)
        strip = self._strip(number, width)
        if not self._painting:
            strip = strip.apply_offsets(-MARGIN, self._flow.place(number).code)
        return self._hinted(strip, width) if self._unseen and y == self.size.height - 1 else strip

    def _strip(self, number: int, width: int) -> Strip:
        """A line. What was drawn last is taken, if all that it depends on is as it was."""
        assert self._palette is not None
        line = self._flow.line(number)
        focus = self.has_focus and self._flow.turn_at(number) == self.selected and number != self._flow.start(self.selected or 0)
        place = self._flow.place(number) if self.text_selection is not None or (focus and self.code is not None) else None
        span = self.text_selection.get_span(place.code) if self.text_selection is not None and place is not None else None
        coded = focus and place is not None and self._in_focused_code(place)
        cursor = self._fed is not None and number == self._flow.height - 1
        if span is None and isinstance(line.drawn, _Drawn) and line.drawn.of == (self._palette, width, focus, coded, cursor):
            return line.drawn.strip
        strip = self._draw(line, width, span, marked=focus, coded=coded, cursor=cursor)
        if span is None:
            line.drawn = _Drawn((self._palette, width, focus, coded, cursor), strip)
        return strip

    def _in_focused_code(self, place: Place) -> bool:
        if self.code is None:
            return False
        first, last = self._flow[place.turn].document.codes()[self.code]
        return first <= place.block <= last

    def _draw(self, line: Line, width: int, span: tuple[int, int] | None, *, marked: bool, coded: bool, cursor: bool) -> Strip:
        palette = self._palette
        assert palette is not None
        segments = [Segment("▌ ", palette.named("marked")) if marked else Segment("  ", palette.blank)]
        cells = MARGIN
        for text, colour in line.runs:
            if coded and colour == _EDGE:
                segments.append(Segment("▌", palette.named("focused")))
            else:
                segments.append(Segment(text, palette[colour]))
            cells += cell_len(text)
        if span is not None:
            segments = [segments[0], *_selected(segments[1:], max(span[0], line.start), span[1], palette.selection)]
        if cursor and cells + 2 <= width:
            segments.append(Segment("▌", palette.named("marked")))
            cells += 1
        if cells < width:
            segments.append(Segment(" " * (width - cells), palette.blank))
        return Strip(segments, max(cells, width)).crop(0, width)

    def _hinted(self, strip: Strip, width: int) -> Strip:
        assert self._palette is not None
        hint = set_cell_size(HINT, min(len(HINT), width))
        return Strip([*strip.crop(0, width - len(hint)), Segment(hint, self._palette.named("hint"))], width)


HINT = " ↓ more below · end "
_EDGE = ink(Kind.EDGE)


@dataclass(frozen=True, slots=True)
class _Drawn:
    """A strip, and all that it depends on but its line."""

    of: tuple[object, ...]
    strip: Strip


def _same(one: object, other: object) -> bool:
    """Whether a row shows the same: the very same line, with the same signs on it."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return one[1] == other[1] and _same(one[0], other[0])
    return one is other


def _selected(segments: Sequence[Segment], start: int, end: int, style: Style) -> list[Segment]:
    """The segments, with the characters from `start` to before `end` (-1: all from there) in the style of what is selected."""
    made: list[Segment] = []
    at = 0
    for text, base, _ in segments:
        left = min(max(start - at, 0), len(text))
        right = len(text) if end < 0 else min(max(end - at, left), len(text))
        parts = ((text[:left], base), (text[left:right], base + style if base else style), (text[right:], base))
        made += [Segment(part, look) for part, look in parts if part]
        at += len(text)
    return made

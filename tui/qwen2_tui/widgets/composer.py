"""Where a person writes: grows with the text, enter sends, @ attaches, earlier questions come back, and nothing typed is lost."""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar

from textual import events
from textual.actions import SkipAction
from textual.app import SuspendNotSupported
from textual.binding import BindingType
from textual.content import Content
from textual.geometry import Offset
from textual.message import Message
from textual.widgets import TextArea

from qwen2_local.sanitize import clean, clean_line
from qwen2_tui import attach
from qwen2_tui.keys import bind, shown
from qwen2_tui.widgets.inturn import in_turn

_LEAST_LINES = 1
_FRAME = 2
_MOST_CHOICES = 12


class Composer(TextArea):
    """A message being written."""

    DEFAULT_CSS = """
    Composer {
        height: 3; border: round $border; padding: 0 1; background: $background;
        border-subtitle-color: $text-muted; border-title-color: $accent;
        &:focus { border: round $primary; background: $background; }
        & .text-area--cursor-line { background: transparent; }
    }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        bind("write.send", "send", show=True),
        bind("write.newline", "newline", show=True),
        bind("write.earlier", "earlier"),
        bind("write.complete", "complete"),
        bind("write.editor", "editor"),
    ]

    class Sent(Message):
        """It is to be sent. text: with its mentions as they were typed."""

        def __init__(self, text: str) -> None:
            self.text = text
            super().__init__()

    class Choices(Message):
        """What a path could go on with, in a line; "" for nothing."""

        def __init__(self, words: str) -> None:
            self.words = words
            super().__init__()

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(
            id=id, soft_wrap=True, highlight_cursor_line=False, tab_behavior="focus", placeholder="Ask something. @path attaches a file."
        )
        self.questions: Sequence[str] = ()
        """Earlier ones, newest first."""
        self._earlier: int | None = None

    def on_mount(self) -> None:
        """Empty, and says what the keys are."""
        self.name_keys()
        self._fit()

    def name_keys(self) -> None:
        """Says below what the keys are now."""
        keys = [(action, self._key(id)) for id, action in (("write.send", "send"), ("write.newline", "new line"))]
        self.border_subtitle = Content(" · ".join(f"{key} {action}" for action, key in keys)).markup

    def _key(self, id: str) -> str:
        wanted = getattr(self.app, "key_of", None)
        return str(wanted(id)).split(", ")[0] if wanted is not None else shown(id)

    def write(self, text: str) -> None:
        """Puts `text` in place of what is there, with the cursor at its end."""
        self._earlier = None
        self.load_text(_typed(text))
        self.move_cursor(self.document.end)
        self._fit()

    def name_task(self, words: str) -> None:
        """What is being written, where it is no new message: above it."""
        self.border_title = Content(clean_line(words)).markup if words else None

    # Its height

    def on_text_area_changed(self) -> None:
        """Makes room."""
        self._fit()

    def on_resize(self) -> None:
        """The lines are others now."""
        self.call_after_refresh(self._fit)

    def _fit(self) -> None:
        most = max(_LEAST_LINES, self.app.size.height // 3 - _FRAME)
        height = max(_LEAST_LINES, min(self.wrapped_document.height, most)) + _FRAME
        if self.styles.height is None or self.styles.height.value != height:
            self.styles.height = height
            self.call_after_refresh(self.scroll_cursor_visible)

    def scroll_cursor_visible(self, center: bool = False, animate: bool = False) -> Offset:
        """Scrolls to the cursor. Textual asks for it in the middle of an undo as well, when the cursor is behind the new end still, and crashes."""
        if self.cursor_location[0] >= self.document.line_count:
            return Offset()
        return super().scroll_cursor_visible(center, animate)

    # Keys

    async def on_key(self, event: events.Key) -> None:
        """No letter overtakes a key that was pressed before it."""
        await in_turn(self, event)

    def on_paste(self, event: events.Paste) -> None:
        """All of it, as one piece, without what a terminal would obey. TextArea puts it in."""
        event.text = _typed(event.text)

    def action_send(self) -> None:
        """Sends what is written."""
        if self.text.strip():
            self.post_message(self.Sent(self.text))

    def action_newline(self) -> None:
        """A new line."""
        start, end = self.selection
        self._replace_via_keyboard("\n", start, end)

    def action_earlier(self) -> None:
        """The question before, as long as nothing else is being written; else a line up."""
        if not self._walk(1):
            self.action_cursor_up()

    def action_cursor_down(self, select: bool = False) -> None:
        """The question after, while walking through earlier ones; else a line down."""
        if select or self._earlier is None or not self._walk(-1):
            super().action_cursor_down(select)

    def _walk(self, step: int) -> bool:
        """Through earlier questions. Only from an empty message, or from one of them that was left as it was."""
        at = self._earlier
        if at is None and self.text:
            return False
        if at is not None and (at >= len(self.questions) or self.text != _typed(self.questions[at])):
            self._earlier = None
            return False
        to = (-1 if at is None else at) + step
        if to >= len(self.questions):
            return at is not None
        self.write("" if to < 0 else self.questions[to])
        self._earlier = None if to < 0 else to
        return True

    def action_undo(self) -> None:
        """What was typed last goes; with nothing typed, the key means what it means elsewhere."""
        before = self.text
        super().action_undo()
        if self.text == before:
            raise SkipAction

    # Paths

    def action_complete(self) -> None:
        """Completes the path before the cursor; without one, the key means what it means elsewhere."""
        row, column = self.cursor_location
        mention = attach.unfinished(self.document[row][:column])
        if mention is None:
            raise SkipAction
        self.run_worker(partial(self._complete, mention), thread=True, group="complete", exclusive=True)

    def _complete(self, mention: str) -> None:
        done = attach.complete(mention)
        self.app.call_later(self._completed, mention, done)

    def _completed(self, mention: str, done: attach.Completion | None) -> None:
        row, column = self.cursor_location
        if attach.unfinished(self.document[row][:column]) != mention:
            return  # more was typed meanwhile
        if done is None:
            self.post_message(self.Choices("No file begins like that."))
            return
        if done.text != mention:
            self._replace_via_keyboard(done.text, (row, column - len(mention)), (row, column))
        more = len(done.choices) - _MOST_CHOICES
        self.post_message(self.Choices("  ".join(done.choices[:_MOST_CHOICES]) + (f"  … and {more:,} more" if more > 0 else "")))

    # The person's own editor

    def action_editor(self) -> None:
        """The message in $VISUAL or $EDITOR, and what becomes of it there back here."""
        editor = os.environ.get("VISUAL") or os.environ.get("EDITOR") or ""
        try:
            command = shlex.split(editor) or ["vi"]
        except ValueError:  # quotation marks that do not close
            command = [editor]
        try:
            with tempfile.TemporaryDirectory(prefix="qwen2-local-") as folder:
                # A folder of one's own (0700): nobody else reads along.
                path = Path(folder) / "message.md"
                path.write_text(self.text, encoding="utf-8")
                with self.app.suspend():
                    code = subprocess.run([*command, str(path)], check=False).returncode
                text = path.read_text("utf-8", "replace")
        except SuspendNotSupported:
            self.app.notify("This terminal cannot be lent to an editor.", severity="warning")
            return
        except OSError as error:
            self.app.notify(clean_line(f"{command[0]}: {error.strerror or error}. Name your editor in $EDITOR."), severity="warning", markup=False)
            return
        if code:
            self.app.notify(clean_line(f"{command[0]} ended with {code}: the message stays as it was."), severity="warning", markup=False)
        elif text.removesuffix("\n") != self.text:
            self.write(text.removesuffix("\n"))


def _typed(text: str) -> str:
    """Text from elsewhere as if it had been typed here."""
    return clean(text.replace("\r\n", "\n").replace("\r", "\n"))

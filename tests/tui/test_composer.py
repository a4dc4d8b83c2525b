"""Where a person writes."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
from textual import events, on
from textual.app import App, ComposeResult
from textual.pilot import Pilot
from textual.widgets import Input

from qwen2_tui.widgets.composer import Composer
from qwen2_tui.widgets.dialogs import Line
from qwen2_tui.widgets.fieldrow import Prose
from tests.tui.pilot import wait_until


class Writing(App[None]):
    """A composer, and something that can have the keyboard instead."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[str] = []
        self.choices: list[str] = []

    def compose(self) -> ComposeResult:
        yield Input()
        yield Composer()

    def on_mount(self) -> None:
        self.composer = self.query_one(Composer)
        self.composer.focus()

    @on(Composer.Sent)
    def _sent(self, event: Composer.Sent) -> None:
        self.sent.append(event.text)

    @on(Composer.Choices)
    def _choices(self, event: Composer.Choices) -> None:
        self.choices.append(event.words)


@asynccontextmanager
async def writing() -> AsyncIterator[tuple[Pilot[None], Composer]]:
    app = Writing()
    async with app.run_test(size=(60, 24)) as pilot:
        yield pilot, app.composer


async def test_enter_sends_and_the_others_begin_a_line():
    async with writing() as (pilot, composer):
        await pilot.press("a", "ctrl+j", "b", "shift+enter", "c", "alt+enter", "d")
        assert composer.text == "a\nb\nc\nd"
        await pilot.press("enter")
        assert pilot.app.sent == ["a\nb\nc\nd"]
        assert composer.text == "a\nb\nc\nd", "what is sent goes once it is on its way"


async def test_keys_keep_their_turn_however_fast_they_come():
    async with writing() as (pilot, composer):
        for key in ("a", "b", "enter", "c", "ctrl+j", "d", "enter"):
            pilot.app.post_message(events.Key(key, key if len(key) == 1 else None))
        await wait_until(pilot, lambda: len(pilot.app.sent) == 2)
        assert pilot.app.sent == ["ab", "abc\nd"] and composer.text == "abc\nd"


@pytest.mark.parametrize("kind", [Composer, Line, Prose])
async def test_no_letter_overtakes_a_correction(kind: type[Composer | Line | Prose]):
    class Field(App[None]):
        def compose(self) -> ComposeResult:
            yield kind()

    app = Field()
    async with app.run_test(size=(60, 24)) as pilot:
        field = app.query_one(kind)
        field.focus()
        for key in ("x", "ctrl+u", "t", "e", "h", "backspace", "backspace", "h", "e", "left", "left", "delete", "a"):
            app.post_message(events.Key(key, key if len(key) == 1 else None))
        await wait_until(pilot, lambda: (field.value if isinstance(field, Line) else field.text) == "tae")


async def test_keys_can_be_others():
    async with writing() as (pilot, _):
        pilot.app.set_keymap({"write.send": "ctrl+j", "write.newline": "enter"})
        await pilot.press("a", "enter", "b", "ctrl+j")
        assert pilot.app.sent == ["a\nb"]


async def test_nothing_is_not_sent():
    async with writing() as (pilot, _):
        await pilot.press("enter", "space", "ctrl+j", "enter")
        assert pilot.app.sent == []


async def test_it_grows_to_a_third_of_the_screen_and_shrinks_again():
    async with writing() as (pilot, composer):
        heights = [composer.size.height]
        for _ in range(9):
            await pilot.press("ctrl+j")
            heights.append(composer.size.height)
        assert heights == [1, 2, 3, 4, 5, 6, 6, 6, 6, 6]
        composer.write("long " * 40)
        await wait_until(pilot, lambda: composer.size.height == 4)
        composer.write("")
        await wait_until(pilot, lambda: composer.size.height == 1)


async def test_a_large_paste_is_one_piece_without_what_a_terminal_obeys():
    async with writing() as (pilot, composer):
        pasted = "line \x1b[31mred\r\nnext\x07\r" + "中文 🙂\n" * 5000
        pilot.app.post_message(events.Paste(pasted))
        await wait_until(pilot, lambda: composer.text)
        assert composer.text == "line [31mred\nnext\n" + "中文 🙂\n" * 5000
        await pilot.press("ctrl+z")
        assert composer.text == "", "one undo takes it back"
        await pilot.press("ctrl+y", "f7", "delete")
        assert composer.text == ""


async def test_up_in_an_empty_message_walks_through_earlier_questions():
    async with writing() as (pilot, composer):
        composer.questions = ["third", "second\nline", "first"]
        seen = []
        for key in ("up", "up", "up", "up", "down", "down", "down", "down"):
            await pilot.press(key)
            seen.append(composer.text)
        assert seen == ["third", "second\nline", "first", "first", "second\nline", "third", "", ""]


async def test_up_moves_the_cursor_in_what_was_typed_or_changed():
    async with writing() as (pilot, composer):
        composer.questions = ["earlier"]
        await pilot.press("a", "ctrl+j", "b", "up")
        assert composer.text == "a\nb" and composer.cursor_location[0] == 0
        composer.write("")
        await pilot.press("up", "!", "up")
        assert composer.text == "earlier!"


async def test_tab_completes_a_path_and_says_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("report.txt", "reply.md", "zebra.txt"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    async with writing() as (pilot, composer):
        await pilot.press(*"see @z", "tab")
        await wait_until(pilot, lambda: composer.text == "see @zebra.txt ")
        await pilot.press(*"and @re", "tab")
        await wait_until(pilot, lambda: composer.text.endswith("@rep"))
        assert pilot.app.choices[-1] == "reply.md  report.txt"
        await pilot.press(*"xy", "tab")
        await wait_until(pilot, lambda: pilot.app.choices[-1] == "No file begins like that.")


async def test_tab_without_a_path_leaves():
    async with writing() as (pilot, composer):
        await pilot.press("a", "tab")
        assert not composer.has_focus and composer.text == "a"


async def test_undo_with_nothing_typed_is_for_others():
    async with writing() as (pilot, composer):
        undone = []
        pilot.app.action_undo = lambda: undone.append(True)
        pilot.app.bind("ctrl+z", "undo")
        await pilot.press("a", "ctrl+z")
        assert composer.text == "" and undone == []
        await pilot.press("ctrl+z")
        assert undone == [True]


def editor(path: Path, script: str) -> str:
    """A program that does something with the file that it is given."""
    path.write_text(f"import sys, pathlib\nfile = pathlib.Path(sys.argv[1])\n{script}\n")
    return f"{sys.executable} {path}"


@pytest.fixture
def lent(monkeypatch: pytest.MonkeyPatch):
    """The terminal is lent to the editor, as far as a test has one."""

    @contextmanager
    def suspend(self: object):
        yield

    monkeypatch.setattr(App, "suspend", suspend)


async def test_the_message_can_be_written_in_ones_editor(tmp_path, monkeypatch, lent):
    monkeypatch.setenv("EDITOR", editor(tmp_path / "edit.py", "file.write_text(file.read_text() + ' and more\\x1b[2J\\n')"))
    async with writing() as (pilot, composer):
        await pilot.press(*"text", "ctrl+e")
        assert composer.text == "text and more[2J"


async def test_an_editor_that_is_no_command_is_said(monkeypatch, lent):
    monkeypatch.setenv("EDITOR", "vim '")
    async with writing() as (pilot, composer):
        await pilot.press(*"text", "ctrl+e")
        assert [one.message for one in pilot.app._notifications] == ["vim ': No such file or directory. Name your editor in $EDITOR."]
        assert composer.text == "text"


async def test_what_was_written_for_the_editor_is_gone_afterwards(tmp_path, monkeypatch, lent):
    seen = tmp_path / "seen"
    monkeypatch.setenv("VISUAL", editor(tmp_path / "edit.py", f"pathlib.Path({str(seen)!r}).write_text(str(file))"))
    async with writing() as (pilot, _):
        await pilot.press("a", "ctrl+e")
    assert not Path(seen.read_text()).parent.exists()


@pytest.mark.parametrize("command", ["false", "/nowhere/at/all"])
async def test_an_editor_that_fails_costs_nothing(command, monkeypatch, lent):
    monkeypatch.setenv("EDITOR", command)
    async with writing() as (pilot, composer):
        await pilot.press(*"text", "ctrl+e")
        assert composer.text == "text"
        assert len(pilot.app._notifications) == 1


async def test_where_the_terminal_cannot_be_lent_that_is_said(monkeypatch):
    monkeypatch.setenv("EDITOR", "true")
    async with writing() as (pilot, composer):
        await pilot.press(*"text", "ctrl+e")
        assert composer.text == "text"
        assert [one.message for one in pilot.app._notifications] == ["This terminal cannot be lent to an editor."]

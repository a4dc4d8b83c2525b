"""Small questions: keyboard first, mouse too; escape changes nothing, and no text in them is obeyed."""

from __future__ import annotations

from typing import Any

import pytest
from textual.app import App
from textual.pilot import Pilot
from textual.screen import ModalScreen

from qwen2_tui.widgets.dialogs import Ask, Choice, Choose, Confirm, Line
from tests.tui.pilot import screen_text, wait_until

HOSTILE = "a\x1b[31m[b]b[/b][red]\x1b]52;c;aGk=\x07"
SHOWN = "a[31m[b]b[/b][red]]52;c;aGk="


class Asking(App[None]):
    """Asks one thing, and keeps the answers."""

    def __init__(self, screen: ModalScreen[Any]) -> None:
        super().__init__()
        self.asked = screen
        self.answers: list[object] = []

    def on_mount(self) -> None:
        self.push_screen(self.asked, self.answers.append)


async def answer(pilot: Pilot[Any]) -> object:
    app = pilot.app
    assert isinstance(app, Asking)
    await wait_until(pilot, lambda: app.answers)
    return app.answers[0]


def no_digits(text: str) -> str:
    return "No digits, please." if any(map(str.isdigit, text)) else "" if text else "Say something."


async def test_a_line_is_asked_for_and_given_without_space_around() -> None:
    async with Asking(Ask("Name", "old")).run_test() as pilot:
        await pilot.press("end", *" new ", "enter")
        assert await answer(pilot) == "old new"


async def test_what_is_wrong_is_said_as_one_types_and_enter_does_nothing_meanwhile() -> None:
    async with Asking(Ask("Name", check=no_digits)).run_test() as pilot:
        await pilot.press("a", "1")
        assert "No digits, please." in screen_text(pilot.app)
        await pilot.press("enter", "backspace")
        assert "No digits" not in screen_text(pilot.app)
        await pilot.press("enter")
        assert await answer(pilot) == "a"


async def test_an_empty_line_is_not_blamed_before_enter() -> None:
    async with Asking(Ask("Name", check=no_digits)).run_test() as pilot:
        await pilot.press("a", "backspace")
        assert "Say something." not in screen_text(pilot.app)
        await pilot.press("enter")
        assert "Say something." in screen_text(pilot.app)
        await pilot.press("escape")
        assert await answer(pilot) is None


async def test_a_proposal_never_replaces_what_was_typed_until_it_is_taken() -> None:
    asked = Ask("Name")
    async with Asking(asked).run_test() as pilot:
        await pilot.press(*"mine")
        asked.propose("theirs")
        await pilot.pause()
        assert asked.query_one(Line).value == "mine"
        assert "theirs" in screen_text(pilot.app)
        await pilot.press("tab", "enter")
        assert await answer(pilot) == "theirs"


async def test_a_click_takes_the_proposal_and_another_answers() -> None:
    asked = Ask("Name")
    async with Asking(asked).run_test() as pilot:
        asked.propose("theirs")
        await pilot.pause()
        await pilot.click("#proposal")
        await pilot.click("#ok")
        assert await answer(pilot) == "theirs"


@pytest.mark.parametrize(("keys", "said"), [("y", True), ("n", False), ("escape", False), ("enter", True), ("right enter", False)])
async def test_a_yes_or_a_no(keys: str, said: bool) -> None:
    async with Asking(Confirm("Go on?")).run_test() as pilot:
        await pilot.press(*keys.split())
        assert await answer(pilot) is said


async def test_what_cannot_be_undone_is_not_done_by_enter() -> None:
    async with Asking(Confirm("Delete?", "4.7 GB", grave=True)).run_test() as pilot:
        await pilot.press("enter")
        assert await answer(pilot) is False


CHOICES = (Choice("a", "first"), Choice("b", "second", "with a note"), Choice("c", "third", enabled=False))


@pytest.mark.parametrize(("keys", "key"), [("enter", "b"), ("1", "a"), ("up enter", "a"), ("3 9 2", "b"), ("escape", None)])
async def test_one_of_several(keys: str, key: str | None) -> None:
    async with Asking(Choose("Which?", CHOICES, chosen="b")).run_test() as pilot:
        await pilot.pause()
        assert "with a note" in screen_text(pilot.app)
        await pilot.press(*keys.split())
        assert await answer(pilot) == key


@pytest.mark.parametrize(
    "asked",
    [Ask(HOSTILE, HOSTILE, words=HOSTILE), Confirm(HOSTILE, HOSTILE, yes=HOSTILE), Choose(HOSTILE, [Choice("a", HOSTILE, HOSTILE)], words=HOSTILE)],
)
async def test_no_text_is_obeyed(asked: ModalScreen[Any]) -> None:
    async with Asking(asked).run_test(size=(80, 24)) as pilot:
        if isinstance(asked, Ask):
            asked.propose(HOSTILE)
        await pilot.pause()
        text = screen_text(pilot.app)
        assert text.count(SHOWN) == {Ask: 4, Confirm: 3, Choose: 4}[type(asked)]
        assert "\x1b" not in text and "\x07" not in text


async def test_what_is_pasted_is_cleaned() -> None:
    asked = Ask("Name")
    async with Asking(asked).run_test() as pilot:
        asked.query_one(Line).insert_text_at_cursor("a\x1b[31m\tb")
        await pilot.press("enter")
        assert await answer(pilot) == "a[31m b"


@pytest.mark.parametrize(
    "asked",
    [Ask("Name", words="word " * 60), Confirm("Sure?", "word " * 60), Choose("Which?", [Choice(str(n), f"number {n}", "why") for n in range(12)])],
)
async def test_they_fit_into_the_smallest_terminal(asked: ModalScreen[Any]) -> None:
    async with Asking(asked).run_test(size=(60, 20)) as pilot:
        await pilot.pause()
        lines = screen_text(pilot.app).splitlines()
        assert any(line.lstrip().startswith("╭") for line in lines) and any(line.lstrip().startswith("╰") for line in lines)

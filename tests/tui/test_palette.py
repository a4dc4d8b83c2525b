"""The command palette: everything by a few letters, none of them lost, and nothing done that was not asked for."""

from __future__ import annotations

from typing import Any

from textual import events
from textual.app import App, SystemCommand
from textual.widgets import OptionList

from qwen2_tui.screens.palette import PaletteScreen
from tests.tui.pilot import make_app, running, screen_text, wait_for_text, wait_until

NAMES = ("New chat", "Rename this chat", "Delete this chat", "Theme: light", "Theme: dark", "[b]Odd[/b] \x1b[31mname")


class Host(App[None]):
    """An app with commands that write down that they were done."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[str] = []

    def on_mount(self) -> None:
        self.push_screen(PaletteScreen([SystemCommand(name, f"does {name}", lambda name=name: self.done.append(name)) for name in NAMES]))


def key(app: App[Any], name: str) -> None:
    """As it comes from a terminal: without waiting for what it does."""
    app.post_message(events.Key(name, name if len(name) == 1 else None))


async def test_what_is_typed_in_one_burst_is_found_and_done():
    app = make_app()
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_until(pilot, lambda: app.host.state.phase == "ready")
        for name in ("ctrl+p", *"help", "enter"):
            key(app, name)
        await wait_for_text(pilot, "all commands, by name")
        await pilot.press("escape", "ctrl+p", *"light", "enter")
        await wait_until(pilot, lambda: app.theme == "qwen2-light")
        await pilot.press("ctrl+p", *"theme: ch", "enter")
        await wait_for_text(pilot, "nord")
        await pilot.press(*"nord", "enter")
        await wait_until(pilot, lambda: app.theme == "nord" and app.screen is app.chat_screen)


async def test_sections_of_the_settings_are_found_by_their_names():
    app = make_app()
    async with running(app) as pilot:
        await pilot.press("ctrl+p", *"presets", "enter")
        await wait_for_text(pilot, "keep the settings of this chat as a preset")
        await pilot.press("escape")
        await wait_until(pilot, lambda: app.screen is app.chat_screen)


async def test_enter_alone_does_nothing_and_escape_leaves():
    app = Host()
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_for_text(pilot, "Delete this chat")
        await pilot.press("enter")
        assert len(app.screen_stack) == 2
        await pilot.press(*"zzz", "enter")
        await wait_for_text(pilot, "No command is called so.")
        await pilot.press("escape")
        await wait_until(pilot, lambda: len(app.screen_stack) == 1)
        assert app.done == []


async def test_letters_find_arrows_choose():
    app = Host()
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_for_text(pilot, "does New chat")
        await pilot.press(*"thisx", "backspace")
        await wait_until(pilot, lambda: "New chat" not in screen_text(app))
        assert "Rename this chat" in screen_text(app) and "Delete this chat" in screen_text(app)
        first = str(app.screen.query_one(OptionList).options[0].prompt)
        await pilot.press("down", "enter")
        await wait_until(pilot, lambda: app.done)
        assert len(app.done) == 1 and not first.startswith(app.done[0])


async def test_a_click_chooses_and_names_are_only_shown():
    app = Host()
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_for_text(pilot, "[b]Odd[/b]")
        await pilot.click("#found", offset=(3, 3))
        await wait_until(pilot, lambda: app.done == ["Theme: light"])


async def test_pasted_words_are_searched_for():
    app = Host()
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_for_text(pilot, "New chat")
        app.post_message(events.Paste("rename\n"))
        await wait_until(pilot, lambda: len(app.screen.query_one(OptionList).options) == 1)
        await pilot.press("ctrl+u", "down", "enter")
        await wait_until(pilot, lambda: app.done == ["New chat"])

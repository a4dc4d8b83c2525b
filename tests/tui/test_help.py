"""F1: every key as it is set now, in the width that there is."""

from __future__ import annotations

import pytest
from rich.cells import cell_len

from qwen2_tui.keys import PLACES, TABLE, shown
from qwen2_tui.screens.help import page
from tests.tui.pilot import make_app, screen_text, wait_for_text


def default_key(id: str) -> str:
    return next(key.shown for key in TABLE if key.id == id)


def test_every_key_is_on_the_page():
    text = page(default_key, 200, "red").plain
    for key in TABLE:
        assert any(line.split() == [*key.shown.split(), *(key.help or key.words).split()] for line in text.splitlines()), key
    used = {key.where for key in TABLE}
    assert all(title in text for place, title in PLACES.items() if place in used)


@pytest.mark.parametrize("width", [53, 80])
def test_no_line_is_wider_than_the_page(width: int):
    lines = [line for line in page(default_key, width, "red").plain.splitlines() if not line.startswith("The documentation lies")]
    assert max(cell_len(line) for line in lines if "/" not in line) <= width


def test_it_tells_where_more_is_written():
    text = " ".join(page(default_key, 400, "red").plain.split())
    assert "docs" in text and "app.md" in text and "qwen2-local --help" in text and "settings.toml" in text and "app.log" in text


async def test_f1_opens_it_and_closes_it():
    app = make_app()
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("f1")
        await wait_for_text(pilot, "all commands, by name")
        await pilot.press("end")
        await wait_for_text(pilot, "The log:")
        await pilot.press("f1")
        await pilot.pause()
        assert app.screen is app.chat_screen


async def test_escape_closes_it_and_global_keys_wait():
    app = make_app()
    async with app.run_test(size=(60, 20)) as pilot:
        await pilot.press("f1")
        await wait_for_text(pilot, "this help")
        await pilot.press("f2", "ctrl+o")
        assert "this help" in screen_text(app)
        await pilot.press("escape")
        await pilot.pause()
        assert app.screen is app.chat_screen


async def test_it_shows_the_keys_of_the_settings(tmp_path):
    file = tmp_path / "settings.toml"
    file.write_text('[keys]\n"app.models" = "f9"\n')
    app = make_app(settings_file=file)
    async with app.run_test(size=(80, 40)) as pilot:
        await pilot.press("f1")
        await wait_for_text(pilot, "f9")
        assert any(line.split()[1:3] == ["f9", "models:"] for line in screen_text(app).splitlines()), screen_text(app)
        assert shown("ctrl+o") not in screen_text(app)

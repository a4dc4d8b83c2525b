"""What every screen looks like: see `snapshots` on how to accept a change. The chat and the models also small, in the light, and in Chinese."""

from __future__ import annotations

import pytest

from tests.tui import scenes
from tests.tui.pilot import make_app, running
from tests.tui.snapshots import assert_looks_like

SMALL = (60, 20)


@pytest.fixture(autouse=True)
def still(own_home, monkeypatch):
    """Paths on the screen are short, and the same everywhere."""
    monkeypatch.chdir(own_home)
    with scenes.still():
        yield


@pytest.mark.parametrize("name", scenes.SCENES)
async def test_screen(name):
    async with running(scenes.app()) as pilot:
        await scenes.SCENES[name](pilot)
        await assert_looks_like(pilot, name)


async def test_first_start():
    async with running(make_app()) as pilot:
        await scenes.welcome(pilot)
        await assert_looks_like(pilot, "welcome")


@pytest.mark.parametrize("name", ["chat", "models", "chinese"])
async def test_small(name):
    async with running(scenes.app(), size=SMALL) as pilot:
        await scenes.SCENES[name](pilot)
        await assert_looks_like(pilot, f"{name}-small")


@pytest.mark.parametrize("name", ["chat", "models"])
async def test_light(name, own_home):
    (own_home / "settings.toml").write_text('theme = "light"\n')
    async with running(scenes.app()) as pilot:
        await scenes.SCENES[name](pilot)
        await assert_looks_like(pilot, f"{name}-light")


async def test_too_small():
    async with running(make_app(), size=(40, 10)) as pilot:
        await assert_looks_like(pilot, "too-small")

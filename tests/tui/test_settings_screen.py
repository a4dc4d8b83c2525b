"""F2: every setting with what it does, checked as one types, saved into the file; presets and keys."""

from __future__ import annotations

from typing import Any

import pytest
from rich.cells import cell_len
from textual.pilot import Pilot
from textual.widgets import Tabs

from qwen2_local import paths
from qwen2_local.chats import ChatStore
from qwen2_tui.fields import CHAT, MODEL
from qwen2_tui.screens.settings import SettingsScreen
from qwen2_tui.settings import ChatSettings, ModelSettings, Settings, SettingsFile, applied
from qwen2_tui.widgets.dialogs import Ask, Choose, Confirm, Line
from qwen2_tui.widgets.fieldrow import FieldRow, Pick
from qwen2_tui.widgets.keylist import KeyList, read_keys
from qwen2_tui.widgets.presets import Presets, summary
from tests.tui.pilot import ask, make_app, running, screen_text, wait_for_text, wait_until
from tests.tui.scripted import ScriptedLoader, ScriptedModel


async def opened(pilot: Pilot[Any], section: str = "chat") -> SettingsScreen:
    app: Any = pilot.app
    if not isinstance(app.screen, SettingsScreen):
        app.open_settings()
        await wait_until(pilot, lambda: isinstance(app.screen, SettingsScreen) and app.screen.query(Tabs))
    screen: SettingsScreen = app.screen
    screen.query_one(Tabs).active = section
    await wait_until(pilot, lambda: [one for one in screen.query_one(f"#section-{section}").query("*") if one.focusable])
    return screen


def row(screen: SettingsScreen, name: str) -> FieldRow:
    section = screen.query_one(f"#section-{screen.query_one(Tabs).active}")
    return next(one for one in section.query(FieldRow).results(FieldRow) if one.field.name == name)


def kept() -> Settings:
    settings, notes = SettingsFile(paths.home() / "settings.toml").read()
    assert notes == ()
    return settings


async def dialog(pilot: Pilot[Any], kind: type) -> Any:
    await wait_until(pilot, lambda: isinstance(pilot.app.screen, kind) and pilot.app.screen.is_mounted)
    return pilot.app.screen


async def test_every_setting_is_explained_and_checked_as_one_types_and_saved_into_the_file() -> None:
    loader = ScriptedLoader(ScriptedModel())
    app = make_app(loader=loader)
    async with running(app, size=(110, 50)) as pilot:
        screen = await opened(pilot, "new")
        await wait_until(pilot, lambda: all(one.words in screen_text(app) and one.title in screen_text(app) for one in CHAT))
        row(screen, "temperature").focus()
        await pilot.press(*"1000")
        await wait_for_text(pilot, "It has to be a number from 0 to 100.")
        await pilot.press("ctrl+s")
        assert not (paths.home() / "settings.toml").exists()
        row(screen, "temperature").put(1.0)
        await wait_for_text(pilot, "1 change: ctrl+s saves.")
        await pilot.press("ctrl+s")
        await wait_until(pilot, lambda: app.settings.chat == ChatSettings(temperature=1.0))
        await wait_until(pilot, lambda: kept() == app.settings)
        assert "What is set for one chat lies with it, all else in" in screen_text(app)
        # What changes elsewhere is shown, but not over what was typed.
        row(screen, "seed").put(7)
        app.change_settings(Settings(chat=ChatSettings(seed=1, top_k=4)))
        await wait_until(pilot, lambda: row(screen, "top_k").query_one(Line).value == "4")
        assert row(screen, "seed").query_one(Line).value == "7"
        # Other settings of the model load it anew, and say so before.
        await opened(pilot, "model")
        assert all(one.words in screen_text(app) for one in MODEL)
        row(screen, "context").put(4096)
        backend, values = row(screen, "backend"), []
        backend.focus()
        for key in ("right", "space", "enter", "left"):
            await pilot.press(key)
            values.append(backend.value)
        assert values == ["mlx", "llama.cpp", None, "llama.cpp"]
        await pilot.click(backend.query_one(Pick), offset=(6, 0))
        row(screen, "kv_bits").put(8)
        await wait_for_text(pilot, "3 changes: ctrl+s saves. The model is then loaded anew.")
        await opened(pilot, "look")
        row(screen, "theme").put("light")
        await pilot.press("ctrl+s")
        await wait_until(pilot, lambda: len(loader.wishes) == 2 and app.theme == "qwen2-light")
        assert (loader.wishes[1].context, loader.wishes[1].kv_bits, loader.wishes[1].name) == (4096, 8, "guide")
        there = Settings(ChatSettings(seed=7, top_k=4), ModelSettings(context=4096, kv_bits=8), theme="light")
        await wait_until(pilot, lambda: kept() == there)
        await opened(pilot, "model")
        row(screen, "model").put("7b")
        await pilot.press("ctrl+s")
        await wait_until(pilot, lambda: loader.wishes[-1].name == "7b")


async def test_questions_are_asked_as_the_settings_say_and_a_chat_keeps_its_own() -> None:
    store = ChatStore.open(paths.home() / "chats.db")
    app = make_app("one", "two", store=store)
    async with running(app) as pilot:
        screen = await opened(pilot, "new")
        row(screen, "top_k").put(7)
        row(screen, "seed").put(3)
        row(screen, "system").put("Be\nbrief.")
        row(screen, "lookup").put(True)
        await pilot.press("ctrl+s", "escape")
        await wait_until(pilot, lambda: app.screen is app.chat_screen)
        assert app.settings.chat == ChatSettings(top_k=7, seed=3, system="Be\nbrief.", lookup=True)
        app.chat_screen.focus_composer()
        await ask(pilot, "Hello?")
        await wait_until(pilot, lambda: app.chat_screen.number is not None and not app.chat_screen.busy)
        asked = app.scripted.options[-1]
        assert (asked["top_k"], asked["seed"], asked["lookup"]) == (7, 3, True)
        assert "Be\nbrief." in app.scripted.read
        # Now this chat alone, and what every new one has at the same time.
        screen = await opened(pilot, "new")
        row(screen, "top_k").put(8)
        await opened(pilot, "chat")
        seed = row(screen, "seed")
        seed.put(9)
        seed.focus()
        await pilot.press("ctrl+r")  # back to what every new chat has
        assert seed.value == 3 and not seed.edited
        seed.put(5)
        assert row(screen, "system").disabled  # a chat keeps the one that it began with
        await pilot.press("ctrl+s", "escape")
        await wait_until(pilot, lambda: store.options(1) == {"seed": 5})
        app.chat_screen.focus_composer()
        await ask(pilot, "And?")
        await wait_until(pilot, lambda: len(app.scripted.options) == 2)
        assert (app.scripted.options[-1]["seed"], app.scripted.options[-1]["top_k"]) == (5, 8)


async def test_by_keys_alone_at_60_by_20_and_leaving_asks_what_becomes_of_changes() -> None:
    app = make_app()
    async with running(app, size=(60, 20)) as pilot:
        await pilot.press("f2")
        await wait_until(pilot, lambda: isinstance(app.screen, SettingsScreen) and app.screen.query(FieldRow))
        screen = app.screen
        await pilot.press("ctrl+pagedown", "ctrl+pageup", "down", "down", *"0.5", "down", "up")
        await wait_until(pilot, lambda: row(screen, "temperature").value == 0.5)
        assert row(screen, "temperature").has_focus_within
        assert all(cell_len(line) <= 60 for line in screen_text(app).splitlines())
        await pilot.press("escape")
        await dialog(pilot, Choose)
        await pilot.press("3")  # go on
        await wait_until(pilot, lambda: app.screen is screen)
        assert row(screen, "temperature").edited
        await pilot.press("escape")
        await dialog(pilot, Choose)
        await pilot.press("2")  # drop them
        await wait_until(pilot, lambda: app.screen is app.chat_screen)
        assert app.chat_screen.chat_settings == ChatSettings()
        screen = await opened(pilot, "chat")
        row(screen, "seed").put(2)
        await pilot.press("escape")
        await dialog(pilot, Choose)
        await pilot.press("1")  # save them
        await wait_until(pilot, lambda: app.screen is app.chat_screen and app.chat_screen.chat_settings.seed == 2)


async def test_the_file_is_read_again_on_request_and_says_what_is_wrong() -> None:
    app = make_app()
    async with running(app) as pilot:
        screen = await opened(pilot, "new")
        (paths.home() / "settings.toml").write_text("[chat]\nseed = 4\ntop_k = -1\n")
        screen.read_again()
        await wait_until(pilot, lambda: row(screen, "seed").value == 4)
        assert any("line 3: top_k is -1" in str(one.message) for one in app._notifications)


# Presets


async def test_a_preset_is_kept_used_renamed_and_deleted() -> None:
    SettingsFile(paths.home() / "settings.toml").write(Settings(chat=ChatSettings(system="Be kind.", top_k=3)))
    app = make_app()
    async with running(app) as pilot:
        app.chat_screen.change_chat(ChatSettings(temperature=0.0, top_k=3))
        screen = await opened(pilot, "chat")
        await opened(pilot, "presets")
        presets = screen.query_one(Presets)
        presets.focus()
        await pilot.press("enter")
        (await dialog(pilot, Ask)).query_one(Line).value = "precise"
        await pilot.press("enter")
        await wait_until(pilot, lambda: kept().presets == {"precise": ChatSettings(temperature=0.0, top_k=3)})
        await wait_for_text(pilot, "temperature 0 · top-k 3")
        app.chat_screen.change_chat(ChatSettings())
        presets.highlighted = 1
        await pilot.press("enter")
        await dialog(pilot, Choose)
        await pilot.press("1")
        # What the preset does not set is as in every new chat.
        there = ChatSettings(temperature=0.0, top_k=3, system="Be kind.")
        await wait_until(pilot, lambda: app.chat_screen.chat_settings == there)
        await opened(pilot, "chat")
        await wait_until(pilot, lambda: row(screen, "temperature").value == 0.0)
        presets.do("precise", "new")
        await wait_until(pilot, lambda: kept().chat == there)
        presets.do("precise", "rename")
        (await dialog(pilot, Ask)).query_one(Line).value = "cold"
        await pilot.press("enter")
        await wait_until(pilot, lambda: list(kept().presets) == ["cold"])
        presets.do("cold", "delete")
        await dialog(pilot, Confirm)
        await pilot.press("y")
        await wait_until(pilot, lambda: kept().presets == {})


def test_a_preset_is_put_over_what_every_new_chat_has() -> None:
    base = ChatSettings(system="Be kind.", temperature=0.9, lookup=True)
    assert applied(ChatSettings(temperature=0.0), base) == ChatSettings(system="Be kind.", temperature=0.0, lookup=True)
    assert summary(ChatSettings()) == "the model's own"
    assert summary(ChatSettings(temperature=0.0, system="a\x1b[31m", seed=0)) == "system prompt a[31m · temperature 0 · seed 0"


# Keys


async def test_a_key_is_changed_checked_and_holds_at_once() -> None:
    app = make_app()
    async with running(app) as pilot:
        screen = await opened(pilot, "keys")
        keys = screen.query_one(KeyList)
        keys.focus()
        keys.highlighted = keys.get_option_index("app.sidebar")
        await pilot.press("enter")
        asked = await dialog(pilot, Ask)
        line = asked.query_one(Line)
        assert line.value == "f3"
        line.value = "ctrl+n"
        await wait_for_text(pilot, "ctrl+n is new chat already.")
        line.value = "f12"
        await pilot.press("enter")
        await wait_until(pilot, lambda: kept().keys == {"app.sidebar": "f12"})
        await pilot.press("escape")
        await wait_until(pilot, lambda: app.screen is app.chat_screen)
        shown = app.chat_screen.sidebar.shown
        await pilot.press("f12")
        await wait_until(pilot, lambda: app.chat_screen.sidebar.shown is not shown)


@pytest.mark.parametrize(
    ("typed", "keys"),
    [
        ("ctrl+s", "ctrl+s"),
        ("Ctrl+S, F9", "ctrl+s,f9"),
        ("page up", "pageup"),
        ("esc", "escape"),
        ("/", "slash"),
        ("é", "é"),
        ("K", "K"),
        ("", ""),
        ("alt+/", "alt+slash"),
    ],
)
def test_keys_are_read_as_people_write_them(typed: str, keys: str) -> None:
    assert read_keys(typed) == (keys, "")


@pytest.mark.parametrize("typed", ["ctrl+", "hyperspace", "ctrl+s,,f9", "hold+x", "f99", "\x1b"])
def test_what_is_no_key_is_said(typed: str) -> None:
    keys, problem = read_keys(typed)
    assert keys == "" and problem


def test_every_usual_key_can_be_typed_as_it_is_shown() -> None:
    from qwen2_tui.keys import TABLE

    assert {key.id: read_keys(key.shown) for key in TABLE} == {key.id: (key.keys, "") for key in TABLE}

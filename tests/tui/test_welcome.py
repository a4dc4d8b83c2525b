"""The empty chat: what to try, what to fetch, and what to do where there is no model."""

from __future__ import annotations

from typing import Any

import pytest
from textual.app import App, ComposeResult

from qwen2_local import advice
from qwen2_local.errors import DoesNotFit, UnknownModel
from qwen2_tui.host import Host, HostState
from qwen2_tui.model import LoadWish
from qwen2_tui.widgets.welcome import Welcome, recommendation, said
from tests.tui.pilot import screen_text, wait_for_text, wait_until
from tests.tui.scripted import ScriptedLoader


class Alone(App[None]):
    """A welcome, and of the app only what it needs."""

    host_state = __import__("textual.reactive").reactive.reactive(HostState("empty", LoadWish()))

    def __init__(self, loader: ScriptedLoader) -> None:
        super().__init__()
        self.host = Host(loader, lambda state: setattr(self, "host_state", state), self.call_later)
        self.picked: list[str] = []
        self.opened = 0

    def compose(self) -> ComposeResult:
        yield Welcome()

    def on_mount(self) -> None:
        self.host.load(LoadWish("guide"))

    def key_of(self, id: str) -> str:
        return {"app.models": "ctrl+o"}[id]

    def wish(self, name: str) -> LoadWish:
        return LoadWish(name)

    def switch_model(self, wish: LoadWish) -> None:
        self.host.load(wish)

    def open_models(self) -> None:
        self.opened += 1

    def on_welcome_picked(self, event: Welcome.Picked) -> None:
        self.picked.append(event.text)


async def test_the_guide_greets_and_offers_three_things():
    app = Alone(ScriptedLoader())
    async with app.run_test(size=(60, 20)) as pilot:
        await wait_for_text(pilot, "I am the guide")
        await wait_until(pilot, lambda: app.host.state.phase == "ready")
        await pilot.press("tab", "down", "enter")
        await wait_until(pilot, lambda: app.picked)
        assert app.picked == ["Which model fits my machine?"]


async def test_a_click_takes_one_too():
    app = Alone(ScriptedLoader())
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_for_text(pilot, "What can you do?")
        await pilot.click("#choices", offset=(5, 0))
        await wait_until(pilot, lambda: app.picked == ["What can you do?"])


async def test_the_recommended_model_is_there_with_its_size_and_the_key():
    best = advice.recommended(advice.here())
    assert best is not None
    app = Alone(ScriptedLoader())
    async with app.run_test(size=(100, 30)) as pilot:
        await wait_for_text(pilot, best.model.title)
        assert "GB to fetch" in screen_text(app) and "ctrl+o shows all sizes" in screen_text(app)


def test_offline_is_said_instead_of_tried(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "switched off" in recommendation("ctrl+o")


def test_a_small_machine_is_told_the_truth(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(advice, "recommended", lambda advices: None)
    assert "too small" in recommendation("ctrl+o")


def test_who_has_fetched_a_model_needs_no_recommendation(monkeypatch: pytest.MonkeyPatch):
    from qwen2_local import store

    class One:
        manifest = object()

    monkeypatch.setattr(store.Store, "list", lambda self: [One()])
    assert recommendation("ctrl+o") == ""


def test_each_state_has_words():
    guide, other = LoadWish("guide"), LoadWish("7b:q4_k_m\x1b[31m")
    assert said(HostState("ready", guide))[0].startswith("Hello. I am the guide")
    assert said(HostState("loading", guide, "converting guide 41 %"))[1] == "Converting guide 41 % … You can type already."
    assert said(HostState("loading", other, "loading"))[0] == "7b:q4_k_m[31m is on its way."
    assert said(HostState("ready", other))[0].startswith("7b:q4_k_m[31m is here")
    assert said(HostState("failed", other, "It does not fit.", "Take a smaller one.")) == ("It does not fit.", "Take a smaller one.")


async def test_after_a_failure_one_can_try_again_or_take_the_guide():
    loader = ScriptedLoader(fails=[DoesNotFit("7b needs 5.3 GB.", hint="Take a smaller one."), UnknownModel("Still not.")])
    app = Alone(loader)
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_for_text(pilot, "7b needs 5.3 GB.")
        assert "Take a smaller one." in screen_text(app)
        await pilot.press("tab", "enter")
        await wait_for_text(pilot, "Still not.")
        await pilot.press("down", "enter")
        await wait_for_text(pilot, "I am the guide")
        assert [wish.name for wish in loader.wishes] == ["guide"] * 3
        assert app.opened == 0


async def test_after_a_crash_safe_mode_is_offered():
    from qwen2_local.errors import WorkerDied

    loader = ScriptedLoader()
    app: Any = Alone(loader)
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_until(pilot, lambda: app.host.state.phase == "ready")
        app.host.crash(WorkerDied("The worker process crashed in native code (SIGSEGV)."))
        await wait_for_text(pilot, "safe mode")
        await pilot.press("tab", "down", "enter")
        await wait_until(pilot, lambda: app.host.state.phase == "ready")
        assert loader.wishes[-1].safe
        await pilot.press("tab")

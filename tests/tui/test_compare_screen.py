"""Two models on one prompt."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest

from qwen2_local import fit
from qwen2_local.errors import BackendError, DoesNotFit, UsageError
from qwen2_local.store import Store
from qwen2_tui import contest
from qwen2_tui.contest import Contender, Result
from qwen2_tui.live import Progress
from qwen2_tui.model import LoadWish
from qwen2_tui.screens.compare import CompareScreen
from qwen2_tui.widgets.side import Side
from tests.support.installed import install
from tests.tui.pilot import make_app, screen_text, wait_for_text, wait_until
from tests.tui.scripted import Say, ScriptedLoader, ScriptedModel, dies

PLENTY = fit.Memory(10**12, 10**12)
WARM = "ok"
"""What a model says that was loaded just now: nobody sees it."""


@pytest.fixture(autouse=True)
def plenty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "machine_memory", lambda: PLENTY)


def two(first: ScriptedModel, second: ScriptedModel, **more: Any) -> ScriptedLoader:
    """The chat's model is the first, the guide in 4 bits the second."""
    return ScriptedLoader(first, models={"guide:q4_0": second}, **more)


async def opened(pilot: Any) -> CompareScreen:
    await wait_until(pilot, lambda: pilot.app.host.state.phase == "ready")
    pilot.app.open_compare()
    await wait_until(pilot, lambda: len(pilot.app.screen.query(Side)) == 2)
    screen: CompareScreen = pilot.app.screen
    await wait_until(pilot, lambda: screen.sides[1].contender is not None)
    return screen


async def ask(pilot: Any, *keys: str) -> None:
    await pilot.press(*(keys or (*"Why?", "enter")))


async def over(pilot: Any, screen: CompareScreen, rounds: int = 1) -> None:
    await wait_until(pilot, lambda: screen.rounds == rounds)


async def test_both_answer_side_by_side_with_their_numbers():
    first, second = ScriptedModel("It is a **file** format.", pid=os.getpid()), ScriptedModel(WARM, "A format of files.", pid=os.getpid())
    app = make_app(loader=two(first, second))
    async with app.run_test(size=(100, 30)) as pilot:
        screen = await opened(pilot)
        await ask(pilot)
        await over(pilot, screen)
        shown = screen_text(app)
        assert any("It is a file format." in line and "A format of files." in line for line in shown.split("\n"))
        assert shown.count("tok/s") == 2 and shown.count("first token") == 2 and shown.count("memory") == 2 and "file 1" in shown
        assert "one after the other" in shown and "Why?" in shown


async def test_on_a_narrow_terminal_one_is_above_the_other():
    first, second = ScriptedModel("It is a file format."), ScriptedModel(WARM, "A format of files.")
    app = make_app(loader=two(first, second))
    async with app.run_test(size=(60, 20)) as pilot:
        screen = await opened(pilot)
        await ask(pilot)
        await over(pilot, screen)
        lines = screen_text(app).split("\n")
        upper, lower = (next(place for place, line in enumerate(lines) if text in line) for text in ("It is a file", "A format of"))
        assert upper < lower
        await pilot.resize_terminal(90, 20)
        await wait_until(pilot, lambda: any("It is a file" in line and "A format of" in line for line in screen_text(app).split("\n")))


async def test_the_same_seed_for_both_and_another_the_next_time():
    first, second = ScriptedModel(), ScriptedModel()
    app = make_app(loader=two(first, second))
    async with app.run_test(size=(100, 30)) as pilot:
        screen = await opened(pilot)
        await ask(pilot)
        await over(pilot, screen)
        await ask(pilot, "ctrl+r")
        await over(pilot, screen, 2)
        seeds = [[options["seed"] for options in model.options if "seed" in options] for model in (first, second)]
        assert seeds[0] == seeds[1] and len(set(seeds[0])) == 2
        assert all(options["persist"] is False for model in (first, second) for options in model.options)


async def test_the_second_begins_when_the_first_has_ended():
    first, second = ScriptedModel(Say("one two three", hold=1)), ScriptedModel()
    app = make_app(loader=two(first, second))
    async with app.run_test(size=(100, 30)) as pilot:
        screen = await opened(pilot)
        await ask(pilot)
        await wait_until(pilot, lambda: first.prompts)
        await pilot.pause(0.1)
        assert len(second.prompts) == 1, "only what warms it"
        first.go.release()
        await over(pilot, screen)
        assert len(second.prompts) == 2


async def test_what_was_loaded_for_it_is_closed_with_it():
    first, second = ScriptedModel(), ScriptedModel()
    loader = two(first, second)
    app = make_app(loader=loader)
    async with app.run_test(size=(100, 30)) as pilot:
        screen = await opened(pilot)
        await ask(pilot)
        await over(pilot, screen)
        assert [wish.name for wish in loader.wishes] == ["guide", "guide:q4_0"]
        assert not loader.wishes[1].kv_cache, "nothing of a comparison is kept"
        await pilot.press("escape")
        await wait_until(pilot, lambda: second.closed)
        assert not first.closed and app.screen is app.chat_screen


async def test_what_does_not_fit_together_is_refused_in_words(monkeypatch):
    first, second = ScriptedModel(), ScriptedModel()
    loader = two(first, second)
    app = make_app(loader=loader)
    async with app.run_test(size=(100, 30)) as pilot:
        screen = await opened(pilot)
        monkeypatch.setattr(fit, "machine_memory", lambda: fit.Memory(10**9, 10**8))
        await pilot.press(*"Why?", "enter")
        await wait_for_text(pilot, "guide:q4_0 needs")
        await over(pilot, screen)
        assert "0.1 GB of memory are free" in screen_text(app).replace("\n", " ") and len(loader.wishes) == 1 and not first.prompts


async def test_a_model_that_cannot_be_loaded_is_said_with_the_next_step():
    loader = two(ScriptedModel(), ScriptedModel())
    app = make_app(loader=loader)
    async with app.run_test(size=(100, 30)) as pilot:
        screen = await opened(pilot)
        loader.fails.append(BackendError("It is broken\x1b[2J.", hint="Mend it."))
        await pilot.press(*"Why?", "enter")
        await wait_for_text(pilot, "It is broken[2J.")
        await over(pilot, screen)


async def test_escape_stops_and_keeps_what_came():
    first, second = ScriptedModel(Say("one two three four", hold=2)), ScriptedModel()
    app = make_app(loader=two(first, second))
    async with app.run_test(size=(100, 30)) as pilot:
        screen = await opened(pilot)
        await ask(pilot)
        await wait_for_text(pilot, "one")
        await pilot.press("escape")
        await over(pilot, screen)
        assert app.screen is screen and "stopped" in screen_text(app) and len(second.prompts) == 1


async def test_a_worker_that_dies_does_not_cost_the_other_its_turn():
    first, second = ScriptedModel(dies("one two three four", 2)), ScriptedModel(WARM, "I am well.")
    app = make_app(loader=two(first, second))
    async with app.run_test(size=(100, 30)) as pilot:
        screen = await opened(pilot)
        await ask(pilot)
        await wait_for_text(pilot, "I am well.")
        await over(pilot, screen)
        assert "killed by signal 9" in screen_text(app).replace("\n", " ") and "one" in screen_text(app)


async def test_not_while_a_reply_is_written_in_the_chat():
    first = ScriptedModel(Say("one two three", hold=1))
    app = make_app(loader=two(first, ScriptedModel()))
    async with app.run_test(size=(100, 30)) as pilot:
        await wait_until(pilot, lambda: app.host.state.phase == "ready")
        await pilot.press(*"Hi", "enter")
        await wait_until(pilot, lambda: app.chat_screen.busy)
        screen = await opened(pilot)
        await pilot.press(*"Why?", "enter")
        await wait_for_text(pilot, "being written in the chat")
        assert screen.rounds == 0 and len(first.prompts) == 1
        first.go.release()


async def test_other_models_and_settings_are_chosen():
    first, second = ScriptedModel(), ScriptedModel()
    loader = two(first, second)
    app = make_app(loader=loader)
    async with app.run_test(size=(100, 30)) as pilot:
        screen = await opened(pilot)
        await pilot.press("f4", "1")  # the left: the guide, as it is
        await wait_for_text(pilot, "The right one")
        await pilot.press("3")
        await wait_for_text(pilot, "Settings of guide:q4_0")
        await pilot.press(*"temprature=1")
        await wait_for_text(pilot, "Did you mean temperature?")
        await pilot.press(*["backspace"] * 12, *"temperature=0.5 kv_bits=8", "enter")
        await wait_until(pilot, lambda: screen.sides[1].contender.says)
        assert "temperature=0.5" in screen_text(app)
        await ask(pilot)
        await over(pilot, screen)
        assert loader.wishes[1].kv_bits == 8 and second.options[-1]["temperature"] == 0.5
        assert "temperature" not in first.options[-1]


async def test_one_model_with_two_settings_is_loaded_once():
    first = ScriptedModel()
    loader = ScriptedLoader(first)
    app = make_app(loader=loader)
    async with app.run_test(size=(100, 30)) as pilot:
        screen = await opened(pilot)
        for side, heat in zip(screen.sides, (0.0, 1.0), strict=True):
            side.name_it(Contender("guide", says={"temperature": heat}))
        await ask(pilot)
        await over(pilot, screen)
        assert len(loader.wishes) == 1 and [options["temperature"] for options in first.options] == [0.0, 1.0]


async def test_the_chats_model_is_not_loaded_a_second_time_by_its_full_name():
    install(Store(), "mine:q4_0")
    mine, guide = ScriptedModel(), ScriptedModel()
    loader = ScriptedLoader(mine, models={"guide": guide})
    app = make_app(loader=loader, model=mine)
    app.opening = replace(app.opening, model="mine")
    async with app.run_test(size=(100, 30)) as pilot:
        screen = await opened(pilot)
        assert [side.contender.name for side in screen.sides] == ["mine:q4_0", "guide"]
        await ask(pilot)
        await over(pilot, screen)
        assert [wish.name for wish in loader.wishes] == ["mine", "guide"]


async def test_who_leaves_while_one_is_loaded_leaves_nothing_behind():
    first, second = ScriptedModel(), ScriptedModel()
    loader = two(first, second)
    app = make_app(loader=loader)
    async with app.run_test(size=(100, 30)) as pilot:
        await opened(pilot)
        loader.hold = True
        await ask(pilot)
        await wait_for_text(pilot, "loading guide:q4_0")
        await pilot.press("escape")
        await wait_for_text(pilot, "stopping")
        app.pop_screen()
        await pilot.pause()
        loader.go.release()
        await wait_until(pilot, lambda: second.closed)
        assert not first.prompts


async def test_a_file_is_attached_for_both(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("The river is quiet.")
    first, second = ScriptedModel(), ScriptedModel()
    app = make_app(loader=two(first, second))
    async with app.run_test(size=(100, 30)) as pilot:
        screen = await opened(pilot)
        await ask(pilot, *"Sum up @notes.txt", "enter")
        await over(pilot, screen)
        assert "The river is quiet." in first.read and "The river is quiet." in second.read
        await ask(pilot, *" @none.txt", "enter")
        await wait_for_text(pilot, "There is no file none.txt")
        assert len(first.prompts) == 1


# Who they are, and what they need


def test_settings_are_read_and_written():
    text = "backend=mlx kv_bits=8 temperature=0.2 top_k=40"
    made = Contender("7b").with_settings(text)
    assert made.loads == {"backend": "mlx", "kv_bits": 8} and made.says == {"temperature": 0.2, "top_k": 40}
    assert made.settings == text and made.with_settings("").settings == ""
    assert made.wish == LoadWish("7b", backend="mlx", context=contest.CONTEXT, kv_bits=8, kv_cache=False)
    assert Contender("7b").with_settings("context=100, max_tokens=5").wish.context == 100


@pytest.mark.parametrize(
    ("text", "words"), [("top_p=hot", "no number"), ("top_p", "has no value"), ("heat=1", "There is no setting"), ("=1", "no setting")]
)
def test_settings_that_are_none(text, words):
    with pytest.raises(UsageError, match=words):
        Contender("7b").with_settings(text)


def test_room_is_counted_for_all_that_are_to_be_loaded():
    memory, needs = fit.Memory(16 * 10**9, 8 * 10**9), lambda wish: 5 * 10**9
    contest.require_room([LoadWish("a")], memory, needs)
    with pytest.raises(DoesNotFit, match=r"a and b need 10.0 GB together, but 8.0 GB of memory are free"):
        contest.require_room([LoadWish("a"), LoadWish("b")], memory, needs)


def test_the_guide_needs_some_memory():
    assert 10**8 < contest.memory_of(LoadWish("guide:q4_0")) < 10**9


def test_numbers_in_words():
    assert Result().words == "waiting"
    assert Result(Progress("reading", 5, 2000)).words == "reading 5 of 2,000 tokens"
    done = Progress("over", 40, 40, 32, 128, 38.24, 0.31)
    words = Result(done, 5_100_000_000, 4_680_000_000, "stopped").words
    assert words == "38.2 tok/s · first token 0.31 s (32 of 40 tokens known already) · 128 tokens · memory 5.1 GB · file 4.68 GB · stopped"

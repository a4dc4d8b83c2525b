"""Whole visits: what a person comes for, through all rooms of the app. The model is a script; at the end the real guide, on both backends."""

from __future__ import annotations

import sys

import pytest

from qwen2_local import paths
from qwen2_local.chats import ChatStore
from qwen2_local.errors import DoesNotFit
from tests.tui.pilot import ask, make_app, running, screen_text, wait_for_text, wait_until
from tests.tui.scripted import Say, ScriptedLoader, ScriptedModel, dies


def texts(app) -> list[str]:
    """The conversation that is shown, without the system message."""
    return [one.text for one in app.chat_screen.chat.messages if one.role != "system"]


def idle(app) -> bool:
    return not app.chat_screen.busy


async def test_the_first_minute():
    """A greeting, a question, an answer; tomorrow it is still there."""
    app = make_app("The **answer**.")
    async with running(app) as pilot:
        await wait_for_text(pilot, "Three things to try")
        await ask(pilot, "What is it?")
        await wait_for_text(pilot, "The answer.")
        assert "Three things to try" not in screen_text(app)
        assert "What is it?" in screen_text(app)
    again = make_app(opening={"continue_last": True})
    async with running(again) as pilot:
        await wait_for_text(pilot, "The answer.")


async def test_stop_then_continue():
    """Esc keeps what came; c lets the reply go on from there, as one turn."""
    app = make_app(Say("alpha beta gamma delta", hold=3), " and the rest")
    async with running(app) as pilot:
        await ask(pilot, "Count.")
        await wait_until(pilot, lambda: "alpha" in screen_text(app))
        await pilot.press("escape")
        await wait_until(pilot, lambda: idle(app))
        stopped = texts(app)[-1]
        assert stopped.startswith("alpha")
        await pilot.press("tab", "c")
        await wait_until(pilot, lambda: texts(app)[-1] == stopped + " and the rest")


async def test_after_a_question_the_keys_are_about_its_reply():
    """Whatever turn was selected before: tab goes to the newest."""
    app = make_app("first reply", "second reply")
    async with running(app) as pilot:
        await ask(pilot, "One?")
        await wait_until(pilot, lambda: "first reply" in screen_text(app) and idle(app))
        await pilot.press("tab", "up", "shift+tab")
        await wait_until(pilot, lambda: app.focused is app.chat_screen.composer)
        await ask(pilot, "Two?")
        await wait_until(pilot, lambda: "second reply" in screen_text(app) and idle(app))
        await pilot.press("tab")
        transcript = app.chat_screen.transcript
        await wait_until(pilot, lambda: transcript.has_focus)
        assert transcript.turns[transcript.selected].text == "second reply"


async def test_regenerate_and_walk_the_branches():
    app = make_app("first reply", "second reply")
    async with running(app) as pilot:
        await ask(pilot, "Again?")
        await wait_for_text(pilot, "first reply")
        await wait_until(pilot, lambda: idle(app))
        await pilot.press("tab", "r")
        await wait_for_text(pilot, "second reply")
        await wait_until(pilot, lambda: idle(app))
        assert "2/2" in screen_text(app)
        await pilot.press("left")
        await wait_for_text(pilot, "first reply")
        assert "1/2" in screen_text(app)
        await pilot.press("right")
        await wait_for_text(pilot, "second reply")


async def test_editing_a_question_branches():
    app = make_app("rivers", "more rivers", "lakes")
    async with running(app) as pilot:
        await ask(pilot, "Name rivers.")
        await wait_until(pilot, lambda: "rivers" in texts(app) and idle(app))
        await ask(pilot, "More.")
        await wait_until(pilot, lambda: "more rivers" in texts(app) and idle(app))
        await pilot.press("tab", "up", "up", "up", "e")
        await wait_until(pilot, lambda: getattr(app.focused, "text", "") == "Name rivers.")
        app.focused.text = ""
        await ask(pilot, "Name lakes.")
        await wait_until(pilot, lambda: texts(app) == ["Name lakes.", "lakes"])
        await wait_for_text(pilot, "2/2")


async def test_a_worker_that_dies_costs_only_the_rest_of_a_reply():
    app = make_app(dies("alpha beta gamma", after=2), "I am back.")
    async with running(app) as pilot:
        await ask(pilot, "Count.")
        await wait_for_text(pilot, "safe mode")
        assert app.chat_screen.chat.messages[-1].state == "partial"
        await ask(pilot, "Still there?")
        await wait_for_text(pilot, "I am back.")


async def test_a_model_that_does_not_load_says_why_and_another_can_be_taken():
    model = ScriptedModel("Here.")
    app = make_app(loader=ScriptedLoader(model, fails=[DoesNotFit("It needs 44 GB, and 8 are free.", hint="Take a smaller one.")]))
    async with running(app) as pilot:
        await wait_for_text(pilot, "It needs 44 GB")
        app.switch_model(app.wish("guide"))
        await wait_until(pilot, lambda: app.host.state.phase == "ready")
        await ask(pilot, "Hello?")
        await wait_for_text(pilot, "Here.")


async def test_what_is_typed_while_the_model_loads_is_sent_when_it_is_there():
    loader = ScriptedLoader(ScriptedModel("Now I am."), hold=True)
    app = make_app(loader=loader)
    async with app.run_test(size=(100, 30)) as pilot:
        await wait_until(pilot, lambda: app.host.state.phase == "loading")
        await ask(pilot, "Are you there?")
        loader.go.release()
        await wait_for_text(pilot, "Now I am.")


async def test_another_model_goes_on_with_the_same_chat():
    small, large = ScriptedModel("Small talk.", name="guide"), ScriptedModel("Large talk.", name="7b")
    app = make_app(loader=ScriptedLoader(small, models={"7b": large}))
    async with running(app) as pilot:
        await ask(pilot, "First.")
        await wait_for_text(pilot, "Small talk.")
        await wait_until(pilot, lambda: idle(app))
        app.switch_model(app.wish("7b"))
        await wait_until(pilot, lambda: app.host.model is large)
        await ask(pilot, "Second.")
        await wait_for_text(pilot, "Large talk.")
        assert "Small talk." in large.read
        assert small.closed


async def test_a_temporary_chat_leaves_nothing(own_home):
    app = make_app("It stays between us.")
    async with running(app) as pilot:
        await pilot.press("ctrl+t")
        await ask(pilot, "My secret is 7391-xyzzy.")
        await wait_for_text(pilot, "It stays between us.")
    assert app.scripted.options[-1].get("persist") is False
    for path in own_home.rglob("*"):
        if path.is_file() and not path.is_relative_to(own_home / "cache"):
            assert b"xyzzy" not in path.read_bytes(), path


async def test_search_finds_an_old_chat_and_opens_it():
    with ChatStore.open(paths.home() / "chats.db") as store:
        for name in ("rivers", "lakes", "hills"):
            _fill(store, f"About {name}", f"What of {name}?", f"There are many {name}, and one Vientiane-{name}.")
    app = make_app()
    async with running(app) as pilot:
        await pilot.press("ctrl+f", *"vientiane-l")
        await wait_until(pilot, lambda: "About lakes" in screen_text(app) and "About hills" not in screen_text(app))
        await pilot.press("enter")
        await wait_for_text(pilot, "There are many lakes")
        assert app.chat_screen.number is not None


async def test_deleting_can_be_undone_until_the_end_and_is_then_final(own_home):
    with ChatStore.open(paths.home() / "chats.db") as store:
        _fill(store, "Keep me", "a", "kept-7391")
        _fill(store, "Drop me", "b", "dropped-7391")
    app = make_app()
    async with running(app) as pilot:
        for undo in (True, False):
            await pilot.press("ctrl+f", *"drop me")
            await wait_until(pilot, lambda: "Drop me" in screen_text(app) and "Keep me" not in screen_text(app))
            await pilot.press("down", "d")
            await wait_until(pilot, lambda: len(app.store.summaries()) == 1)
            if undo:
                await pilot.press("ctrl+z")
                await wait_until(pilot, lambda: len(app.store.summaries()) == 2)
                await pilot.press("escape")
    with ChatStore.open(paths.home() / "chats.db") as store:
        assert [one.title for one in store.summaries()] == ["Keep me"]
    left = b"".join(path.read_bytes() for path in own_home.glob("chats.db*"))
    assert b"kept-7391" in left
    assert b"dropped-7391" not in left


async def test_a_message_that_does_not_fit_is_said_before_it_is_sent():
    app = make_app("Understood.", longest=400)
    async with running(app) as pilot:
        composer = app.focused
        composer.insert("many words " * 300)
        await wait_for_text(pilot, "does not fit")
        await pilot.press("enter")
        assert not app.scripted.prompts, "it was sent"
        assert "many words" in composer.text, "what was written is gone"


async def test_a_file_is_attached_by_its_path(tmp_path, monkeypatch):
    (tmp_path / "report.txt").write_text("The profit was 12,345 kip.\n" * 3)
    monkeypatch.chdir(tmp_path)
    app = make_app("I read it.")
    async with running(app) as pilot:
        await ask(pilot, "Sum up @report.txt")
        await wait_for_text(pilot, "I read it.")
        assert "The profit was 12,345 kip." in app.scripted.read
        assert "12,345" not in screen_text(app), "the file is folded to a line"
        assert "report.txt" in screen_text(app)


async def test_drafts_are_kept_per_chat_and_over_the_end():
    app = make_app("Understood.")
    async with running(app) as pilot:
        await ask(pilot, "Hello.")
        await wait_for_text(pilot, "Understood.")
        await wait_until(pilot, lambda: idle(app))
        app.focused.insert("half a thought")
        await pilot.press("ctrl+n")
        await wait_until(pilot, lambda: app.focused is not None and app.focused.text == "")
    app = make_app("Understood.", opening={"continue_last": True})
    async with running(app) as pilot:
        await wait_until(pilot, lambda: app.focused.text == "half a thought")


async def test_settings_of_a_person_reach_the_model(own_home):
    (own_home / "settings.toml").write_text('[chat]\nsystem = "Answer in Lao."\ntemperature = 0.25\nmax_tokens = 77\n')
    app = make_app("Understood.")
    async with running(app) as pilot:
        await ask(pilot, "Hello.")
        await wait_for_text(pilot, "Understood.")
        assert "Answer in Lao." in app.scripted.read
        assert app.scripted.options[-1]["temperature"] == 0.25
        assert app.scripted.options[-1]["max_tokens"] == 77


async def test_reading_a_long_prompt_tells_how_far_it_is():
    app = make_app(Say("Read.", reads=40, slice_s=0.02))
    async with running(app) as pilot:
        await ask(pilot, "word " * 400)
        await wait_for_text(pilot, "reading ")
        await wait_for_text(pilot, "Read.")
        await wait_for_text(pilot, "tok/s")


@pytest.mark.parametrize("size", [(60, 20), (80, 24), (200, 60)])
async def test_every_size(size):
    app = make_app("A reply of some length. " * 5)
    async with running(app, size=size) as pilot:
        await ask(pilot, "Hello.")
        await wait_for_text(pilot, "A reply of some")
        assert all(len(line) <= size[0] for line in screen_text(app).splitlines())


async def test_every_command_of_the_palette_is_named_and_none_is_twice():
    app = make_app()
    async with running(app):
        titles = [command.title for command in app.get_system_commands(app.screen)]
        assert len(titles) == len(set(titles))
        for word in ("New chat", "Models", "Settings", "Help", "Quit", "Compare"):
            assert any(word in title for title in titles)


BACKENDS = ["llama.cpp", pytest.param("mlx", marks=pytest.mark.skipif(sys.platform not in ("linux", "darwin"), reason="no MLX here"))]


@pytest.mark.parametrize("backend", BACKENDS)
async def test_a_visit_with_the_real_guide(backend):
    """Ask, stop, continue, edit, and come back: the second time the beginning is in the cache."""
    from qwen2_tui.model import load

    app = make_app(loader=load, opening={"loads": {"backend": backend, "context": 2048}})
    async with running(app) as pilot:
        await ask(pilot, "What is GGUF?")
        await wait_until(pilot, lambda: len(texts(app)) == 2 and idle(app), 60)
        assert "GGUF" in texts(app)[-1]
        await ask(pilot, "And what is MLX?")
        await wait_until(pilot, lambda: len(texts(app)) == 4 and idle(app), 60)
        assert app.chat_screen.chat.messages[-1].usage.cached_tokens > 0
        await pilot.press("tab", "r")
        await wait_until(pilot, lambda: "2/2" in screen_text(app) and idle(app), 60)
    app = make_app(loader=load, opening={"loads": {"backend": backend, "context": 2048}, "continue_last": True})
    async with running(app) as pilot:
        await wait_for_text(pilot, "And what is MLX?")
        await ask(pilot, "Thanks.")
        await wait_until(pilot, lambda: len(texts(app)) == 6 and idle(app), 60)
        usage = app.chat_screen.chat.messages[-1].usage
        assert usage.cached_tokens > usage.prompt_tokens // 2, "it was not read from the disk"


def _fill(store: ChatStore, title: str, question: str, reply: str) -> int:
    from qwen2_local.chats import ChatMessage, ChatRecord

    turns = (ChatMessage("user", question, id=1), ChatMessage("assistant", reply, id=2, parent=1))
    return store.insert(ChatRecord(title, True, False, 1.0, 2.0, 2, turns))[0]

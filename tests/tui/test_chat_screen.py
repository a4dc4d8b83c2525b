"""The chat screen: every action on a turn, what ends a reply, and what is offered then."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from textual import events
from textual.pilot import Pilot

from qwen2_local import paths
from qwen2_local.chat import Chat
from qwen2_local.chats import ChatMessage, ChatRecord, ChatStore
from qwen2_local.errors import BackendError, DoesNotFit, UsageError
from qwen2_tui.model import LoadWish
from tests.tui.pilot import ask, make_app, running, screen_text, wait_for_text, wait_until
from tests.tui.scripted import Say, ScriptedLoader, ScriptedModel, dies


def texts(app: Any) -> list[str]:
    chat = app.chat_screen.chat
    return [] if chat is None else [one.text for one in chat.messages]


def shown(app: Any) -> list[str]:
    return [turn.text for turn in app.chat_screen.transcript.turns]


def idle(app: Any) -> bool:
    return app.chat_screen.entering.ready and not app.chat_screen.busy


async def asked(pilot: Pilot[Any], text: str) -> None:
    """A question, and the reply to its end."""
    before = len(texts(pilot.app))
    await ask(pilot, text)
    await wait_until(pilot, lambda: len(texts(pilot.app)) >= before + 2 and idle(pilot.app))


@asynccontextmanager
async def chatting(*says: Any, questions: int = 0, **options: Any) -> AsyncIterator[tuple[Pilot[Any], Any]]:
    """The app, after so many questions and their replies."""
    app = make_app(*says, **options)
    async with running(app) as pilot:
        await wait_until(pilot, lambda: idle(app))
        for number in range(questions):
            await asked(pilot, f"question {number + 1}")
        yield pilot, app


@pytest.fixture
def store() -> Iterator[ChatStore]:
    with ChatStore.open(paths.home() / "chats.db") as store:
        yield store


def words(app: Any) -> str:
    """What is offered; "" for nothing."""
    offer = app.chat_screen.offers.offer
    return "" if offer is None else offer.words


def notices(app: Any) -> list[str]:
    """What was told beside what goes on."""
    return [one.message for one in app._notifications]


async def on_turn(pilot: Pilot[Any], index: int, *keys: str) -> None:
    """Presses keys on a turn, counted as in a list."""
    transcript = pilot.app.chat_screen.transcript
    transcript.focus()
    await pilot.pause()
    transcript.selected = range(len(transcript.turns))[index]
    await pilot.press(*keys)


# Send and stop


async def test_a_reply_grows_while_it_comes():
    async with chatting(Say("one two three four", hold=2)) as (pilot, app):
        await ask(pilot, "Count.")
        await wait_until(pilot, lambda: shown(app)[-1:] and shown(app)[-1].startswith("one"))
        assert app.chat_screen.busy and shown(app)[-1] != "one two three four"
        assert app.chat_screen.composer.text == "", "one can write on"
        app.scripted.go.release()
        await wait_until(pilot, lambda: idle(app))
        assert shown(app) == ["Count.", "one two three four"]


async def test_what_is_typed_right_behind_enter_stays():
    async with chatting("one") as (pilot, app):
        for key in ("a", "b", "enter", "c", "d"):
            app.post_message(events.Key(key, key if len(key) == 1 else None))
        await wait_until(pilot, lambda: idle(app) and texts(app) == ["ab", "one"])
        assert app.chat_screen.composer.text == "cd"


async def test_a_second_question_waits_for_the_first_reply():
    async with chatting(Say("one two", hold=1)) as (pilot, app):
        await ask(pilot, "First.")
        await wait_until(pilot, lambda: len(app.scripted.prompts) == 1)
        await ask(pilot, "Second.")
        assert app.chat_screen.composer.text == "Second.", "it stays where it was written"
        await pilot.press("escape")
        await wait_until(pilot, lambda: idle(app))
        assert len(app.scripted.prompts) == 1


async def test_a_reply_stopped_before_its_first_letter_leaves_the_question():
    async with chatting(Say("never", hold_reading=True)) as (pilot, app):
        await ask(pilot, "Hello?")
        await wait_until(pilot, lambda: app.scripted.prompts)
        await pilot.press("escape")
        await wait_until(pilot, lambda: idle(app))
        assert shown(app) == texts(app) == ["Hello?"]
        await on_turn(pilot, 0, "r")
        await wait_until(pilot, lambda: shown(app) == ["Hello?", "ok"])


async def test_reading_shows_how_far_it_is():
    async with chatting(Say("ok", reads=20, slice_s=0.1)) as (pilot, app):
        await ask(pilot, "long " * 200)
        await wait_for_text(pilot, "tokens · ")
        assert "left" in screen_text(app)
        await pilot.press("escape")


async def test_after_a_reply_the_context_says_what_came_from_the_cache():
    async with chatting("one", "two", questions=2) as (pilot, app):
        await wait_for_text(pilot, "from cache)")
        used = app.chat_screen.chat.count()
        await wait_for_text(pilot, f"{used:,} / 8,192")


async def test_the_meter_counts_what_is_being_written():
    async with chatting() as (pilot, app):
        app.chat_screen.composer.write("some words to be counted")
        await wait_for_text(pilot, f"context ▓░░░░░░░░░ {app.chat_screen.chat.count('some words to be counted'):,} / 8,192")


# Turns


async def test_any_reply_can_be_written_anew_and_the_branches_walked():
    async with chatting("one", "two", "another", questions=2) as (pilot, app):
        await on_turn(pilot, 1, "r")
        await wait_until(pilot, lambda: idle(app) and shown(app) == ["question 1", "another"])
        await wait_for_text(pilot, "2/2")
        await pilot.press("left")
        await wait_until(pilot, lambda: shown(app) == ["question 1", "one", "question 2", "two"])
        await pilot.press("right")
        await wait_until(pilot, lambda: shown(app) == ["question 1", "another"])
        await pilot.press("right")
        assert shown(app) == ["question 1", "another"], "there is no third"


async def test_a_question_is_edited_and_the_draft_waits():
    async with chatting("one", "two", "three", questions=2) as (pilot, app):
        screen = app.chat_screen
        await pilot.press(*"draft")
        await on_turn(pilot, 0, "e")
        assert screen.composer.has_focus and screen.composer.text == "question 1"
        await pilot.press("!", "enter")
        await wait_until(pilot, lambda: idle(app) and shown(app) == ["question 1!", "three"])
        assert screen.composer.text == "draft"
        assert screen.chat.places() == ((2, 2), (1, 1))


async def test_an_edit_is_given_up_with_escape():
    async with chatting("one", questions=1) as (pilot, app):
        await pilot.press(*"draft")
        await on_turn(pilot, 0, "e")
        await pilot.press(*" nonsense")
        await pilot.press("escape")
        assert app.chat_screen.composer.text == "draft" and shown(app) == ["question 1", "one"]
        assert len(app.scripted.prompts) == 1


async def test_a_reply_is_edited_and_the_model_goes_on():
    async with chatting("one two", " and so on", questions=1) as (pilot, app):
        await on_turn(pilot, 1, "e")
        assert app.chat_screen.composer.text == "one two"
        app.chat_screen.composer.write("One, then")
        await pilot.press("enter")
        await wait_until(pilot, lambda: idle(app) and shown(app) == ["question 1", "One, then and so on"])
        assert app.scripted.read.endswith("One, then")
        await wait_for_text(pilot, "2/2")


async def test_a_stopped_reply_goes_on_as_one_turn():
    async with chatting(Say("one two three", hold=2), " four") as (pilot, app):
        await ask(pilot, "Count.")
        await wait_until(pilot, lambda: shown(app)[-1].startswith("one"))
        await pilot.press("escape")
        await wait_until(pilot, lambda: idle(app))
        await wait_for_text(pilot, "stopped · c continues")
        stopped = texts(app)[-1]
        await on_turn(pilot, -1, "c")
        await wait_until(pilot, lambda: idle(app) and texts(app)[-1] == stopped + " four" == shown(app)[-1])
        assert app.chat_screen.chat.places()[-1] == (1, 1)


async def test_the_same_reply_again_is_explained():
    async with chatting("one", "one", questions=1) as (pilot, app):
        await on_turn(pilot, -1, "r")
        await wait_until(pilot, lambda: any("The same reply again" in one for one in notices(app)))


async def test_a_fixed_seed_is_another_one_for_another_reply():
    async with chatting("one", "two", questions=1) as (pilot, app):
        app.chat_screen.change_chat(app.chat_screen.chat_settings.__class__(seed=7))
        await on_turn(pilot, -1, "r")
        await wait_until(pilot, lambda: idle(app) and len(app.scripted.options) == 2)
        assert app.scripted.options[1]["seed"] == 8


async def test_copying_gives_what_was_written(monkeypatch: pytest.MonkeyPatch):
    async with chatting("Say:\n\n```python\nprint(1)\n```\n", questions=1) as (pilot, app):
        copied: list[str] = []
        monkeypatch.setattr(app, "copy_to_clipboard", copied.append)
        await on_turn(pilot, 1, "y", "n", "y")
        await on_turn(pilot, 0, "y")
        assert copied == ["Say:\n\n```python\nprint(1)\n```\n", "print(1)", "question 1"]


async def test_nothing_is_done_with_turns_while_a_reply_is_written():
    async with chatting("one", Say("two three", hold=1), questions=1) as (pilot, app):
        await ask(pilot, "More.")
        await wait_until(pilot, lambda: len(app.scripted.prompts) == 2)
        await on_turn(pilot, 1, "r")
        assert app.chat_screen.busy and len(app.scripted.prompts) == 2
        await pilot.press("escape")
        await wait_until(pilot, lambda: idle(app))


# What ends a reply


async def test_a_worker_that_died_is_said_in_the_conversation_and_can_be_started_again():
    async with chatting(dies("one two three", after=2), " three") as (pilot, app):
        await ask(pilot, "Count.")
        await wait_until(pilot, lambda: "killed by signal 9" in words(app))
        assert app.host.state.crashed
        assert "killed by signal 9" in app.chat_screen.transcript.turns[-1].footer
        assert app.chat_screen.chat.messages[-1].state == "partial"
        await pilot.press("f5")
        await wait_until(pilot, lambda: idle(app) and words(app) == "The last reply broke off.")
        await pilot.press("f5")
        await wait_until(pilot, lambda: idle(app) and texts(app)[-1] == "one two three")


async def test_it_can_be_started_in_safe_mode():
    model = ScriptedModel(dies("one two", after=1))
    loader = ScriptedLoader(model)
    app = make_app(model=model, loader=loader)
    async with running(app) as pilot:
        await wait_until(pilot, lambda: idle(app))
        await ask(pilot, "Count.")
        await wait_until(pilot, lambda: words(app))
        await pilot.press("f6")
        await wait_until(pilot, lambda: idle(app))
        assert [wish.safe for wish in loader.wishes] == [False, True]


async def test_a_worker_that_died_while_reading_leaves_the_question_with_the_words():
    async with chatting(Say("ok", hold_reading=True)) as (pilot, app):
        await ask(pilot, "Hello?")
        await wait_until(pilot, lambda: app.scripted.prompts)
        app.scripted.die()
        await wait_until(pilot, lambda: "killed" in words(app))
        assert shown(app) == ["Hello?"] and "killed" in app.chat_screen.transcript.turns[-1].footer


async def test_a_question_after_the_crash_starts_it_again_by_itself():
    async with chatting(dies("one two", after=1), "back") as (pilot, app):
        await ask(pilot, "Count.")
        await wait_until(pilot, lambda: app.host.state.crashed)
        await ask(pilot, "Still there?")
        await wait_until(pilot, lambda: idle(app) and texts(app)[-1] == "back")


async def test_another_error_says_what_it_is_and_can_be_tried_again():
    async with chatting(Say("x", error=BackendError("It computed no numbers.", hint="Try another backend.")), "fine") as (pilot, app):
        await ask(pilot, "Well?")
        await wait_until(pilot, lambda: "It computed no numbers." in words(app))
        await pilot.press("f5")
        await wait_until(pilot, lambda: idle(app) and texts(app) == ["Well?", "fine"] == shown(app))


async def test_what_is_refused_comes_back_to_the_message():
    async with chatting(longest=64) as (pilot, app):
        text = "words " * 200
        app.chat_screen.composer.write(text)
        await pilot.press("enter")  # before it was counted
        await wait_until(pilot, lambda: (idle(app) and "does not fit" in words(app)) or "context holds" in words(app))
        assert app.chat_screen.composer.text == text and shown(app) == []
        assert not app.scripted.prompts


async def test_a_model_that_did_not_load_keeps_the_message():
    model = ScriptedModel()
    app = make_app(loader=ScriptedLoader(model, fails=[DoesNotFit("It needs 44 GB.")]))
    async with running(app) as pilot:
        await ask(pilot, "Hello?")
        assert app.chat_screen.composer.text == "Hello?"
        assert notices(app) == ["There is no model: It needs 44 GB."]


# The limit


async def test_shorten_leaves_out_the_oldest_and_says_so():
    long = "many words here " * 20
    async with chatting(long, long, "short", questions=2, longest=256) as (pilot, app):
        app.chat_screen.composer.write("and one more question " * 20)
        await wait_until(pilot, lambda: "does not fit" in words(app))
        await pilot.press("f5")
        await wait_until(pilot, lambda: "does not fit" not in words(app))
        await pilot.press("enter")
        await wait_until(pilot, lambda: idle(app) and texts(app)[-1] == "short")
        assert app.chat_screen.chat.left_out == 4
        await wait_for_text(pilot, "written without the 4 oldest messages")


async def test_a_new_chat_takes_the_message_along():
    long = "many words here " * 20
    async with chatting(long, long, questions=2, longest=256) as (pilot, app):
        app.chat_screen.composer.write("and one more question " * 20)
        await wait_until(pilot, lambda: "does not fit" in words(app))
        await pilot.press("f7")
        await wait_until(pilot, lambda: idle(app) and app.chat_screen.number is None)
        assert app.chat_screen.composer.text == "and one more question " * 20


async def test_a_summary_begins_a_new_chat():
    async with chatting("one", "two", "We counted to two.", "three", questions=2) as (pilot, app):
        before = app.chat_screen.number
        app.chat_screen.composer.write("and then?")
        app.chat_screen.acting.choose("summarise")
        await wait_until(pilot, lambda: idle(app) and app.chat_screen.session.conversation.empty)
        assert "Summarise our conversation" in app.scripted.read
        assert app.scripted.options[-1]["persist"] is False, "its KV would outlive the chat"
        assert app.chat_screen.composer.text == "and then?"
        await pilot.press("enter")
        await wait_until(pilot, lambda: idle(app) and texts(app)[-1:] == ["three"])
        assert texts(app) == ["Summary of the conversation so far:\nWe counted to two.", "and then?", "three"]
        assert app.chat_screen.number != before


async def test_a_summary_can_be_stopped():
    async with chatting("one", Say("We counted", hold=1), questions=1) as (pilot, app):
        app.chat_screen.acting.choose("summarise")
        await wait_until(pilot, lambda: len(app.scripted.prompts) == 2)
        await pilot.press("escape")
        await wait_until(pilot, lambda: app.chat_screen.acting._summary is None)
        assert shown(app) == ["question 1", "one"]


async def test_a_larger_context_is_loaded():
    model = ScriptedModel(longest=64)
    loader = ScriptedLoader(model)
    app = make_app(model=model, loader=loader, opening={"loads": {"context": 64}})
    async with running(app) as pilot:
        await wait_until(pilot, lambda: idle(app))
        app.chat_screen.composer.write("words " * 100)
        await wait_for_text(pilot, "larger context")
        model.longest = 8192
        await pilot.press("f5")
        await wait_until(pilot, lambda: idle(app) and len(loader.wishes) == 2 and words(app) == "")
        assert [wish.context for wish in loader.wishes] == [64, None]
        assert app.chat_screen.composer.text == "words " * 100


# Chats


async def test_a_chat_that_broke_off_says_so_and_goes_on(store: ChatStore):
    tokens = tuple(ScriptedModel().tokenizer.encode("one two"))
    question = ChatMessage("user", "Count.", id=1)
    reply = ChatMessage("assistant", "one two", id=2, parent=1, state="partial", tokens=tokens, tokenizer=ScriptedModel().tokenizer.identity)
    number, _ = store.insert(ChatRecord("Count", False, False, 1, 1, 2, (question, reply)))
    async with chatting(" three", store=store, opening={"chat": number}) as (pilot, app):
        await wait_until(pilot, lambda: words(app) == "The last reply broke off.")
        await pilot.press("f5")
        await wait_until(pilot, lambda: idle(app) and texts(app) == ["Count.", "one two three"] == shown(app))


async def test_the_next_start_offers_the_chat_that_broke_off(store: ChatStore):
    store.insert(ChatRecord("Count to three", True, False, 1, 1, 1, (ChatMessage("user", "Count.", id=1),)))
    async with chatting("one", store=store) as (pilot, app):
        await wait_until(pilot, lambda: words(app) == "The last chat ended in the middle: Count to three")
        await pilot.press("f5")
        await wait_until(pilot, lambda: words(app) == "The last question has no reply.")
        await pilot.press("f5")
        await wait_until(pilot, lambda: idle(app) and texts(app) == ["Count.", "one"] == shown(app))


async def test_a_reply_goes_on_while_one_looks_at_another_chat():
    async with chatting("one", Say("two three four", hold=1), "five", questions=1) as (pilot, app):
        screen = app.chat_screen
        await ask(pilot, "More.")
        await wait_until(pilot, lambda: len(app.scripted.prompts) == 2)
        first = screen.number
        await pilot.press("ctrl+n")
        await wait_until(pilot, lambda: idle(app) and screen.number is None and screen.session.conversation.empty)
        screen.open_chat(first)
        await wait_until(pilot, lambda: screen.busy)
        assert shown(app)[:3] == ["question 1", "one", "More."]
        await pilot.press("ctrl+n")
        await wait_until(pilot, lambda: screen.number is None)
        app.scripted.go.release()
        await wait_until(pilot, lambda: not screen.replying.all())
        screen.open_chat(first)
        await wait_until(pilot, lambda: idle(app) and shown(app) == ["question 1", "one", "More.", "two three four"])


async def test_a_worker_that_dies_behind_another_chat_is_said_too():
    async with chatting(Say("two three", hold=1)) as (pilot, app):
        await ask(pilot, "More.")
        await wait_until(pilot, lambda: app.chat_screen.session.live.progress().written == 1)
        await pilot.press("ctrl+n")
        await wait_until(pilot, lambda: not app.chat_screen.busy)
        app.scripted.die()
        await wait_until(pilot, lambda: "killed" in words(app) and app.host.state.crashed)


async def test_a_chat_is_there_before_its_model(store: ChatStore):
    chat = Chat(ScriptedModel("one"), store=store)
    chat.send("hello")
    loader = ScriptedLoader(hold=True)
    app = make_app(loader=loader, store=store, opening={"chat": chat.number})
    async with app.run_test(size=(100, 30)) as pilot:
        await wait_until(pilot, lambda: shown(app) == ["hello", "one"])
        assert app.chat_screen.chat is None
        await on_turn(pilot, -1, "r")
        assert notices(app) == ["The model is not there yet."]
        loader.go.release()
        await wait_until(pilot, lambda: idle(app))
        assert shown(app) == texts(app)


async def test_what_was_found_in_another_branch_is_shown(store: ChatStore):
    async with chatting("one", "two", "three", store=store, questions=2) as (pilot, app):
        screen = app.chat_screen
        number, found = screen.number, screen.chat.messages[2].id
        await on_turn(pilot, 0, "e")
        screen.composer.write("another")
        await pilot.press("enter")
        await wait_until(pilot, lambda: idle(app) and shown(app) == ["another", "three"])
        screen.open_chat(number, found)
        await wait_until(pilot, lambda: idle(app) and shown(app) == texts(app) == ["question 1", "one", "question 2", "two"])
        assert screen.transcript.selected == 2


async def test_a_question_sent_while_a_chat_is_still_taken_over_waits(store: ChatStore, monkeypatch: pytest.MonkeyPatch):
    chat = Chat(ScriptedModel("one"), store=store)
    chat.send("hello")
    go, load = threading.Event(), Chat.load
    loader = ScriptedLoader(ScriptedModel("two"), hold=True)
    app = make_app(loader=loader, store=store, opening={"chat": chat.number})

    def slowly(*args: Any, **options: Any) -> Chat:
        assert go.wait(10)
        return load(*args, **options)

    async with app.run_test(size=(100, 30)) as pilot:
        await wait_until(pilot, lambda: shown(app) == ["hello", "one"])
        monkeypatch.setattr(Chat, "load", slowly)
        loader.go.release()
        await wait_until(pilot, lambda: app.host.state.phase == "ready")
        await ask(pilot, "again")
        assert app.chat_screen.composer.text == "again"
        go.set()
        await wait_until(pilot, lambda: idle(app) and texts(app) == ["hello", "one", "again", "two"])


async def test_a_temporary_chat_goes_on_with_another_model():
    small, large = ScriptedModel("one"), ScriptedModel("two", name="7b")
    app = make_app(loader=ScriptedLoader(small, models={"7b": large}), opening={"temporary": True})
    async with running(app) as pilot:
        await wait_until(pilot, lambda: idle(app))
        await asked(pilot, "first")
        app.switch_model(app.wish("7b"))
        await wait_until(pilot, lambda: idle(app) and app.host.model is large)
        await asked(pilot, "second")
        assert shown(app) == ["first", "one", "second", "two"]
        assert app.store.summaries() == []


async def test_the_settings_of_a_chat_are_its_own(store: ChatStore):
    async with chatting("one", "two", store=store, questions=1) as (pilot, app):
        screen = app.chat_screen
        screen.change_chat(screen.chat_settings.__class__(temperature=0.5, max_tokens=9))
        await asked(pilot, "again")
        assert (app.scripted.options[1]["temperature"], app.scripted.options[1]["max_tokens"]) == (0.5, 9)
        first = screen.number
        assert store.options(first) == {"temperature": 0.5, "max_tokens": 9}
        await pilot.press("ctrl+n")
        await wait_until(pilot, lambda: idle(app) and screen.number is None)
        assert screen.chat_settings.temperature is None
        screen.open_chat(first)
        await wait_until(pilot, lambda: screen.number == first)
        assert screen.chat_settings.temperature == 0.5


async def test_settings_of_a_new_chat_are_kept_with_its_first_question(store: ChatStore):
    async with chatting("one", store=store) as (pilot, app):
        screen = app.chat_screen
        screen.change_chat(screen.chat_settings.__class__(system="Be brief.", temperature=0.5))
        await wait_until(pilot, lambda: idle(app))
        await ask(pilot, "hello")
        await wait_until(pilot, lambda: idle(app) and len(texts(app)) == 3)
        assert texts(app) == ["Be brief.", "hello", "one"]
        assert store.options(screen.number) == {"system": "Be brief.", "temperature": 0.5}


# Files


async def test_a_file_that_is_not_there_is_said_before_anything_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    async with chatting("one") as (pilot, app):
        await ask(pilot, "Sum up @reprot.txt")
        await wait_for_text(pilot, "There is no file reprot.txt. Enter again sends it as it is.")
        assert app.chat_screen.composer.text == "Sum up @reprot.txt" and not app.scripted.prompts
        await pilot.press("enter")
        await wait_until(pilot, lambda: idle(app) and texts(app) == ["Sum up @reprot.txt", "one"])


async def test_a_file_is_counted_while_one_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "notes.txt").write_text("five words are in here")
    monkeypatch.chdir(tmp_path)
    async with chatting("one") as (pilot, app):
        app.chat_screen.composer.write("Sum up @notes.txt")
        tokens = len(app.scripted.tokenizer.encode("five words are in here"))
        await wait_for_text(pilot, f"@notes.txt {tokens} tokens")


async def test_how_a_path_goes_on_is_said_until_more_is_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("report.txt", "reply.md"):
        (tmp_path / name).write_text("text")
    monkeypatch.chdir(tmp_path)
    async with chatting() as (pilot, app):
        await pilot.press(*"see @r", "tab")
        await wait_for_text(pilot, "reply.md  report.txt")
        counted = app.chat_screen.chat.count("see @rep")
        await wait_for_text(pilot, f" {counted:,} / 8,192")
        assert "reply.md  report.txt" in screen_text(app)
        await pilot.press("o", "tab")
        await wait_for_text(pilot, "@report.txt")
        await wait_until(pilot, lambda: "reply.md" not in screen_text(app))


async def test_an_edit_keeps_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "notes.txt").write_text("as it was")
    monkeypatch.chdir(tmp_path)
    async with chatting("one", "two") as (pilot, app):
        await asked(pilot, "Sum up @notes.txt")
        (tmp_path / "notes.txt").write_text("as it is now")
        await on_turn(pilot, 0, "e")
        assert app.chat_screen.composer.text == "Sum up @notes.txt"
        await pilot.press("!", "enter")
        await wait_until(pilot, lambda: idle(app) and texts(app)[-1] == "two")
        assert "as it was" in app.scripted.read and "as it is now" not in app.scripted.read
        assert shown(app)[0].endswith("Sum up @notes.txt!")


# Keys


async def test_tab_walks_from_the_message_to_the_conversation_and_the_chats():
    async with chatting("one", questions=1) as (pilot, app):
        seen = []
        for key in ("tab", "tab", "tab", "tab", "shift+tab"):
            await pilot.press(key)
            seen.append(app.focused.id)
        assert seen == ["transcript", "chats", "search", "composer", "search"]


async def test_escape_leads_back_to_the_message():
    async with chatting("one", questions=1) as (pilot, app):
        await pilot.press("tab", "escape")
        assert app.focused.id == "composer" and app.chat_screen.transcript.selected is None


async def test_what_is_offered_can_be_clicked():
    async with chatting(dies("one two", after=1)) as (pilot, app):
        await ask(pilot, "Count.")
        await wait_until(pilot, lambda: words(app))
        await pilot.click("#choice-1")
        await wait_until(pilot, lambda: idle(app))


async def test_a_draft_is_kept_as_it_is_typed(store: ChatStore):
    async with chatting("one", store=store, questions=1) as (pilot, app):
        await pilot.press(*"draft")
        await wait_until(pilot, lambda: store.draft(app.chat_screen.number) == "draft")
        await pilot.press("enter")
        await wait_until(pilot, lambda: idle(app) and store.draft(app.chat_screen.number) == "")


async def test_a_new_chat_instead_of_a_new_chat_costs_no_letter():
    async with chatting() as (pilot, app):
        await pilot.press(*"draft", "ctrl+n")
        await wait_until(pilot, lambda: idle(app))
        assert app.chat_screen.composer.text == "draft"


async def test_names_and_errors_cannot_reach_the_terminals_controls():
    async with chatting(dies("evil \x1b]52;c;AAAA\x07 text", after=3, words="Gone \x1b[2J away."), questions=0) as (pilot, app):
        await ask(pilot, "Well \x1b[31m?")
        await wait_until(pilot, lambda: words(app))
        await pilot.pause()
        strips = app.screen._compositor.render_strips()
        assert not any("\x1b" in segment.text or "\x07" in segment.text for strip in strips for segment in strip)


async def test_one_can_quit_while_something_is_counted(monkeypatch: pytest.MonkeyPatch):
    go = threading.Event()
    async with chatting("one", questions=1) as (pilot, app):
        counting = threading.Event()
        count = Chat.count

        def slowly(self: Chat, text: str = "") -> int:
            counting.set()
            assert go.wait(10)
            return count(self, text)

        monkeypatch.setattr(Chat, "count", slowly)
        await pilot.press("a")
        await wait_until(pilot, counting.is_set)
        await pilot.press("ctrl+q")
        await wait_until(pilot, lambda: not app.is_running)
        go.set()
    assert app.return_code == 0


# What cannot be saved


async def test_what_is_not_saved_goes_on_with_another_model(store: ChatStore):
    loader = ScriptedLoader(models={"guide": ScriptedModel("one", "two"), "other": ScriptedModel("three", name="other")})
    async with chatting(loader=loader, store=store, questions=1) as (pilot, app):
        app.action_new()
        await wait_until(pilot, lambda: idle(app) and not texts(app))
        store.read_only = "The disk is full."
        await asked(pilot, "Kept?")
        app.switch_model(LoadWish("other"))
        await wait_until(pilot, lambda: idle(app))
        assert texts(app) == ["Kept?", "two"]
        assert app.chat_screen.number is None, "it is not the first chat, whose number it might get elsewhere"
        store.read_only = ""
        await asked(pilot, "And now?")
        assert app.chat_screen.number == 2
        assert [one.text for one in store.record(2).messages] == ["Kept?", "two", "And now?", "three"]


@pytest.mark.parametrize("begun", [True, False])
async def test_what_is_not_saved_is_kept_until_it_can_be(store: ChatStore, begun: bool):
    async with chatting("one", "two", store=store, questions=1) as (pilot, app):
        if not begun:
            app.action_new()
            await wait_until(pilot, lambda: idle(app) and not texts(app))
        store.read_only = "The disk is full."
        await asked(pilot, "Kept?")
        app.action_new()
        await wait_until(pilot, lambda: idle(app) and not texts(app))
        if begun:
            app.chat_screen.open_chat(1)
            await wait_until(pilot, lambda: texts(app) == ["question 1", "one", "Kept?", "two"])
        store.read_only = ""
    with ChatStore.open(paths.home() / "chats.db") as read:
        assert [one.text for chat in (1, 2)[: 2 - begun] for one in read.record(chat).messages] == ["question 1", "one", "Kept?", "two"]


async def test_walking_the_branches_waits_for_no_disk(store: ChatStore):
    async with chatting("one", "two", questions=1) as (pilot, app):
        await on_turn(pilot, -1, "r")
        await wait_until(pilot, lambda: idle(app) and texts(app)[-1] == "two")
        other = sqlite3.connect(paths.home() / "chats.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")  # another app writes
        await on_turn(pilot, -1, "left")
        assert shown(app)[-1] == "one"
        other.execute("ROLLBACK")
        other.close()
        await wait_until(pilot, lambda: store.record(1).tip == app.chat_screen.chat.messages[-1].id)


# What was written is not lost


def refusing(app: Any, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Until this is set, the next question is looked at; then it is refused."""
    go = threading.Event()

    def stream(text: str, **_: Any) -> None:
        go.wait(5)
        raise UsageError("This cannot be asked.")

    monkeypatch.setattr(app.chat_screen.chat, "stream", stream)
    return go


async def test_what_was_refused_comes_back_before_what_is_being_written(monkeypatch: pytest.MonkeyPatch):
    async with chatting("one", questions=1) as (pilot, app):
        go = refusing(app, monkeypatch)
        await ask(pilot, "A long question.")
        await pilot.press("m", "o", "r", "e")
        go.set()
        await wait_until(pilot, lambda: idle(app))
        assert app.chat_screen.composer.text == "A long question.\nmore"


async def test_what_was_refused_behind_another_chat_is_its_draft(store: ChatStore, monkeypatch: pytest.MonkeyPatch):
    async with chatting("one", questions=1) as (pilot, app):
        go = refusing(app, monkeypatch)
        await ask(pilot, "A long question.")
        await pilot.press("ctrl+n")
        await wait_until(pilot, lambda: app.chat_screen.number is None)
        go.set()
        await wait_until(pilot, lambda: store.draft(1) == "A long question.")


async def test_a_refused_edit_of_a_reply_can_be_sent_again():
    async with chatting("one", Say(refuse=BackendError("It failed.")), " and more", questions=1) as (pilot, app):
        await on_turn(pilot, -1, "e")
        app.chat_screen.composer.write("Two")
        await pilot.press("enter")
        await wait_until(pilot, lambda: idle(app) and app.chat_screen.composer.text == "Two")
        await pilot.press("enter")
        await wait_until(pilot, lambda: idle(app) and texts(app)[-1] == "Two and more")


async def test_what_is_typed_before_the_last_draft_was_read_comes_behind_it(store: ChatStore, monkeypatch: pytest.MonkeyPatch):
    store.keep_draft(None, "an old draft, ")
    go, questions = threading.Event(), ChatStore.questions
    monkeypatch.setattr(ChatStore, "questions", lambda self: go.wait(5) and questions(self))
    async with chatting() as (pilot, app):
        await pilot.press("a", "b")
        app.chat_screen.writing.keep_draft()
        go.set()
        await wait_until(pilot, lambda: app.chat_screen.composer.text == "an old draft, ab")
    assert store.draft(None) == "an old draft, ab"


async def test_beginning_with_another_chat_costs_no_draft(store: ChatStore):
    number, _ = store.insert(ChatRecord("One", False, False, 1, 1, 1, (ChatMessage("user", "one", id=1),)))
    store.keep_draft(None, "for a new chat")
    async with chatting(store=store, opening={"chat": number}) as (pilot, app):
        await wait_until(pilot, lambda: app.chat_screen.number == number)
        assert app.chat_screen.composer.text == ""
        await pilot.press("ctrl+n")
        await wait_until(pilot, lambda: app.chat_screen.composer.text == "for a new chat")


async def test_a_question_that_was_picked_leaves_the_draft():
    async with chatting("one") as (pilot, app):
        app.chat_screen.composer.insert("half a thought")
        app.chat_screen.ask("What can you do?")
        await wait_until(pilot, lambda: idle(app) and texts(app) == ["What can you do?", "one"])
        assert app.chat_screen.composer.text == "half a thought"

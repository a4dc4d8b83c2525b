"""What is done with saved chats: titles, pins, deletion that can be undone and then is for good, files."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2_local import kvcache, paths
from qwen2_local.chats import ChatMessage, ChatRecord, ChatStore, deletion, exchange
from qwen2_local.errors import UnknownChat, UsageError, WorkerDied
from qwen2_local.sanitize import clean_line
from qwen2_tui import arrange
from qwen2_tui.library import Library, destination_problem
from qwen2_tui.settings import ChatSettings, Settings
from qwen2_tui.titles import Proposal, asked_for, can_propose, cleaned
from qwen2_tui.widgets.dialogs import Ask, Confirm, Line
from tests.tui.pilot import ask, make_app, running, wait_for_text, wait_until
from tests.tui.scripted import Say, ScriptedModel


def chat(question: str = "Which rivers cross Laos?", reply: str = "The Mekong.", *, title: str = "") -> ChatRecord:
    now = time.time()
    messages = (ChatMessage("user", question, 1, None, created=now), ChatMessage("assistant", reply, 2, 1, created=now, model="7b"))
    return ChatRecord(title or question, bool(title), False, now, now, 2, messages)


@pytest.fixture
def store(own_home: Path) -> Iterator[ChatStore]:
    with ChatStore.open(own_home / "chats.db") as store:
        yield store


def titles(store: ChatStore) -> list[str]:
    return [one.title for one in store.summaries()]


# Deleting


def test_what_is_deleted_is_out_of_sight_and_comes_back_in_order(store: ChatStore) -> None:
    library = Library(store)
    first, second, _ = store.insert_all([chat("one"), chat("two"), chat("three")])
    library.delete(first)
    library.delete(second)
    assert titles(store) == ["three"] and store.search("one") == []
    assert [library.undo(), library.undo(), library.undo()] == [second, first, None]
    assert sorted(titles(store)) == ["one", "three", "two"]


def test_at_the_end_it_is_gone_for_good_with_its_kv(store: ChatStore) -> None:
    model = ScriptedModel()
    library = Library(store, lambda: model)  # type: ignore[arg-type]
    gone, kept = store.insert_all([chat("a secret of mine"), chat("else")])
    store.keep_chunks(gone, ["only-here", "shared"])
    store.keep_chunks(kept, ["shared"])
    library.delete(gone)
    library.close()
    assert model.forgotten == ["only-here"]
    with pytest.raises(UnknownChat):
        store.record(gone)
    assert b"secret" not in b"".join(path.read_bytes() for path in paths.home().glob("chats.db*"))


def test_at_the_start_goes_what_a_killed_app_left_long_ago(store: ChatStore, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = store.insert_all([chat("old"), chat("new")])
    store.trash([old])
    later = time.time() + 601
    monkeypatch.setattr(time, "time", lambda: later)
    store.trash([new])
    Library(store).sweep()
    assert store.trashed() == [new]


def test_what_another_process_has_emptied_cannot_come_back(store: ChatStore) -> None:
    library = Library(store)
    (one,) = store.insert_all([chat()])
    library.delete(one)
    deletion.purge(store, disk=kvcache.Disk(paths.kv()), chats=[one])
    assert library.undo() is None
    library.close()


# Files


def test_a_chat_is_written_as_its_files_ending_says(store: ChatStore, tmp_path: Path) -> None:
    library = Library(store)
    (one,) = store.insert_all([chat("Wo liegt Vientiane?", "Am Mekong.")])
    library.export(one, tmp_path / "a.md")
    library.export(one, tmp_path / "a.JSON")
    assert (tmp_path / "a.md").read_text() == "# Wo liegt Vientiane?\n\n## user\n\nWo liegt Vientiane?\n\n## assistant\n\nAm Mekong.\n"
    (again,) = exchange.read((tmp_path / "a.JSON").read_bytes(), "a.json")
    assert again == store.record(one)
    assert (tmp_path / "a.md").stat().st_mode & 0o777 == 0o600


def test_no_file_is_overwritten_unasked(store: ChatStore, tmp_path: Path) -> None:
    library = Library(store)
    (one,) = store.insert_all([chat()])
    (tmp_path / "a.md").write_text("mine")
    with pytest.raises(UsageError):
        library.export(one, tmp_path / "a.md")
    assert (tmp_path / "a.md").read_text() == "mine"
    library.export(one, tmp_path / "a.md", overwrite=True)
    assert (tmp_path / "a.md").read_text().startswith("# Which")


def test_a_file_is_named_like_the_chat(store: ChatStore, tmp_path: Path) -> None:
    library = Library(store)
    rivers, odd, chinese = store.insert_all([chat("Which rivers/cross: Laos?"), chat("../../.."), chat("老挝有哪些河流？")])
    assert library.suggestion(rivers, tmp_path).name == "Which-rivers-cross-Laos.md"
    (tmp_path / "Which-rivers-cross-Laos.md").touch()
    assert library.suggestion(rivers, tmp_path).name == "Which-rivers-cross-Laos-2.md"
    assert library.suggestion(odd, tmp_path).name == f"chat-{odd}.md"
    assert library.suggestion(chinese, tmp_path).name == "老挝有哪些河流.md"


@pytest.mark.parametrize(
    ("typed", "problem"),
    [
        ("", "Say where"), ("{}/a.txt", "End the name in .md"), ("{}/no/a.md", "There is no folder"), ("{}/x.md", "is a folder"), ("{}/a.md", ""),
        ("{}/" + "a" * 300 + ".md", "no name of a file"), ("a\0.md", "no name of a file"), ("~/a.json", ""),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_path_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: str, problem: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.md").mkdir()
    said = destination_problem(typed.format(tmp_path))
    assert problem in said and bool(problem) == bool(said)


# Titles


@pytest.mark.parametrize(
    ("written", "title"),
    [
        ("Rivers of Laos", "Rivers of Laos"),
        ('  "Rivers of Laos."\n\nI chose this because', "Rivers of Laos"),
        ("**Title:** Rivers of Laos", "Rivers of Laos"),
        ("标题：老挝的河流。", "老挝的河流"),
        ("《老挝的河流》", "老挝的河流"),
        ("# Flüsse in Laos #", "Flüsse in Laos"),
        ("\n\n...\n", ""),
        ("", ""),
        ("C++ and C#", "C++ and C#"),
        ("**Sorting in C (basics)**", "Sorting in C (basics)"),
        ("„Flüsse“ und «Seen»!", "„Flüsse“ und «Seen»"),
        ("\x1b[31mred\x1b[0m", "[31mred[0m"),
        ("word " * 40, "word " * 11 + "word…"),
    ],
)
def test_what_a_model_writes_becomes_a_title(written: str, title: str) -> None:
    assert cleaned(written) == title


@given(st.text())
def test_a_title_is_one_short_clean_line(written: str) -> None:
    title = cleaned(written)
    assert len(title) <= 60 and title == title.strip() and title == clean_line(title)


def test_the_title_is_asked_for_in_the_language_of_the_chat() -> None:
    assert "in its own language" in asked_for(chat().messages)
    assert "标题" in asked_for(chat("老挝有哪些河流？", "湄公河。").messages)
    assert "in its own language" in asked_for(chat("ラオスの川は？", "メコン川です。").messages)
    assert asked_for(()) == ""


def test_files_of_a_question_and_the_rest_of_a_long_reply_are_left_out() -> None:
    from qwen2_local.chats.attached import Attached, joined

    question = joined("What is in it?", [Attached("a.txt", "x" * 5000)])
    assert len(asked_for(chat(question, "y" * 5000).messages)) < 1200


@pytest.mark.parametrize(("name", "can"), [("guide", False), ("guide:q4_0", False), ("7b-base", False), ("7b:q4_k_m", True), ("/a/model.gguf", True)])
def test_neither_the_guide_nor_a_base_model_is_asked(name: str, can: bool) -> None:
    assert can_propose(ScriptedModel(name=name)) is can  # type: ignore[arg-type]


def test_a_proposal_leaves_nothing_and_can_be_cancelled() -> None:
    model: Any = ScriptedModel("Rivers of Laos", Say("another one", hold=1), name="7b")
    assert Proposal(model, chat().messages).read() == "Rivers of Laos"
    assert model.options[0]["persist"] is False
    late = Proposal(model, chat().messages)
    late.cancel()
    assert late.read() == "" and len(model.prompts) == 1


# With a person


async def opened(app: Any, pilot: Any, kind: type) -> Any:
    await wait_until(pilot, lambda: isinstance(app.screen, kind) and app.screen.is_mounted)
    return app.screen


def told(app: Any) -> list[str]:
    """What the app has said beside everything else."""
    return [str(one.message) for one in app._notifications]


async def test_renaming_shows_what_the_model_proposes_beside_what_is_typed(store: ChatStore) -> None:
    (one,) = store.insert_all([chat()])
    app = make_app(model=ScriptedModel('"Rivers of Laos"', name="7b"), store=store)
    async with running(app) as pilot:
        app.run_worker(arrange.rename(app, one))
        asked = await opened(app, pilot, Ask)
        await wait_for_text(pilot, "Rivers of Laos  · tab takes it")
        assert asked.query_one(Line).value == "Which rivers cross Laos?"
        await pilot.press("tab", "enter")
        await wait_until(pilot, lambda: titles(store) == ["Rivers of Laos"])


async def test_a_proposal_that_comes_late_or_fails_changes_nothing(store: ChatStore) -> None:
    (one,) = store.insert_all([chat()])
    model = ScriptedModel(Say("Rivers of Laos", hold=0), Say("x", error=WorkerDied("It died.")), name="7b")
    app = make_app(model=model, store=store)
    async with running(app) as pilot:
        app.run_worker(arrange.rename(app, one))
        await opened(app, pilot, Ask)
        await wait_until(pilot, lambda: model.prompts)
        await pilot.press("home", *"My ", "enter")  # while the model still writes
        await wait_until(pilot, lambda: titles(store) == ["My Which rivers cross Laos?"])
        assert not isinstance(app.screen, Ask)
        app.run_worker(arrange.rename(app, one))
        await opened(app, pilot, Ask)
        await wait_until(pilot, lambda: len(model.prompts) == 2)
        await pilot.press("escape")
        await wait_until(pilot, lambda: not isinstance(app.screen, Ask))
        assert titles(store) == ["My Which rivers cross Laos?"]


async def test_the_guide_is_not_asked_for_a_title(store: ChatStore) -> None:
    (one,) = store.insert_all([chat()])
    app = make_app(store=store)
    async with running(app) as pilot:
        app.run_worker(arrange.rename(app, one))
        await opened(app, pilot, Ask)
        await pilot.press("ctrl+u", "enter")
        await wait_until(pilot, lambda: not isinstance(app.screen, Ask))
        assert app.scripted.prompts == []
        assert titles(store) == ["Which rivers cross Laos?"]


async def test_deleting_and_undoing_by_key_and_gone_for_good_at_the_end(store: ChatStore, own_home: Path) -> None:
    one, two = store.insert_all([chat("one"), chat("two")])
    app = make_app(store=store)
    async with running(app) as pilot:
        app.run_worker(arrange.delete(app, one))
        await wait_until(pilot, lambda: told(app))
        assert told(app) == ['Deleted "one". ctrl+z brings it back, until the app ends.']
        app.action_undo()
        await wait_until(pilot, lambda: len(store.summaries()) == 2)
        app.run_worker(arrange.delete(app, two))
        await wait_until(pilot, lambda: store.trashed() == [two])
    with ChatStore.open(own_home / "chats.db") as after:
        assert titles(after) == ["one"] and after.trashed() == []
        with pytest.raises(UnknownChat):
            after.record(two)


async def test_exporting_asks_where_and_before_it_replaces_a_file(store: ChatStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (one,) = store.insert_all([chat(title="Rivers")])
    (tmp_path / "taken.json").write_text("mine")
    app = make_app(store=store)
    async with running(app) as pilot:
        app.run_worker(arrange.export(app, one))
        asked = await opened(app, pilot, Ask)
        assert asked.query_one(Line).value == str(tmp_path / "Rivers.md")
        asked.query_one(Line).value = str(tmp_path / "taken.json")
        await pilot.press("enter")
        await opened(app, pilot, Confirm)
        await pilot.press("enter")  # no
        await wait_until(pilot, lambda: not isinstance(app.screen, Confirm))
        assert (tmp_path / "taken.json").read_text() == "mine"
        app.run_worker(arrange.export(app, one))
        asked = await opened(app, pilot, Ask)
        asked.query_one(Line).value = str(tmp_path / "taken.json")
        await pilot.press("enter")
        await opened(app, pilot, Confirm)
        await pilot.press("y")
        await wait_until(pilot, lambda: told(app))
        assert json.loads((tmp_path / "taken.json").read_text())["title"] == "Rivers"


async def test_the_palette_has_what_is_done_with_the_open_chat(store: ChatStore) -> None:
    (one,) = store.insert_all([chat()])
    app = make_app(store=store, opening={"chat": one})
    app.settings_file.write(Settings(presets={"cold": ChatSettings(temperature=0.0)}))
    app = make_app(store=store, opening={"chat": one})
    async with running(app) as pilot:
        await wait_until(pilot, lambda: app.chat_screen.number == one)
        commands = {command.title: command.callback for command in arrange.commands(app)}
        commands["Preset: cold"]()
        await wait_until(pilot, lambda: store.options(one) == {"temperature": 0.0})
        commands["Pin this chat, or no longer"]()
        await wait_until(pilot, lambda: store.summary(one).pinned)
        commands["Delete this chat"]()
        await wait_until(pilot, lambda: store.trashed() == [one] and app.chat_screen.number is None)
        assert [command.title for command in arrange.commands(app)] == ["Preset: cold"]


async def test_a_temporary_chat_can_be_exported_and_leaves_nothing_else(store: ChatStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    app = make_app("The Mekong.", store=store, opening={"temporary": True})
    async with running(app) as pilot:
        await wait_until(pilot, lambda: app.chat_screen.temporary)
        await ask(pilot, "A secret river?")
        await wait_until(pilot, lambda: app.scripted.options and not app.chat_screen.busy)
        assert app.scripted.options[0]["persist"] is False
        await wait_for_text(pilot, "temporary chat: not saved")
        (command,) = arrange.commands(app)
        command.callback()
        await opened(app, pilot, Ask)
        await pilot.press("enter")
        await wait_until(pilot, lambda: (tmp_path / "A-secret-river.md").exists())
        assert titles(store) == []
    assert b"secret" not in b"".join(path.read_bytes() for path in paths.home().glob("chats.db*"))


async def test_what_goes_wrong_is_said(store: ChatStore) -> None:
    app = make_app(store=store)
    async with running(app) as pilot:
        app.run_worker(arrange.pin(app, 99))
        await wait_until(pilot, lambda: told(app))
        assert told(app)[0].startswith("There is no chat 99.")

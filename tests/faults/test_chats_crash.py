"""kill -9 at every write of the chats' database: what was kept is intact, the last reply is there as far as it came, and marked."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

import pytest

from qwen2_local import chat as chat_module
from qwen2_local.chat import Chat
from qwen2_local.chats import ChatMessage, ChatStore, deletion, schema
from qwen2_local.kvcache import Disk
from tests.support import sqlite_faults
from tests.support.scripted_chat import ScriptedModel

pytestmark = pytest.mark.skipif(not sqlite_faults.AVAILABLE, reason="this SQLite's system calls cannot be watched")

EXPECTED = ["hello", "abc", "more", "def", "secretword", "ghi"]


@pytest.fixture(autouse=True)
def always_save(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_module, "_SAVE_EVERY_S", 0.0)


def talk(folder: Path) -> None:
    """Three turns and an edit in one chat, a second chat with a draft that goes through the trash; what is done is written down in `progress`."""
    progress = os.open(folder / "progress", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    with ChatStore.open(folder / "chats.db") as store:
        model = ScriptedModel("abc", "def", "ghi", "secretreply", "jkl")
        chat = Chat(model, store=store)
        model.before = lambda number: os.write(progress, b"p") and None
        for text in ("hello", "more", "secretword"):
            chat.send(text)
            os.write(progress, b"T")
        other = Chat(model, store=store)
        other.send("secretword")
        assert other.number is not None
        store.keep_draft(None, "secretdraft")
        store.keep_draft(None, "")
        store.keep_draft(other.number, "secretdraft")
        store.keep_options(other.number, {"system": "secretoption"})
        store.trash([other.number])
        deletion.purge(store, disk=Disk(folder / "kv"), chats=[other.number])
        os.write(progress, b"D")
        chat.edit(0, "edited")
        os.write(progress, b"E")


def check(folder: Path) -> None:
    done = (folder / "progress").read_bytes().decode() if (folder / "progress").exists() else ""
    with ChatStore.open(folder / "chats.db") as store:
        assert store.notes == ()
        with sqlite3.connect(folder / "chats.db") as db:
            assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            assert db.execute("PRAGMA foreign_key_check").fetchall() == []
            db.execute("INSERT INTO words(words) VALUES ('integrity-check')")
        db.close()
        chats = {one.id: one for one in store.summaries()}
        assert set(chats) <= {1, 2}
        if "D" in done:
            assert set(chats) == {1}
            assert store.trashed() == []
        if not chats:
            assert "p" not in done, "the question is kept before the model begins"
            return
        record = store.record(1)
        messages = record.messages
        for message, text in zip(messages, EXPECTED, strict=False):
            if message.state == "whole":
                assert message.text == text
            else:
                # After "p" the model went on to its next token, so those before are kept.
                assert text.startswith(message.text)
                assert message.finish_reason is None
        assert len(messages) >= 2 * done.count("T")
        assert all(message.state == "whole" for message in messages[: 2 * done.count("T")])
        turn = done.rpartition("T")[2]
        if "D" not in done and turn.count("p") > 1 and done.count("T") < 3:
            assert len(messages[2 * done.count("T") + 1].text) >= turn.count("p") - 1, "no token that came is lost"
        # And it goes on.
        chat = Chat.load(ScriptedModel("again"), 1, store)
        chat.send("next")
        assert store.search("again")
        store.keep_draft(None, "")
        store.delete([*chats, *store.trashed()], forget=lambda names: None)
    left = b"".join(file.read_bytes() for file in folder.iterdir() if file.name.startswith("chats.db"))
    assert b"secret" not in left


@pytest.mark.parametrize("torn", [False, True])
def test_killed_at_any_write(tmp_path: Path, torn: bool, request: pytest.FixtureRequest) -> None:
    (tmp_path / "whole").mkdir()
    total = sqlite_faults.counted(lambda: talk(tmp_path / "whole"))
    assert total > 100
    step = 1 if request.config.getoption("--every-write") else 23
    for point in range(5 if torn else 0, total, step):
        folder = tmp_path / str(point)
        folder.mkdir()
        sqlite_faults.killed(point, lambda folder=folder: talk(folder), torn=torn, errors=folder / "errors")
        check(folder)


def migrate(path: Path) -> None:
    with ChatStore.open(path) as store:
        store.create()


@pytest.mark.parametrize("torn", [False, True])
def test_killed_while_the_tables_become_newer_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torn: bool) -> None:
    def made(name: str) -> Path:
        (tmp_path / name).mkdir()
        with ChatStore.open(tmp_path / name / "chats.db") as store:
            store.add(store.create(), ChatMessage("user", "hello"))
        return tmp_path / name / "chats.db"

    paths = [made(str(number)) for number in range(21)]
    newer = (*schema.MIGRATIONS, "ALTER TABLE chats ADD COLUMN mood TEXT; UPDATE chats SET mood = 'fine'")
    monkeypatch.setattr(schema, "MIGRATIONS", newer)
    total = sqlite_faults.counted(lambda: migrate(paths[0]))
    assert total > 20
    for path, point in zip(paths[1:], range(int(torn), total, total // 20 + 1), strict=False):
        sqlite_faults.killed(point, lambda path=path: migrate(path), torn=torn, errors=path.with_name("errors"))
        with ChatStore.open(path) as store:
            assert store.notes == ()
            assert store.record(1).messages[0].text == "hello"
        with sqlite3.connect(path) as db:
            assert db.execute("SELECT mood FROM chats WHERE id = 1").fetchone() == ("fine",)
        db.close()


@pytest.mark.parametrize("ever_after", [False, True])
def test_a_full_disk_at_any_write(tmp_path: Path, ever_after: bool) -> None:
    (tmp_path / "whole").mkdir()

    def work(store: ChatStore) -> Chat:
        chat = Chat(ScriptedModel("abc", "def"), store=store)
        chat.send("hello")
        chat.send("more")
        return chat

    with ChatStore.open(tmp_path / "whole" / "chats.db") as store:
        total = sqlite_faults.counted(lambda: work(store))
    for point in range(0, total, 11):
        (tmp_path / str(point)).mkdir()
        with ChatStore.open(tmp_path / str(point) / "chats.db") as store:
            with sqlite_faults.full_disk(point, ever_after=ever_after):
                chat = work(store)
                if ever_after:
                    assert "full" in chat.unsaved
            assert [one.text for one in chat.messages] == ["hello", "abc", "more", "def"], "a full disk costs no reply"
            chat.send("last")
            assert (chat.unsaved, chat.number) == ("", 1)
            assert [one.text for one in Chat.load(ScriptedModel(), 1, store).messages] == ["hello", "abc", "more", "def", "last", "ok"]
            assert len(store.summaries()) == 1

"""Damaged, newer, foreign and unwritable databases of chats, and several processes at once."""

from __future__ import annotations

import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from qwen2_local.chat import Chat
from qwen2_local.chats import ChatMessage, ChatStore, schema
from qwen2_local.errors import BadFile, Qwen2LocalError, UsageError
from tests.support.program import run
from tests.support.scripted_chat import ScriptedModel

ROOT = Path(__file__).parents[2]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "chats.db"


def fill(path: Path, chats: int = 1, text: str = "hello") -> None:
    with ChatStore.open(path) as store:
        for number in range(chats):
            store.add(store.create(), ChatMessage("user", f"{text} {number}"))


def works(store: ChatStore) -> None:
    chat = Chat(ScriptedModel("a reply"), store=store)
    chat.send("a question")
    assert chat.unsaved == ""
    assert [hit.chat.id for hit in store.search("reply")] == [chat.number]


# Damage


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b"This is no database at all, but some text. " * 100),
        lambda path: path.write_bytes(os.urandom(20_000)),
        lambda path: os.truncate(path, 5000),
        lambda path: os.truncate(path, 50),
        lambda path: path.write_bytes(path.read_bytes()[:100] + bytes(len(path.read_bytes()) - 100)),
    ],
)
def test_a_damaged_file_is_kept_aside_and_the_chats_begin_anew(path: Path, damage: Callable[[Path], object]) -> None:
    fill(path, 30)
    damage(path)
    damaged = path.read_bytes()
    with ChatStore.open(path) as store:
        (note,) = store.notes
        (aside,) = path.parent.glob("chats.db.damaged-*")
        assert "damaged" in note
        assert aside.name in note
        assert aside.read_bytes() == damaged
        assert store.summaries() == []
        works(store)
    with ChatStore.open(path) as store:
        assert store.notes == ()


def test_another_programs_database_is_kept_aside(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE recipes(name)")
    db.close()
    with ChatStore.open(path) as store:
        assert "something else" in store.notes[0]
        works(store)
    (aside,) = path.parent.glob("chats.db.damaged-*")
    with sqlite3.connect(aside) as db:
        assert db.execute("SELECT count(*) FROM recipes").fetchone() == (0,)
    db.close()


def test_an_empty_file_becomes_a_database(path: Path) -> None:
    path.touch()
    with ChatStore.open(path) as store:
        assert store.notes == ()
        works(store)
    assert path.stat().st_mode & 0o777 == 0o600


def test_random_damage_is_an_error_or_survived_and_gone_at_the_next_start(tmp_path: Path) -> None:
    fill(tmp_path / "sound.db", 200, "some words that fill pages " * 20)
    sound = (tmp_path / "sound.db").read_bytes()
    chance = random.Random(5)
    begun_anew = 0
    for number in range(25):
        path = tmp_path / str(number) / "chats.db"
        path.parent.mkdir()
        damaged = bytearray(sound)
        for _ in range(chance.choice([1, 3, 20])):
            place = chance.randrange(len(sound) - 600)
            damaged[place : place + 500] = chance.randbytes(500)
        path.write_bytes(damaged)
        with ChatStore.open(path) as store:
            for use in (works, lambda store: [store.record(one.id) for one in store.summaries()], lambda store: store.search("words pages")):
                with suppress(Qwen2LocalError, AssertionError):  # or something is missing
                    use(store)
        if not path.with_name("chats.db.suspect").exists():
            continue  # the damage lies where it does no harm, in text say
        with ChatStore.open(path) as store:
            begun_anew += bool(store.notes)
            works(store)
        assert not path.with_name("chats.db.suspect").exists()
    assert begun_anew >= 5


def test_a_damaged_search_index_alone_costs_no_chat(path: Path) -> None:
    fill(path, 3)
    with sqlite3.connect(path) as db:
        db.execute("UPDATE words_data SET block = x'00112233' WHERE id > 10")
    db.close()
    with ChatStore.open(path) as store, pytest.raises(BadFile, match="damaged"):
        store.search("hello")
    with ChatStore.open(path) as store:
        assert store.notes == ()
        assert len(store.search("hello")) == 3


def test_the_command_line_says_what_became_of_it(tmp_path: Path) -> None:
    (tmp_path / "chats.db").write_text("garbage " * 1000)
    done = run("chats", env={"QWEN2_LOCAL_HOME": tmp_path})
    assert done.returncode == 0
    assert "damaged" in done.stderr
    assert done.stderr.count("note: ") == 1
    assert run("chats", env={"QWEN2_LOCAL_HOME": tmp_path}).stderr == "There are no chats yet. `qwen2-local chat` begins one.\n"


# Versions


def test_an_older_database_is_migrated_after_a_backup(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(path)
    monkeypatch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, "ALTER TABLE chats ADD COLUMN mood TEXT"))
    with ChatStore.open(path) as store:
        assert store.notes == ()
        works(store)
        backup = path.with_name(f"chats.db.before-{len(schema.MIGRATIONS)}")
        assert backup.stat().st_mode & 0o777 == 0o600
        with sqlite3.connect(backup) as db:
            assert db.execute("PRAGMA user_version").fetchone() == (len(schema.MIGRATIONS) - 1,)
            assert db.execute("SELECT text FROM messages").fetchall() == [("hello 0",)]
        db.close()
        store.delete([1], forget=lambda names: None)
        assert not backup.exists(), "it held the deleted text"


@pytest.fixture
def first_version(path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A database as the first version of the program has left it."""
    with monkeypatch.context() as patch:
        patch.setattr(schema, "MIGRATIONS", schema.MIGRATIONS[:1])
        with ChatStore.open(path) as store, store._writing() as db:
            db.execute("INSERT INTO chats(title, named, pinned, created, used, messages, tip) VALUES ('hello', 0, 0, 1, 2, 1, 1)")
            db.execute("INSERT INTO messages(chat, role, text, state, created, indexed, left_out) VALUES (1, 'user', 'hello', 'whole', 1, 0, 0)")
    return path


def test_chats_of_the_first_version_get_drafts_options_and_a_trash(first_version: Path) -> None:
    with ChatStore.open(first_version) as store:
        assert (store.draft(1), store.options(1), store.trashed(), store.last_broken()) == ("", {}, [], 1)
        assert [hit.chat.id for hit in store.search("hello")] == [1]
        store.keep_draft(1, "more")
        works(store)
        store.trash([1])
        assert store.trashed() == [1]


def test_chats_of_the_first_version_are_read_where_nothing_can_be_written(first_version: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen2_local.paths.writable", lambda folder: False)
    before = first_version.read_bytes()
    with ChatStore.open(first_version) as store:
        assert "cannot be written" in store.read_only
        assert [one.title for one in store.summaries()] == ["hello"]
        assert store.questions() == ["hello"]
        assert not store.kept
    assert first_version.read_bytes() == before


def test_the_first_version_reads_what_this_one_has_written(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(path, 2)
    monkeypatch.setattr(schema, "MIGRATIONS", schema.MIGRATIONS[:1])
    with ChatStore.open(path) as store:
        assert "newer" in store.read_only
        # Its own words, as its program has them.
        listed = "SELECT id, title, named, pinned, created, used, model, messages FROM chats ORDER BY pinned DESC, used DESC"
        assert len(store._connection.execute(listed).fetchall()) == 2
        assert store._connection.execute("SELECT count(*) FROM words WHERE words MATCH 'hello'").fetchone() == (2,)


def test_a_migration_that_fails_changes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(path, 2)
    with monkeypatch.context() as patch:
        patch.setattr(
            schema, "MIGRATIONS", (*schema.MIGRATIONS, "ALTER TABLE chats ADD COLUMN mood TEXT", "CREATE UNIQUE INDEX one ON chats(pinned)")
        )
        with pytest.raises(Qwen2LocalError):
            ChatStore.open(path)
        with ChatStore.open_or_temporary(path) as store:
            assert "not saved" in store.notes[0]
            assert not store.kept
            works(store)
    with ChatStore.open(path) as store:
        works(store)
        assert len(store.summaries()) == 3


def test_a_newer_database_is_read_only_with_one_warning(path: Path) -> None:
    fill(path)
    with sqlite3.connect(path) as db:
        db.execute("ALTER TABLE chats ADD COLUMN mood TEXT")
        db.execute("PRAGMA user_version = 99")
    db.close()
    with ChatStore.open(path) as store:
        assert len(store.notes) == 1
        assert "newer" in store.notes[0]
        assert [hit.chat.id for hit in store.search("hello")] == [1]
        for write in (store.create, lambda: store.rename(1, "x"), lambda: store.delete([1], forget=lambda names: None)):
            with pytest.raises(UsageError, match="newer"):
                write()
        chat = Chat.load(ScriptedModel(), 1, store)
        chat.send("goes on")
        assert "newer" in chat.unsaved
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT count(*) FROM messages").fetchone() == (1,)
    db.close()
    assert list(path.parent.glob("*damaged*")) == []


# Homes


def can_mount() -> bool:
    if os.geteuid() != 0 or not shutil.which("unshare"):
        return False
    return subprocess.run(["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, check=False).returncode == 0


needs_mounts = pytest.mark.skipif(not can_mount(), reason="only root can mount file systems for a test")

USE = """
import json, sys
from pathlib import Path
from qwen2_local.chat import Chat
from qwen2_local.chats import ChatStore
from tests.support.scripted_chat import ScriptedModel
with ChatStore.open_or_temporary(Path(sys.argv[1]) / "chats.db") as store:
    before = [one.title for one in store.summaries()]
    chat = Chat(ScriptedModel("reply"), store=store)
    chat.send("question " + "x" * 3000)
    told = {"notes": store.notes, "before": before, "unsaved": chat.unsaved, "kept": store.kept}
    print(json.dumps({**told, "texts": [one.text[:8] for one in chat.messages]}))
"""


def use(home: Path, first: str) -> dict:
    line = ["unshare", "--mount", "sh", "-ec", f'{first}; exec "$@"', "sh", sys.executable, "-c", USE, str(home)]
    done = subprocess.run(line, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["texts"] == ["question", "reply"], "the conversation goes on in any case"
    return told


@needs_mounts
@pytest.mark.parametrize("open_elsewhere", [False, True])
def test_a_home_that_has_become_read_only(tmp_path: Path, open_elsewhere: bool) -> None:
    path = tmp_path / "home" / "chats.db"
    path.parent.mkdir()
    fill(path)
    other = ChatStore.open(path) if open_elsewhere else None
    if other:
        other.add(other.create(), ChatMessage("user", "hello again"))
    told = use(path.parent, f"mount --bind '{path.parent}' '{path.parent}'; mount -o remount,ro,bind '{path.parent}'")
    assert told["before"] == (["hello again", "hello 0"] if open_elsewhere else ["hello 0"])
    assert len(told["notes"]) == 1
    assert "cannot be written" in told["unsaved"]
    if other:
        other.close()


@needs_mounts
def test_a_read_only_home_without_chats(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    told = use(tmp_path / "home", f"mount -t tmpfs -o ro tmpfs '{tmp_path}/home'")
    assert not told["kept"]
    assert len(told["notes"]) == 1
    assert "QWEN2_LOCAL_HOME" in told["notes"][0]


@needs_mounts
@pytest.mark.parametrize("size", [0, 8, 40, 64, 100])
def test_a_full_home(tmp_path: Path, size: int) -> None:
    (tmp_path / "home").mkdir()
    fill = f"mount -t tmpfs -o size=256k tmpfs '{tmp_path}/home'; head -c {(256 - size) * 1024} /dev/zero >'{tmp_path}/home/mine' 2>&- || true"
    told = use(tmp_path / "home", fill)
    said = " ".join([*told["notes"], told["unsaved"]])
    assert "full" in said
    assert len(told["notes"]) <= 1


def test_a_folder_in_its_place(path: Path) -> None:
    path.mkdir()
    with pytest.raises(UsageError, match=r"chats\.db"):
        ChatStore.open(path)
    with ChatStore.open_or_temporary(path) as store:
        assert len(store.notes) == 1
        works(store)


# Several processes


WORKER = """
import sys, time
from pathlib import Path
from qwen2_local.chat import Chat
from qwen2_local.chats import ChatStore
from tests.support.scripted_chat import ScriptedModel
path, name = Path(sys.argv[1]), sys.argv[2]
while not path.with_name("go").exists():
    time.sleep(0.001)
with ChatStore.open(path) as store:
    assert store.notes == (), store.notes
    shared = Chat(ScriptedModel(), store=store)
    for number in range(12):
        own = Chat(ScriptedModel(f"reply-{name}"), store=store)
        own.send(f"question-{name}-{number}")
        assert not own.unsaved, own.unsaved
        if number % 3 == 0:
            own.delete()
        assert {hit.chat.id for hit in store.search(f"question-{name}")} or number == 0
        shared.send(f"shared-{name}-{number}")
        assert not shared.unsaved, shared.unsaved
"""


def test_several_processes_at_once(path: Path) -> None:
    command = [sys.executable, "-c", WORKER, str(path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    workers = [subprocess.Popen([*command, name], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) for name in ("a", "b", "c")]
    path.with_name("go").touch()
    for worker in workers:
        _, told = worker.communicate(timeout=120)
        assert worker.returncode == 0, told
    with ChatStore.open(path) as store:
        summaries = store.summaries()
        assert len(summaries) == 3 * (8 + 1)
        assert sorted(one.messages for one in summaries) == [2] * 24 + [24] * 3
        with sqlite3.connect(path) as db:
            assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        db.close()


def test_a_database_held_by_another_for_too_long(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "_BUSY_S", 0.05)
    fill(path)
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with ChatStore.open(path) as store:
        with pytest.raises(UsageError, match="in use by another process"):
            store.rename(1, "x")
        chat = Chat.load(ScriptedModel(), 1, store)
        chat.send("goes on")
        assert "another process" in chat.unsaved
        holder.execute("ROLLBACK")
        chat.send("and is kept")
        assert chat.unsaved == ""
        assert len(store.record(1).messages) == 5
    holder.close()


def test_a_chat_that_another_process_deleted_is_not_brought_back(path: Path) -> None:
    with ChatStore.open(path) as store, ChatStore.open(path) as other:
        chat = Chat(ScriptedModel(), store=store)
        chat.send("x")
        other.delete([1], forget=lambda names: None)
        chat.send("goes on")
        assert "no chat 1" in chat.unsaved
        assert [one.text for one in chat.messages] == ["x", "ok", "goes on", "ok"]
        assert store.summaries() == []

"""`qwen2-local chats`: what it prints, writes, refuses and asks."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from qwen2_local import kvcache
from qwen2_local.backends.base import Chunk
from qwen2_local.chats import ChatMessage, ChatStore, deletion
from qwen2_local.cli.chats import chats
from qwen2_local.errors import BadFile, UnknownChat, UsageError

Call = Callable[..., Result]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QWEN2_LOCAL_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    with ChatStore.open() as store:
        for title, reply in (("Which rivers cross Laos?", "The Mekong."), ("什么是量化？", "把权重变小。")):
            number = store.create()
            asked = store.add(number, ChatMessage("user", title))
            store.add(number, ChatMessage("assistant", reply, parent=asked, model="7b", tokens=(1, 2), state="partial"))
    return tmp_path


@pytest.fixture
def call(folder: Path) -> Call:
    def call(*arguments: str, stdin: bytes | None = None) -> Result:
        done = CliRunner().invoke(chats, arguments, input=stdin)
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return done

    return call


def titles() -> list[str]:
    with ChatStore.open() as store:
        return [one.title for one in store.summaries()]


def test_listing(call: Call) -> None:
    assert [line.split()[0] for line in call().stdout.splitlines()] == ["ID", "2", "1"]
    assert call("list").stdout == call().stdout
    assert [one["title"] for one in json.loads(call("--json").stdout)] == ["什么是量化？", "Which rivers cross Laos?"]


def test_reading(call: Call) -> None:
    done = call("show", "1")
    assert done.stdout == "# Which rivers cross Laos?\n\n## user\n\nWhich rivers cross Laos?\n\n## assistant\n\nThe Mekong.\n"
    assert "broke off" in done.stderr
    assert json.loads(call("show", "1", "--json").stdout)["messages"][1]["tokens"] == [1, 2]
    with pytest.raises(UnknownChat):
        call("show", "3")


def test_searching(call: Call) -> None:
    assert "权重变小" in call("search", "权重").stdout
    assert call("search", "权重").stdout.splitlines()[1].startswith("2 ")
    (hit,) = json.loads(call("search", "meko", "--json").stdout)
    assert (hit["chat"]["id"], hit["excerpt"]) == (1, "The Mekong.")
    done = call("search", "nothing like it")
    assert (done.stdout, done.stderr) == ("", "Nothing was found.\n")


@pytest.mark.parametrize("form", ["json", "markdown", "openai"])
def test_what_is_exported_can_be_imported(call: Call, folder: Path, form: str) -> None:
    done = call("export", "2", "--format", form)
    call("export", "2", "--format", form, "-o", "chat.txt")
    assert (folder / "chat.txt").read_text("utf-8") == done.stdout
    assert (folder / "chat.txt").stat().st_mode & 0o777 == 0o600
    assert json.loads(call("import", "chat.txt", "-", "--json", stdin=done.stdout.encode()).stdout) == {"chats": [3, 4]}
    assert call("show", "3").stdout == call("show", "4").stdout == call("show", "2").stdout
    if form == "json":
        assert call("show", "3", "--json").stdout == call("show", "2", "--json").stdout


def test_all_chats_go_into_one_file(call: Call, folder: Path) -> None:
    call("export", "--all", "-o", "all.jsonl")
    assert "3, 4" in call("import", "all.jsonl").stderr
    assert sorted(titles()) == sorted(["Which rivers cross Laos?", "什么是量化？"] * 2)
    call("export", "1", "-o", "one.md")
    assert (folder / "one.md").read_text().startswith("# Which")


def test_nothing_of_a_bad_file_is_imported(call: Call, folder: Path) -> None:
    good = call("export", "--all").stdout
    (folder / "bad").write_text(good + "{}\n")
    with pytest.raises(BadFile, match="bad, line 3"):
        call("import", "bad")
    for source in ("missing", "/dev/zero", str(folder)):
        with pytest.raises((UsageError, BadFile, OSError)):
            call("import", source)
    assert len(titles()) == 2


def test_exporting_replaces_nothing(call: Call, folder: Path) -> None:
    (folder / "mine").write_text("mine")
    with pytest.raises(UsageError, match="exists"):
        call("export", "1", "-o", "mine")
    assert (folder / "mine").read_text() == "mine"
    assert sorted(path.name for path in folder.iterdir()) == ["home", "mine"]


@pytest.mark.parametrize(
    "arguments", [("export",), ("export", "1", "--all"), ("export", "1", "2", "--format", "openai"), ("rm",), ("rm", "1", "--all")]
)
def test_orders_that_mean_nothing(call: Call, arguments: tuple[str, ...]) -> None:
    assert call(*arguments).exit_code == 2
    assert len(titles()) == 2


def test_renaming(call: Call) -> None:
    assert json.loads(call("rename", "1", "Rivers", "--json").stdout) == {"id": 1, "title": "Rivers"}
    assert "Which rivers" in call("rename", "1", "").stderr


def test_deleting(call: Call, folder: Path) -> None:
    cache = kvcache.KvCache(folder / "home" / "kv")
    names = [cache.save("f", [number] * 10, [(0, 10)], [Chunk(10, b"data")])[0] for number in (1, 2)]
    cache.close()
    with ChatStore.open() as store:
        store.keep_chunks(1, names[:1])
        store.keep_chunks(2, names)
    with pytest.raises(UsageError, match="confirmed"):
        call("rm", "2")
    with pytest.raises(UnknownChat):
        call("rm", "1", "9", "--yes")
    assert len(titles()) == 2
    assert json.loads(call("rm", "2", "--yes", "--json").stdout) == {"deleted": [2]}
    assert titles() == ["Which rivers cross Laos?"]
    assert kvcache.Disk(folder / "home" / "kv").names() == names[:1]
    assert "Deleted chat 1" in call("rm", "--all", "--yes").stderr
    assert kvcache.Disk(folder / "home" / "kv").names() == []
    assert call().stdout == ""


def test_what_was_deleted_in_the_app_is_not_there(call: Call, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ChatStore.open() as store:
        store.trash([1])
    assert [line.split()[0] for line in call().stdout.splitlines()] == ["ID", "2"]
    assert json.loads(call("search", "Mekong", "--json").stdout) == []
    assert [json.loads(line)["title"] for line in call("export", "--all").stdout.splitlines()] == ["什么是量化？"]
    for arguments in (("show", "1"), ("export", "1"), ("rename", "1", "x")):
        with pytest.raises(UnknownChat):
            call(*arguments)
    with ChatStore.open() as store:
        assert store.trashed() == [1], "the app may still bring it back"
        later = time.time() + deletion.UNDO_S
    monkeypatch.setattr("time.time", lambda: later)
    call()
    with ChatStore.open() as store, pytest.raises(UnknownChat):
        store.record(1)


def test_all_means_the_trash_as_well(call: Call) -> None:
    with ChatStore.open() as store:
        store.trash([1])
    assert json.loads(call("rm", "--all", "--yes", "--json").stdout) == {"deleted": [2, 1]}
    with ChatStore.open() as store:
        assert store.trashed() == []

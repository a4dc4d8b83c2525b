"""`chat`: what is kept, what goes on, and the commands, with a model that is scripted."""

from __future__ import annotations

import os
import pty
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from qwen2_local.chats import ChatStore
from qwen2_local.types import Sampling
from tests.support.program import here
from tests.support.scripted_cli import ScriptedQwen2, install


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QWEN2_LOCAL_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> ScriptedQwen2:
    """Says "one", "two" and so on, whatever it is asked."""
    scripted = install(monkeypatch, lambda asked, seed: "")
    scripted.says = ["one", "two", "three", "four"]
    return scripted


def kept() -> dict[int, list[str]]:
    """The saved chats, as they stand now: what was said in them."""
    with ChatStore.open() as store:
        chats = {}
        for summary in store.summaries():
            record = store.record(summary.id)
            path, at, by_id = [], record.tip, {message.id: message for message in record.messages}
            while at is not None:
                path.append(by_id[at].text)
                at = by_id[at].parent
            chats[summary.id] = path[::-1]
        return chats


def test_a_chat_is_saved(model: ScriptedQwen2) -> None:
    done = here("chat", "big", stdin="a\nb\n")
    assert (done.returncode, done.stdout) == (0, "one\ntwo\n")
    assert kept() == {1: ["a", "one", "b", "two"]}
    assert all(options["persist"] for options in model.options)


def test_the_second_turn_has_the_ids_of_the_first_reply(model: ScriptedQwen2) -> None:
    # "hello" is one token; what a model wrote in other tokens stays as it was written.
    model.says = [list(b"hello"), "ok"]
    tokens = [model.tokenizer.encode(letter)[0] for letter in "hello"]
    model.says[0] = tokens
    here("chat", "big", stdin="a\nb\n")
    assert str(tokens)[1:-1] in str(model.prompts[1])
    assert model.prompts[1][: len(model.prompts[0])] == model.prompts[0]


def test_the_last_chat_goes_on(model: ScriptedQwen2) -> None:
    here("chat", "big", stdin="a\n")
    here("chat", "big", stdin="other\n")
    here("chat", "--resume", "1", stdin="b\n")
    done = here("chat", "--continue", stdin="c\n")
    assert done.stdout == "four\n"
    assert kept() == {1: ["a", "one", "b", "three", "c", "four"], 2: ["other", "two"]}
    assert "chat 1" in done.stderr
    assert "> b\nthree\n" in done.stderr, "the last turn is shown"
    assert {name for name, _ in model.loads} == {"big"}, "with the model that wrote it"
    assert "three" in model.read


def test_a_chat_may_go_on_with_another_model(model: ScriptedQwen2) -> None:
    here("chat", "big", stdin="a\n")
    here("chat", "small", "--continue", stdin="b\n")
    assert [name for name, _ in model.loads] == ["big", "small"]


def test_a_temporary_chat_leaves_nothing(model: ScriptedQwen2, home: Path) -> None:
    done = here("chat", "big", "--temporary", stdin="a\nb\n")
    assert done.stdout == "one\ntwo\n"
    assert not any(options["persist"] for options in model.options)
    assert model.loads[0][1]["kv_cache"] is False
    assert [path for path in home.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--continue"], "no saved chat"),
        (["--resume", "7"], "no chat 7"),
        (["--resume", "-1"], "no chat -1"),
        (["--continue", "--temporary"], "only one"),
        (["--continue", "--resume", "1"], "only one"),
        (["--continue", "--system", "x"], "--system"),
        (["--temperature=-1"], "temperature"),
        (["--overflow", "burst"], "burst"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(model: ScriptedQwen2, arguments: list[str], says: str) -> None:
    done = here("chat", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr
    assert model.loads == []


def test_who_only_looks_leaves_no_empty_chat(model: ScriptedQwen2) -> None:
    here("chat", "big", "--system", "s", stdin="/help\n/new\n/quit\n")
    assert kept() == {}


def test_system_and_new_begin_other_chats(model: ScriptedQwen2) -> None:
    here("chat", "big", "--system", "s", stdin="a\n/new\nb\n/system t u\nc\n/system\nd\n")
    assert sorted(kept().values()) == [["d", "four"], ["s", "a", "one"], ["s", "b", "two"], ["t u", "c", "three"]]


def test_retry_edit_and_more(model: ScriptedQwen2) -> None:
    done = here("chat", "big", "--seed", "5", stdin="a\n/retry\n/edit b\n/more\n")
    assert done.stdout == "one\ntwo\nthree\nfour\n"
    assert kept() == {1: ["b", "threefour"]}
    assert [options["seed"] for options in model.options] == [5, 6, 6, 6], "the same seed would give the same reply"
    with ChatStore.open() as store:
        assert sorted(message.text for message in store.record(1).messages) == ["a", "b", "one", "threefour", "two"], "nothing is lost"


def test_a_greedy_retry_says_that_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, lambda asked, seed: "", Sampling())
    assert "greedy" in here("chat", "big", stdin="a\n/retry\n").stderr


def test_commands_without_anything_to_act_on_are_told_so(model: ScriptedQwen2) -> None:
    done = here("chat", "big", stdin="/retry\n/more\n/edit x\n/edit\n/fly\na\n")
    assert (done.returncode, done.stdout) == (0, "one\n")
    assert len(done.stderr.splitlines()) >= 6
    assert "There is no /fly" in done.stderr
    assert "nothing to retry yet" in done.stderr
    assert "nothing to go on with yet" in done.stderr


def test_a_command_that_exists_is_never_said_not_to(model: ScriptedQwen2) -> None:
    done = here("chat", "big", stdin="/retry x\n/more x\n/new x\n/help x\n/quit x\na\n")
    assert (done.returncode, done.stdout) == (0, "")
    assert "There is no" not in done.stderr
    assert done.stderr.count("takes no text") == 3


def test_a_question_without_a_reply_is_pointed_at(model: ScriptedQwen2) -> None:
    def fail(number: int) -> None:
        raise KeyboardInterrupt

    model.before = fail
    assert here("chat", "big", stdin="a\n").returncode == 130
    model.before = lambda number: None
    done = here("chat", "--continue", stdin="/retry\n")
    assert "no reply" in done.stderr
    (said,) = kept().values()
    assert (said[0], len(said)) == ("a", 2)


def test_what_was_written_until_a_stop_is_kept(model: ScriptedQwen2) -> None:
    def stop_at_the_third(number: int) -> None:
        if number == 2:
            raise KeyboardInterrupt

    model.before = stop_at_the_third
    assert here("chat", "big", stdin="a\nb\n").returncode == 130
    assert kept() == {1: ["a", "on"]}


def test_a_context_that_is_full_is_said_and_can_be_mended(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted = install(monkeypatch, lambda asked, seed: "")
    scripted.longest = 140
    long = "x" * 50
    assert "/new starts over" in here("chat", "big", stdin=f"{long}\n{long}\n").stderr
    mended = here("chat", "big", "--overflow", "drop_oldest", stdin=f"{long}\n{long}\n{long}\n")
    assert mended.stdout == "ok\nok\nok\n"


def test_a_store_that_cannot_be_opened_costs_a_note_only(model: ScriptedQwen2, home: Path) -> None:
    home.mkdir()
    (home / "chats.db").mkdir()
    done = here("chat", "big", stdin="a\n")
    assert (done.returncode, done.stdout) == (0, "one\n")
    assert "not saved" in done.stderr


def test_a_reply_that_broke_off_is_pointed_at(model: ScriptedQwen2) -> None:
    def stop_at_the_third(number: int) -> None:
        if number == 2:
            raise KeyboardInterrupt

    model.before = stop_at_the_third
    here("chat", "big", stdin="a\n")
    model.before = lambda number: None
    assert "that reply broke off: /more" in here("chat", "--continue", stdin="/more\n").stderr
    assert "broke off" not in here("chat", "--continue", stdin="").stderr


def test_pasted_lines_are_one_message() -> None:
    readline = pytest.importorskip("readline")
    if "libedit" in (readline.__doc__ or ""):
        pytest.skip("libedit knows no bracketed paste")
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["TERM"] = "xterm"
        os.execv(sys.executable, [sys.executable, "-c", "from qwen2_local.cli.chat import _line\nprint('got', ascii(_line()))"])
    shown = b""
    while b"> " not in shown:
        shown += os.read(terminal, 1024)
    os.write(terminal, "\x1b[200~one\n\ttwo 量\nthree\n\x1b[201~\r".encode())
    with suppress(OSError):  # how a terminal ends
        while piece := os.read(terminal, 1024):
            shown += piece
    os.waitpid(pid, 0)
    os.close(terminal)
    assert b"got 'one\\n\\ttwo \\u91cf\\nthree'" in shown

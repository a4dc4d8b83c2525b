"""What must not happen in a terminal: that it obeys somebody else's text, that something is lost, or that something is left running."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time

import pytest

from qwen2_local.chats import ChatMessage, ChatRecord, ChatStore
from tests.tui.terminal import ENTER, ESC, F5, Terminal, children, ctrl, endless, gone, scripted

# Each says "EVIL" in a way that the app itself never speaks in.
HOSTILE = {
    "clipboard": "\x1b]52;c;RVZJTA==\x07",
    "title": "\x1b]0;EVIL\x07",
    "title, other end": "\x1b]2;EVIL\x1b\\",
    "colour": "\x1b[31;5mEVIL",
    "move": "\x1b[66;66HEVIL",
    "C1 sequence": "\x9b31mEVIL",
    "C1 string": "\x9d0;EVIL\x9c",
    "device control": "\x1bP0;1|EVIL\x1b\\",
    "hyperlink": "\x1b]8;;http://evil.invalid\x1b\\EVIL\x1b]8;;\x1b\\",
    "reset": "\x1bcEVIL",
    "bidi": "\u202eEVIL\u202c\u2066EVIL\u2069",
    "bell": "EVIL\x07",
    "backspaces": "good\x08\x08\x08\x08EVIL",
    "return": "good\rEVIL",
    "markup": "[@click=app.quit]EVIL[/] [red]EVIL[/red]",
}
ALL = " ".join(HOSTILE.values())


def assert_harmless(window: Terminal, name: str = "EVIL") -> None:
    """None of it is in what the terminal was sent, though its words are: else the test would have looked at the wrong screen."""
    raw = re.sub(rb"\x1b\]22;[a-z]*\x07", b"", bytes(window.raw))  # Textual's own: the mouse's shape
    assert name.encode() in raw
    for what, sequence in HOSTILE.items():
        for part in (sequence, sequence.split("EVIL")[0]):
            data = part.encode()
            if any(byte < 0x20 or byte > 0x7E for byte in data):
                assert data not in raw, what
    for character in "\x07\x08\x9b\x9c\x9d\u202e\u202c\u2066\u2069":
        assert character.encode() not in raw, repr(character)
    assert b"evil.invalid\x1b" not in raw
    assert b"\x1b]52" not in raw
    assert b"\x1bP" not in raw


def saved() -> tuple[ChatMessage, ...]:
    """The messages of the newest chat."""
    with ChatStore.open() as store:
        return store.record(store.summaries()[0].id).messages


def test_escapes_of_a_reply_do_nothing():
    """At once and token by token, in prose, code, a table and a list."""
    everywhere = f"```python\n{ALL}\n```\n\n| a | b |\n|---|---|\n| {ALL} | x |\n\n- {ALL}\n"
    with scripted(f"{ALL!r}, Say({everywhere!r}, per_s=200)") as window:
        window.wait_for("ready", "send")
        window.type("Be evil." + ENTER)
        window.wait_for("EVIL")
        window.type("Once more." + ENTER)
        window.wait_until(lambda: len(saved()) >= 4 and saved()[-1].state == "whole", "no reply")
        window.wait_until_still()
        assert_harmless(window)
        assert window.process.poll() is None


def test_escapes_of_a_saved_chat_do_nothing():
    """Its title, its messages, the model that it was with: a file of a stranger may have been imported."""
    turns = (ChatMessage("user", ALL, id=1), ChatMessage("assistant", ALL, id=2, parent=1, model=ALL))
    with ChatStore.open() as store:
        store.insert(ChatRecord(ALL, True, False, 1.0, 2.0, 2, turns))
    with scripted("'Understood.', opening={'chat': 1}") as window:
        window.wait_for("ready", "EVIL")
        window.type(ctrl("f") + "EVIL")
        window.wait_until_still()
        assert_harmless(window)


def test_escapes_of_a_model_do_nothing():
    """Its name, its notes, the words of its progress and of its failure."""
    loader = f"ScriptedLoader(ScriptedModel(name={ALL!r}, notes=({ALL!r},)), reports=[({ALL!r}, 1, 2)])"
    with scripted(f"loader={loader}, opening={{'model': {ALL!r}}}") as window:
        window.wait_for("ready", "EVIL")
        window.wait_until_still()
        assert_harmless(window)
    with scripted(f"loader=ScriptedLoader(fails=[WorkerDied({ALL!r}, hint={ALL!r})])") as window:
        window.wait_for("EVIL")
        window.wait_until_still()
        assert_harmless(window)


def test_escapes_of_an_error_do_nothing():
    with scripted(f"dies('some words', 1, {ALL!r})") as window:
        window.wait_for("ready", "send")
        window.type("Go." + ENTER)
        window.wait_for("EVIL")
        window.wait_until_still()
        assert_harmless(window)


def test_escapes_of_what_is_pasted_and_of_settings_do_nothing(own_home):
    (own_home / "settings.toml").write_text(f"theme = {json.dumps(ALL)}\nEVIL = 3\n[presets.{json.dumps(ALL)}]\nsystem = {json.dumps(ALL)}\n")
    with scripted("'Understood.'") as window:
        window.wait_for("ready", "send")
        window.paste("evil " + ALL.replace("@", ""))  # with it, a file would be meant
        window.wait_for("EVIL")
        window.type(ENTER)
        window.wait_for("Understood.")
        window.wait_until_still()
        assert_harmless(window)


def begin(window: Terminal) -> None:
    """A reply is under way, and a part of it is kept: that happens once a second."""
    window.wait_for("ready", "send", timeout=60)
    window.type("Go on and on." + ENTER)
    window.wait_until(lambda: kept_so_far() > 0, "nothing was kept of the reply")


def kept_so_far() -> int:
    with ChatStore.open() as store:
        chats = store.summaries()
        last = store.record(chats[0].id).messages[-1] if chats else None
    return len(last.tokens) if last is not None and last.role == "assistant" else 0


def test_kill_9_of_the_app_in_the_middle_of_a_reply():
    with endless() as window:
        begin(window)
        workers = children(window.process.pid)
        window.kill()
    assert workers
    assert gone(workers), "an orphan keeps the model's memory"
    question, reply = saved()[-2:]
    assert (question.text, reply.state) == ("Go on and on.", "partial")
    assert reply.text
    # The next start says so, and goes on where it broke off.
    with scripted("always=' And the rest.'") as window:
        window.wait_for("ready", "ended in the middle")
        window.type(F5)
        window.wait_for("broke off", "go on with it")
        window.type(F5)
        window.wait_until(lambda: saved()[-1].text == reply.text + " And the rest." and saved()[-1].state == "whole", "it did not go on")


def test_kill_9_of_the_worker_in_the_middle_of_a_reply():
    with endless() as window:
        begin(window)
        for worker in children(window.process.pid):
            os.kill(worker, signal.SIGKILL)
        window.wait_for("safe mode")
        reply = saved()[-1]
        assert reply.state == "partial"
        assert reply.text
        window.type("Still there?" + ENTER)
        window.wait_until(lambda: saved()[-2].text == "Still there?" and kept_so_far() > 0, "it did not go on")
        window.type(ESC)
        window.type(ctrl("q"))
        assert window.end() == 0


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_any_moment_nothing_that_was_kept_is_lost(seed: int):
    turns = (ChatMessage("user", "a", id=1), ChatMessage("assistant", "b", id=2, parent=1))
    with ChatStore.open() as store:
        number, _ = store.insert(ChatRecord("Kept", True, False, 1.0, 2.0, 2, turns))
        before = store.record(number)
    with scripted("always=Say('word ' * 500, per_s=100)") as window:
        window.wait_for("send")
        window.type("Go." + ENTER)
        time.sleep(random.Random(seed).uniform(0.0, 1.5))
        window.kill()
    with ChatStore.open() as store:
        assert store.kept
        assert not store.notes
        assert store.record(number) == before
        for chat in store.summaries():
            assert all(one.state == "partial" or one.text for one in store.record(chat.id).messages)


def test_a_home_that_cannot_be_written_is_said_and_no_crash(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with scripted("'Understood.', store=ChatStore.open_or_temporary()", env={"QWEN2_LOCAL_HOME": str(blocked / "home")}) as window:
        window.wait_for("ready", "send")
        window.type("Hello." + ENTER)
        window.wait_for("Understood.")
        window.type(ctrl("q"))
        assert window.end() == 0

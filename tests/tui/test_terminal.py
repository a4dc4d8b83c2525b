"""The app in a real terminal: what a person types, and what the screen then shows."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from qwen2_local.chats import ChatMessage, ChatRecord, ChatStore
from tests.tui.terminal import ALT_ENTER, CTRL_J, ENTER, ESC, ROOT, SHIFT_ENTER, children, ctrl, gone, program, scripted

ANSWER = "Three rivers: **Mekong**, Nam Ou and Nam Khan."


def messages(number: int | None = None):
    """Of the newest chat in this home, or of chat `number`."""
    with ChatStore.open() as store:
        chat = number or store.summaries()[0].id
        return store.record(chat).messages


def test_a_visit():
    with scripted(f"{ANSWER!r}") as window:
        window.wait_for("ready", "send")
        window.type("Name rivers." + ENTER)
        window.wait_for("Three rivers: Mekong, Nam Ou and Nam Khan.", "Name rivers.")
        window.type(ctrl("q"))
        assert window.end() == 0
    assert [one.text for one in messages() if one.role != "system"] == ["Name rivers.", ANSWER]


def test_the_terminal_is_given_back_as_it_was():
    with scripted("'Understood.'") as window:
        window.wait_for("ready")
        window.type(ctrl("q"))
        window.end()
        end = bytes(window.raw)
    # alternate screen, cursor, paste, mouse, focus, keyboard
    for on, off in (
        (b"\x1b[?1049h", b"\x1b[?1049l"),
        (b"\x1b[?25l", b"\x1b[?25h"),
        (b"\x1b[?2004h", b"\x1b[?2004l"),
        (b"\x1b[?1000h", b"\x1b[?1000l"),
    ):
        assert on in end
        assert end.rfind(off) > end.rfind(on), off
    assert end.rfind(b"\x1b[<u") > end.rfind(b"\x1b[>")


def test_every_way_to_a_new_line():
    with scripted("'Understood.'") as window:
        window.wait_for("ready", "send")
        window.type(f"one{CTRL_J}two{ALT_ENTER}three{SHIFT_ENTER}four")
        window.wait_for("one", "two", "three", "four")
        window.type(ENTER)
        window.wait_for("Understood.")
    assert "one\ntwo\nthree\nfour" in [one.text for one in messages()]


@pytest.mark.parametrize("columns", [100, 60])
def test_letters_right_behind_a_key_go_where_it_leads(columns: int):
    """Typed in one go, as fast people and slow machines do; at 60 columns the list is a drawer."""
    with ChatStore.open() as store:
        for title in ("Rivers", "Lakes"):
            turns = (ChatMessage("user", f"About {title}?", id=1), ChatMessage("assistant", "Much.", id=2, parent=1))
            store.insert(ChatRecord(title, True, False, 1.0, 2.0, 2, turns))
    with scripted("'Understood.'", columns=columns) as window:
        window.wait_for("ready", "send")
        window.type(ctrl("f") + "rivers")
        window.wait_until(lambda: "Rivers" in window.text and "Lakes" not in window.text, "not searched for")
        window.type(ENTER)
        window.wait_for("About Rivers?")


def test_a_large_paste_is_one_message():
    text = "\n".join(f"line {number} 行" for number in range(2000))
    with scripted("'I read it.', longest=100_000") as window:
        window.wait_for("ready", "send")
        window.paste(text)
        window.wait_for("line 1999")
        window.type(ENTER)
        window.wait_for("I read it.")
    assert text in [one.text for one in messages()]


def test_wide_characters_leave_every_border_where_it_is():
    """What the app takes for the width of a character is what terminals take. (Not of Thai's vowels: pyte loses what follows them.)"""
    wide = "湄公河 メコン川 메콩강 🌊🌏 ｆｕｌｌ e\u0301 ñ"
    with scripted(f"'| 河流 | x |\\n|---|---|\\n| {wide} | x |\\n| a | x |'") as window:
        window.wait_for("ready", "send")
        window.paste(f"{wide}\n{wide}")
        window.wait_for("湄公河")
        window.type(ENTER)
        window.wait_for("河流")
        window.paste(f"{wide}\n{wide}")
        window.wait_until(lambda: window.text.count("ｆｕｌｌ") == 5, "not all is shown")
        edges = [columns for columns in window.columns("│") if len(columns) > 1]
        composer = [columns for columns in edges if max(columns) == 99]
        table = [columns for columns in edges if max(columns) < 99]
    assert len(composer) == 2
    assert len(set(map(frozenset, composer))) == 1
    assert len(table) == 3
    assert len(set(map(frozenset, table))) == 1


def test_the_window_has_the_last_word_on_its_size():
    with scripted("'Hello.'", columns=90, env={"COLUMNS": "70", "LINES": "22"}) as window:
        window.wait_for("ready", "send")
        assert max(edge for columns in window.columns("│") for edge in columns) == 89


def test_resizing_while_a_reply_comes():
    words = " ".join(f"word{number}" for number in range(60))
    with scripted(f"Say({words!r}, per_s=60)") as window:
        window.wait_for("ready", "send")
        window.type("Go." + ENTER)
        for columns, rows in ((60, 20), (120, 40), (30, 8), (100, 30)):
            window.resize(columns, rows)
            window.wait_until_still(0.02)
        window.wait_for("word59")
        assert all(f"word{number}" in window.text for number in range(60))
    assert words in [one.text for one in messages()]


def test_escape_stops_and_keeps():
    with scripted("Say('alpha beta gamma delta', hold=3)") as window:
        window.wait_for("ready", "send")
        window.type("Count." + ENTER)
        window.wait_for("alpha")
        window.type(ESC)
        window.wait_for("stopped")
        window.type(ctrl("q"))
        window.end()
    assert messages()[-1].state == "partial"
    assert messages()[-1].text.startswith("alpha")


def test_ctrl_c_stops_then_quits():
    with scripted("Say('alpha beta gamma delta', hold=3)") as window:
        window.wait_for("ready", "send")
        window.type("Count." + ENTER)
        window.wait_for("alpha")
        window.type(ctrl("c"))
        window.wait_for("stopped")
        window.type(ctrl("c"))
        window.wait_for("again to quit")
        window.type(ctrl("c"))
        assert window.end() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_told_to_end_it_keeps_everything(number: signal.Signals):
    with scripted("Say('alpha beta gamma delta', hold=3)") as window:
        window.wait_for("ready", "send")
        window.type("Count." + ENTER)
        window.wait_for("alpha")
        os.kill(window.process.pid, number)
        window.end()
    assert messages()[-1].state == "partial"


def test_the_program_alone_opens_it_with_the_guide():
    """`qwen2-local` on a terminal: a first start, offline."""
    with program() as window:
        window.wait_for("ready", "send", timeout=60)
        window.type("What is GGUF?" + ENTER)
        window.wait_for("tok/s", timeout=60)
        window.wait_until(lambda: any("GGUF" in line and "What is" not in line for line in window.lines()), "no reply")
        workers = children(window.process.pid)
        assert workers
        window.type(ctrl("q"))
        assert window.end() == 0
    assert gone(workers)
    assert messages()[-1].state == "whole"


def test_after_a_start_anew_the_chat_goes_on_from_the_cache():
    for turn, question in enumerate(("What is GGUF?", "And MLX?")):
        with program("app", *["--continue"] * turn) as window:
            window.wait_for("ready", "send", *["What is GGUF?"] * turn, timeout=60)
            window.type(question + ENTER)
            window.wait_for("tok/s", question, timeout=60)
            window.wait_until_gone("esc stop")
            window.type(ctrl("q"))
            window.end()
    usage = messages()[-1].usage
    assert usage is not None
    assert usage.cached_tokens > usage.prompt_tokens // 2


@pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")
def test_inside_tmux():
    """The keys that tmux knows in its own way, and colours."""
    source = "from tests.tui.pilot import *; make_app('Hello from **inside**.').hold()"
    tmux = ["tmux", "-L", f"qwen2-local-{os.getpid()}", "-f", os.devnull]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tui'}:{ROOT / 'converters'}"}

    def shown() -> str:
        return subprocess.run([*tmux, "capture-pane", "-p"], capture_output=True, text=True, check=True).stdout

    def until(text: str) -> None:
        end = time.monotonic() + 20
        while text not in shown():
            assert time.monotonic() < end, shown()
            time.sleep(0.05)

    start = [sys.executable, "-P", "-c", source]
    subprocess.run([*tmux, "new-session", "-d", "-x", "80", "-y", "24", *start], cwd=ROOT, env=env, check=True)
    try:
        until("ready")
        subprocess.run([*tmux, "send-keys", "one", "C-j", "two", "M-Enter", "three", "Enter"], check=True)
        until("Hello from inside.")
        subprocess.run([*tmux, "send-keys", "C-q"], check=True)
    finally:
        subprocess.run([*tmux, "kill-server"], capture_output=True, check=False)
    assert "one\ntwo\nthree" in [one.text for one in messages()]

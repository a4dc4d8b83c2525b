"""A reply that is read by a thread of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from qwen2_local.chat import Chat
from qwen2_local.chats import ChatStore
from qwen2_local.errors import ContextOverflow, WorkerDied
from qwen2_tui.live import LiveReply
from tests.tui.scripted import Say, ScriptedModel, dies


def until(condition: Callable[[], object], timeout: float = 10) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.002)


def replying(model: ScriptedModel) -> tuple[Chat, LiveReply]:
    chat = Chat(model, store=ChatStore.temporary())
    return chat, LiveReply(lambda told: chat.stream("Well?", progress=told))


def test_text_is_taken_as_it_comes_and_none_is_lost():
    model = ScriptedModel(Say("one two three four", hold=2))
    chat, live = replying(model)
    until(lambda: live.progress().written == 2)
    first = live.take()
    assert first and "one two three four".startswith(first)
    assert live.take() == ""
    model.go.release()
    until(lambda: live.over)
    assert first + live.take() == "one two three four"
    assert live.completion is not None and live.completion.finish_reason == "stop"
    assert chat.messages[-1].text == "one two three four"


def test_what_a_terminal_obeys_never_comes_out():
    _, live = replying(ScriptedModel("red \x1b[31m\x9b2J\x07 text"))
    until(lambda: live.over)
    assert live.take() == "red [31m2J text"


def test_stop_keeps_what_came():
    chat, live = replying(ScriptedModel(Say("one two three four", hold=2)))
    until(lambda: live.progress().written == 2)
    live.stop()
    until(lambda: live.over)
    assert live.error is None
    assert (chat.messages[-1].text, chat.messages[-1].state) == (live.take(), "partial")


def test_stop_before_it_has_begun_stops_it():
    chat = Chat(ScriptedModel(Say("one two three", hold_reading=True)))
    begin = threading.Event()
    live = LiveReply(lambda told: chat.stream("Well?", progress=told) if begin.wait(10) else None)  # type: ignore[arg-type,return-value]
    live.stop()
    begin.set()
    until(lambda: live.over)
    assert live.take() == "" and [one.role for one in chat.messages] == ["user"]


def test_an_error_ends_it_and_what_came_stays():
    chat, live = replying(ScriptedModel(dies("one two three", after=2)))
    until(lambda: live.over)
    assert isinstance(live.error, WorkerDied)
    assert live.take() == chat.messages[-1].text != ""
    assert chat.messages[-1].finish_reason is None


def test_what_is_refused_at_once_is_an_error_too():
    chat, live = replying(ScriptedModel(longest=20))
    until(lambda: live.over)
    assert isinstance(live.error, ContextOverflow) and live.completion is None
    assert chat.messages == ()


def test_the_phases_of_a_reply():
    model = ScriptedModel(Say("one two", hold_reading=True, reads=2, slice_s=0.15, hold=1))
    _, live = replying(model)
    assert live.progress().phase == "waiting"
    model.go.release()
    until(lambda: live.progress().phase == "reading")
    until(lambda: live.progress().left_s is not None or live.progress().phase == "writing")
    until(lambda: live.progress().phase == "writing")
    written = live.progress()
    assert written.read == written.prompt > 0 and written.first_token_s >= 0.3
    model.go.release()
    until(lambda: live.over)
    assert live.progress().phase == "over" and live.progress().prompt == written.prompt


def test_the_time_left_is_by_the_speed_so_far(monkeypatch: pytest.MonkeyPatch):
    now = [100.0]
    monkeypatch.setattr("qwen2_tui.live.time.perf_counter", lambda: now[0])
    live = LiveReply(lambda told: Chat(ScriptedModel(Say("x", hold_reading=True))).stream("Well?"))
    live._reading(2000, 18000)
    assert live.progress().left_s is None, "one slice says nothing of the speed"
    now[0] += 2.0
    live._reading(6000, 18000)
    assert live.progress().left_s == pytest.approx(6.0)
    now[0] += 1.0
    assert live.progress().left_s == pytest.approx(5.0), "it goes down between two slices"
    live.stop()
    until(lambda: live.over)


def test_the_end_says_what_the_model_counted():
    model = ScriptedModel("one two three", "four")
    chat, live = replying(model)
    until(lambda: live.over)
    again = LiveReply(lambda told: chat.stream("And?", progress=told))
    until(lambda: again.over)
    usage = chat.messages[-1].usage
    progress = again.progress()
    assert usage is not None and progress.cached == usage.cached_tokens > 0
    assert progress.prompt == usage.prompt_tokens and progress.tokens_per_s == usage.decode_tokens_per_s

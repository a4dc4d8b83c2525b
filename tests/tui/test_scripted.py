"""The scripted model behaves as a real one where the app relies on it."""

from __future__ import annotations

import threading

import pytest

from qwen2_local.chat import Chat
from qwen2_local.errors import WorkerDied
from qwen2_local.types import Message
from tests.tui.scripted import Say, ScriptedModel, dies


def test_it_says_what_it_is_told_and_counts():
    model = ScriptedModel("Rivers: 湄公河 🌊")
    done = model.respond([Message("user", "Name rivers.")]).finish()
    assert done.text == "Rivers: 湄公河 🌊"
    assert done.usage.prompt_tokens == len(model.prompts[0])
    assert done.usage.completion_tokens == len(done.tokens)
    assert "Name rivers." in model.read


def test_the_second_turn_finds_the_first_in_its_cache():
    model = ScriptedModel("One.", "Two.")
    chat = Chat(model)
    chat.send("first")
    assert model.known(model.prompts[0]) == len(model.prompts[0])
    assert chat.send("second").usage.cached_tokens > len(model.prompts[0])


def test_reading_is_told_slice_by_slice():
    told = []
    model = ScriptedModel(Say("ok", reads=4))
    model.respond([Message("user", "x " * 100)], progress=lambda done, total: told.append((done, total))).finish()
    assert len(told) == 4
    assert told[-1][0] == told[-1][1] == len(model.prompts[0])


def test_a_dying_worker_leaves_what_it_wrote():
    chat = Chat(ScriptedModel(dies("one two three four", after=2)))
    with pytest.raises(WorkerDied):
        chat.send("Count.")
    assert chat.messages[-1].state == "partial"
    assert chat.messages[-1].text


def test_a_held_reply_can_be_stopped_and_killed():
    model = ScriptedModel(Say("one two three", hold=1), Say("one two three", hold=1))
    stream = model.respond([Message("user", "x")])
    next(stream)
    stream.close()
    assert stream.completion is not None and stream.completion.finish_reason == "cancelled"
    stream = model.respond([Message("user", "x")])
    next(stream)
    threading.Timer(0.02, model.die).start()
    with pytest.raises(WorkerDied):
        stream.finish()


def test_a_model_that_is_closed_ends_its_replies():
    model = ScriptedModel(Say("one two three", hold=1))
    stream = model.respond([Message("user", "x")])
    next(stream)
    threading.Timer(0.02, model.close).start()
    assert stream.finish().finish_reason == "cancelled"

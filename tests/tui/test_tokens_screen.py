"""A reply's tokens: how likely each was, what else could have come, and the way to go on from there."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from textual.app import App
from textual.widgets import OptionList

from qwen2_local.chat import Chat
from qwen2_local.errors import WorkerDied
from qwen2_tui.scoring import alternatives, percent, scored, step, tokens_of
from qwen2_tui.screens.tokens import TokensScreen
from qwen2_tui.widgets.tokenflow import Flow
from tests.tui.pilot import screen_text, wait_for_text, wait_until
from tests.tui.scripted import Say, ScriptedModel


def said(reply: str | Say) -> tuple[ScriptedModel, Chat]:
    model = ScriptedModel(reply)
    chat = Chat(model)
    chat.send("Which rivers?")
    return model, chat


def test_the_tokens_are_those_of_the_reply_and_its_end():
    model, chat = said("The Mekong.")
    tokens = tokens_of(model, chat, 1)
    assert "".join(tokens.texts) == "The Mekong.<|im_end|>"
    assert tokens.prompt == tuple(model.prompts[0])
    assert tokens.marks == (False,) * (len(tokens.ids) - 1) + (True,)


def test_a_reply_that_was_cut_has_no_end():
    model = ScriptedModel("The Mekong and the Nam Ou.")
    chat = Chat(model)
    chat.send("Which rivers?", max_tokens=3)
    tokens = tokens_of(model, chat, 1)
    assert len(tokens.ids) == 3 and not any(tokens.marks)


def test_each_has_its_probability():
    model, chat = said("The Mekong.")
    tokens = scored(model, tokens_of(model, chat, 1))
    assert len(tokens.probabilities) == len(tokens.ids)
    assert all(0 < one <= 1 for one in tokens.probabilities)
    assert [piece.style.split()[0] for piece in tokens.pieces] == [step(one) for one in tokens.probabilities]


@pytest.mark.parametrize(("probability", "name", "shown"), [(1.0, "sure", "100.0 %"), (0.45, "open", "45.0 %"), (0.00001, "unlikely", "< 0.1 %")])
def test_probabilities_have_names_and_numbers(probability: float, name: str, shown: str):
    assert (step(probability), percent(probability)) == (name, shown)


def test_alternatives_are_asked_of_the_model_for_one_place():
    model, chat = said("The Mekong.")
    tokens = tokens_of(model, chat, 1)
    found = alternatives(model, tokens, 2)
    assert model.prompts[-1] == [*tokens.prompt, *tokens.ids[:2]]
    assert model.options[-1]["max_tokens"] == 1 and model.options[-1]["persist"] is False
    assert len(found) == 10 and [one.probability for one in found] == sorted((one.probability for one in found), reverse=True)
    before = model.tokenizer.decode(tokens.ids[:2])
    assert all(one.text is None or one.text.startswith(before) for one in found)


def test_from_half_a_character_or_the_end_no_reply_can_go_on():
    wave = ScriptedModel().tokenizer.encode("🌊")
    end = ScriptedModel().tokenizer.special["<|im_end|>"]
    for token in (wave[0], end):
        model, chat = said("The Mekong.")
        model.says = [Say([token])]
        first = alternatives(model, tokens_of(model, chat, 1), 0)[0]
        assert first.text is None


async def test_one_chooses_another_token_and_gets_the_text_to_go_on_from():
    model, chat = said("The Mekong crosses Laos.")
    model.says = ["Nam"]
    app: App[None] = App()
    async with app.run_test(size=(100, 24)) as pilot:
        results: list[Any] = []
        app.push_screen(TokensScreen(model, chat, 1), results.append)
        await wait_for_text(pilot, "perplexity")
        assert "The Mekong crosses Laos.<|im_end|>" in screen_text(app)
        await pilot.press("right", "enter")
        await wait_until(pilot, lambda: app.screen.query_one("#alternatives").has_focus)
        first = str(app.screen.query_one(OptionList).options[0].prompt)
        await pilot.press("enter")
        await wait_until(pilot, lambda: results)
        text = results[0]
        token = model.tokenizer.token_bytes(tokens_of(model, chat, 1).ids[0]).decode()
        assert text.startswith(token) and text[len(token) :] in first


async def test_moving_selects_and_escape_leaves_without_a_choice():
    model, chat = said("The Mekong\ncrosses Laos.")
    app: App[None] = App()
    async with app.run_test(size=(60, 20)) as pilot:
        results: list[Any] = []
        app.push_screen(TokensScreen(model, chat, 1), results.append)
        await wait_for_text(pilot, "token 1 of")
        flow = app.screen.query_one(Flow)
        await pilot.press("right", "right")
        assert flow.selected == 2
        await pilot.press("down")
        assert flow.pieces[flow.selected].text in " crosses Laos."
        await pilot.press("end")
        assert flow.selected == len(flow.pieces) - 1
        await wait_for_text(pilot, "<|im_end|>”")
        await pilot.press("home", "enter")
        await wait_until(pilot, lambda: app.screen.query_one("#alternatives").has_focus)
        await pilot.press("escape")
        assert flow.has_focus
        await pilot.press("escape")
        await wait_until(pilot, lambda: results == [None])


async def test_a_click_selects():
    model, chat = said("The Mekong crosses Laos.")
    app: App[None] = App()
    async with app.run_test(size=(100, 24)) as pilot:
        app.push_screen(TokensScreen(model, chat, 1))
        await wait_for_text(pilot, "perplexity")
        flow = app.screen.query_one(Flow)
        await pilot.click(Flow, offset=(12, 0))
        assert flow.selected not in (0, None)


async def test_the_same_place_is_asked_once():
    model, chat = said("The Mekong.")
    app: App[None] = App()
    async with app.run_test(size=(100, 24)) as pilot:
        app.push_screen(TokensScreen(model, chat, 1))
        await wait_for_text(pilot, "perplexity")
        await pilot.press("enter")
        await wait_until(pilot, lambda: app.screen.query_one("#alternatives").has_focus)
        await pilot.press("escape", "enter")
        await wait_until(pilot, lambda: app.screen.query_one("#alternatives").has_focus)
        assert len(model.prompts) == 2


async def test_a_model_that_dies_meanwhile_is_said():
    model, chat = said("The Mekong.")
    model.says = [Say(refuse=WorkerDied("The worker process was killed.", hint="The next question starts another."))]
    app: App[None] = App()
    async with app.run_test(size=(100, 24)) as pilot:
        app.push_screen(TokensScreen(model, chat, 1))
        await wait_for_text(pilot, "perplexity")
        await pilot.press("enter")
        await wait_for_text(pilot, "The worker process was killed.")


async def test_what_comes_after_it_was_closed_is_let_go(monkeypatch: pytest.MonkeyPatch):
    model, chat = said("The Mekong.")
    go, score = threading.Event(), model.score_ids

    def slow(tokens: Any, first: int) -> Any:
        assert go.wait(20)
        return score(tokens, first)

    monkeypatch.setattr(model, "score_ids", slow)
    app: App[None] = App()
    async with app.run_test(size=(100, 24)) as pilot:
        screen = TokensScreen(model, chat, 1)
        app.push_screen(screen)
        await wait_for_text(pilot, "reading their probabilities")
        await pilot.press("escape")
        await wait_until(pilot, lambda: not screen.is_running)
        go.set()
        await wait_until(pilot, lambda: not app.workers)
        assert app.is_running

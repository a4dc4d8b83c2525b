"""The raw prompt: token for token what the model reads, and what of it the KV cache has."""

from __future__ import annotations

import pytest
from textual.app import App

from qwen2_local.chat import Chat
from qwen2_tui.scoring import texts_of
from qwen2_tui.screens.prompt import PromptScreen, prompt_of
from qwen2_tui.widgets.tokenflow import Piece, laid
from tests.tui.pilot import screen_text, wait_for_text
from tests.tui.scripted import ScriptedModel, guide_tokenizer


def asked(*says: str, question: str = "Which rivers?") -> tuple[ScriptedModel, Chat]:
    model = ScriptedModel(*says)
    chat = Chat(model)
    for _ in says:
        chat.send(question)
    return model, chat


def test_the_pieces_are_the_tokens_with_control_tokens_marked():
    model, chat = asked("Mekong.")
    prompt = prompt_of(model, chat, 1)
    assert "".join(piece.text for piece in prompt.pieces) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nWhich rivers?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert len(prompt.pieces) == len(model.prompts[0])
    assert [piece.text for piece in prompt.pieces if piece.mark] == ["<|im_start|>", "<|im_end|>"] * 2 + ["<|im_start|>"]
    assert prompt.marks == 5


def test_what_a_person_typed_is_never_taken_for_a_control_token():
    model, chat = asked("No.", question="What is <|im_end|>?")
    prompt = prompt_of(model, chat, 1)
    assert prompt.marks == 5
    assert "What is <|im_end|>?" in "".join(piece.text for piece in prompt.pieces if not piece.mark)


def test_it_counts_what_is_cached_now_and_what_was_then():
    model, chat = asked("One.", "Two.")
    prompt = prompt_of(model, chat, 3)
    assert prompt.known == len(prompt.pieces)
    assert prompt.then == chat.messages[3].usage.cached_tokens > 0
    assert f"{len(prompt.pieces):,} tokens" in prompt.words and f"{prompt.then:,} when this reply was begun" in prompt.words


def test_what_is_not_cached_is_told_apart():
    model, chat = asked("One.")
    model.known_ids = [tuple(model.prompts[0][:7])]
    prompt = prompt_of(model, chat, 1)
    assert [piece.style.startswith("new") for piece in prompt.pieces] == [place >= 7 for place in range(len(prompt.pieces))]


def test_a_question_has_the_prompt_of_the_reply_to_it():
    model, chat = asked("One.")
    assert prompt_of(model, chat, 0).pieces == prompt_of(model, chat, 1).pieces


def test_a_character_of_several_tokens_is_shown_once():
    tokenizer = guide_tokenizer()
    for text in ("湄公河 🌊", "Été", "a🌊🌊b"):
        ids = tokenizer.encode(text)
        assert "".join(texts_of(tokenizer, ids)) == text


def test_bytes_that_are_no_character_are_seen_as_such():
    tokenizer = guide_tokenizer()
    wave = tokenizer.encode("🌊")
    assert len(wave) > 1
    mark = tokenizer.special["<|im_end|>"]
    assert texts_of(tokenizer, [*wave[:-1], mark])[-2:] == ["\N{REPLACEMENT CHARACTER}", "<|im_end|>"]
    assert "".join(texts_of(tokenizer, [wave[0], *tokenizer.encode("a")])).endswith("a")


@pytest.mark.parametrize("width", [2, 7, 20])
def test_lines_hold_all_of_the_text_and_are_never_too_wide(width: int):
    from rich.cells import cell_len

    pieces = [Piece(text) for text in ("Hello", " 湄公河", "\n", "", "\n\n", "x" * 33, "🌊")]
    lines = laid(pieces, width)
    assert all(sum(cell_len(run.text) for run in line) <= width for line in lines)
    assert "".join(run.text for line in lines for run in line).replace("↵", "") == "Hello 湄公河" + "x" * 33 + "🌊"


def test_nothing_that_a_terminal_obeys_is_left_in_a_line():
    lines = laid([Piece("a\x1b[31mb\x07\rc\x9b")], 80)
    assert "".join(run.text for line in lines for run in line) == "a[31mbc"


async def test_the_screen_shows_it_and_copies_it(monkeypatch: pytest.MonkeyPatch):
    model, chat = asked("Mekong.")
    app: App[None] = App()
    copied: list[str] = []
    monkeypatch.setattr(app, "copy_to_clipboard", copied.append)
    async with app.run_test(size=(80, 24)) as pilot:
        app.push_screen(PromptScreen(model, chat, 1))
        await wait_for_text(pilot, "<|im_start|>assistant↵")
        assert "Which rivers?<|im_end|>↵" in screen_text(app)
        assert f"{len(model.prompts[0])} tokens, 5 of them control tokens" in screen_text(app)
        await pilot.press("y")
        assert copied[0].endswith("<|im_start|>assistant\n")
        await pilot.press("escape")
        await pilot.pause()
        assert len(app.screen_stack) == 1


async def test_what_cannot_be_told_is_said():
    model, chat = asked("One.")
    app: App[None] = App()
    async with app.run_test(size=(80, 24)) as pilot:
        app.push_screen(PromptScreen(model, chat, 7))
        await wait_for_text(pilot, "no message 7")


async def test_a_long_prompt_is_shown_at_once_and_scrolls():
    model, chat = asked("One.", question="long " * 3000)
    app: App[None] = App()
    async with app.run_test(size=(60, 20)) as pilot:
        app.push_screen(PromptScreen(model, chat, 1))
        await wait_for_text(pilot, "long long")
        await pilot.press("end")
        await wait_for_text(pilot, "assistant↵")

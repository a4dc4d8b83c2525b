"""The conversation: what is seen of it, where the window stays, what keys and mouse select, what is copied."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
from textual.app import App, ComposeResult
from textual.geometry import Offset
from textual.pilot import Pilot
from textual.selection import SELECT_ALL, Selection

from qwen2_tui.widgets.drawing import HINT
from qwen2_tui.widgets.flow import FOOT, HEAD, Flow, Place
from qwen2_tui.widgets.transcript import Transcript, Turn

REPLY = "Some **bold** words.\n\n- one\n- two\n\n```python\nx = 1\n```\n\nThe end."


class Shown(App[None]):
    """The transcript, and what it said."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[tuple[str, int]] = []

    def compose(self) -> ComposeResult:
        yield Transcript()

    def on_transcript_action(self, event: Transcript.Action) -> None:
        self.said.append((event.name, event.index))


@asynccontextmanager
async def shown(turns: Sequence[Turn] = (), size: tuple[int, int] = (60, 20), *, end: bool = True) -> AsyncIterator[tuple[Pilot[None], Transcript]]:
    app = Shown()
    async with app.run_test(size=size) as pilot:
        transcript = app.query_one(Transcript)
        transcript.show(turns, end=end)
        transcript.focus()
        await pilot.pause()
        yield pilot, transcript


def user(text: str, key: int = 0, **more: object) -> Turn:
    return Turn(key, "user", "you", text, **more)  # type: ignore[arg-type]


def reply(text: str, key: int = 1, **more: object) -> Turn:
    return Turn(key, "assistant", "qwen2", text, **more)  # type: ignore[arg-type]


def rows(transcript: Transcript) -> list[str]:
    """The window, row by row, without the column of the mark."""
    return [transcript.render_line(y).text[2:].rstrip() for y in range(transcript.size.height)]


def long_chat(count: int = 40) -> list[Turn]:
    return [reply(f"Reply {number}.\n\n" + REPLY, number) if number % 2 else user(f"Question {number}?", number) for number in range(count)]


async def test_a_conversation() -> None:
    async with shown([user("Is **this** bold?\n  no"), reply(REPLY, number=2, count=3, footer="38 tok/s")]) as (_, transcript):
        assert rows(transcript)[:18] == [
            "",
            "you",
            "Is **this** bold?",
            "  no",
            "",
            f"qwen2{'‹ 2/3 ›':>51}",
            "Some bold words.",
            "",
            " • one",
            " • two",
            "",
            "  python",
            "  x = 1",
            "",
            "The end.",
            "38 tok/s",
            "",
            "",
        ]


async def test_nothing_to_show() -> None:
    async with shown() as (pilot, transcript):
        assert set(rows(transcript)) == {""}
        await pilot.press("up", "down", "n", "b", "e", "end", "home", "pageup")
        assert transcript.selected is None
        assert transcript.virtual_size.height == 0


async def test_no_control_character_gets_to_the_terminal() -> None:
    evil = "a\x1b[31mred\x1b]52;c;ZXZpbA==\x07\u202e\x9b2J`\x1bc`\n```\x1b[2J\n\x1b[2J\n```"
    turns = [user(evil), Turn(1, "assistant", "q\x1b[2Jwen\n2", evil, footer="\x1b[5m")]
    async with shown(turns) as (_, transcript):
        transcript.begin_stream(reply("\x1b"))
        transcript.feed("\x1b[31m more\x07")
        drawn = "".join(segment.text for y in range(20) for segment in transcript.render_line(y))
        assert not [character for character in drawn if ord(character) < 32 or 127 <= ord(character) < 160 or character == "\u202e"]


# Streaming.


async def streamed(text: str, size: int) -> list[str]:
    async with shown([user("?")], (50, 40)) as (pilot, transcript):
        transcript.begin_stream(reply(""))
        for at in range(0, len(text), size):
            transcript.feed(text[at : at + size])
        transcript.end_stream(reply(text))
        await pilot.pause()
        return rows(transcript)


async def test_a_streamed_reply_ends_as_the_whole_one() -> None:
    text = REPLY + "\n\n| a | b |\n|---|---|\n| c | d |\n\n1. x\n   - y\n\n> quote *here*\n"
    async with shown([user("?"), reply(text)], (50, 40)) as (_, transcript):
        whole = rows(transcript)
    assert await streamed(text, 1) == await streamed(text, 7) == await streamed(text, 1000) == whole


async def test_what_streams_is_seen_as_it_comes() -> None:
    async with shown([user("?")]) as (_, transcript):
        transcript.begin_stream(reply(""))
        assert rows(transcript)[4] == "qwen2▌"
        transcript.feed("Some **bo")
        assert rows(transcript)[5] == "Some bo▌"
        transcript.feed("ld** words")
        assert rows(transcript)[5] == "Some bold words▌"
        assert transcript.turns[-1].text == "Some **bold** words"
        transcript.end_stream(reply("Some **bold** words", footer="9 tok/s"))
        assert rows(transcript)[5:7] == ["Some bold words", "9 tok/s"]


async def test_a_reply_that_goes_on_begins_with_what_there_was() -> None:
    async with shown([user("?")]) as (_, transcript):
        transcript.begin_stream(reply("Some *b"))
        transcript.feed("old*.")
        transcript.end_stream(reply("Some *bold*."))
        assert rows(transcript)[5] == "Some bold."


async def test_the_final_turn_decides() -> None:
    async with shown([user("?")]) as (_, transcript):
        transcript.begin_stream(reply(""))
        transcript.feed("one two")
        transcript.end_stream(reply("one", state="partial"))
        assert rows(transcript)[4:6] == ["qwen2", "one"]


async def test_a_flush_draws_the_changed_rows_only() -> None:
    async with shown([*long_chat(4), user("?")]) as (pilot, transcript):
        transcript.begin_stream(reply(""))
        transcript.feed("one ")
        await pilot.pause()
        drawn: list[int] = []
        draw = transcript.render_line
        transcript.render_line = lambda y: drawn.append(y) or draw(y)  # type: ignore[method-assign,func-returns-value]
        transcript.feed("two ")
        await pilot.pause()
        assert len(set(drawn)) == 1
        growing = drawn[0]
        drawn.clear()
        transcript.end_stream(reply("one two "))
        await pilot.pause()
        assert growing in drawn  # the cursor goes


# Where the window stays.


async def test_it_opens_at_its_end_and_stays_there() -> None:
    async with shown(long_chat()) as (_, transcript):
        assert rows(transcript)[-2] == "The end."
        assert transcript.at_end
        transcript.append(user("Next?", 99))
        transcript.begin_stream(reply(""))
        for number in range(30):
            transcript.feed(f"line {number}\n")
        assert rows(transcript)[-2].removesuffix("▌") == "line 29"


async def test_it_may_open_at_its_start() -> None:
    async with shown(long_chat(), end=False) as (_, transcript):
        assert rows(transcript)[1:3] == ["you", "Question 0?"]


async def test_who_scrolled_up_is_left_there_and_told_of_more() -> None:
    async with shown(long_chat()) as (pilot, transcript):
        transcript.begin_stream(reply(""))
        await pilot.press("pageup")
        before = rows(transcript)
        transcript.feed("more\n\n" * 40)
        assert rows(transcript)[:-1] == before[:-1]
        assert rows(transcript)[-1].endswith(HINT.rstrip())
        transcript.end_stream(reply("more\n\n" * 40))
        assert rows(transcript)[:-1] == before[:-1]
        await pilot.press("end")
        assert rows(transcript)[-2] == "more"
        assert HINT.strip() not in "".join(rows(transcript))


async def test_a_click_on_the_hint_goes_to_the_end() -> None:
    async with shown(long_chat()) as (pilot, transcript):
        await pilot.press("pageup")
        transcript.append(reply("news", 77))
        await pilot.click(Transcript, offset=(30, 19))
        assert rows(transcript)[-2] == "news"
        assert transcript.at_end


async def test_who_sends_a_message_sees_it() -> None:
    async with shown(long_chat()) as (pilot, transcript):
        await pilot.press("pageup", "pageup")
        transcript.append(user("Here", 99))
        assert rows(transcript)[-2] == "Here"


async def test_scrolling_up_never_jumps_whatever_was_estimated() -> None:
    async with shown(long_chat(60)) as (pilot, transcript):
        seen = rows(transcript)
        for _ in range(60):
            transcript.scroll_to(y=transcript.scroll_offset.y - 7)
            await pilot.pause(0)
            now = rows(transcript)
            assert now[7:] == seen[:-7] or transcript.scroll_offset.y == 0
            seen = now
        transcript.scroll_to(y=0)
        assert rows(transcript)[2] == "Question 0?"


async def test_pages_up_and_down_come_back() -> None:
    async with shown(long_chat(60)) as (pilot, transcript):
        await pilot.press("pageup", "pageup")
        before = rows(transcript)
        await pilot.press(*["pageup"] * 5, *["pagedown"] * 5)
        assert rows(transcript) == before
        await pilot.press(*["pagedown"] * 3)
        assert transcript.at_end


async def test_resizing_keeps_the_place() -> None:
    turns = [reply("".join(f"{number}-{word} " for word in range(60)), number) for number in range(30)]
    async with shown(turns) as (pilot, transcript):
        await pilot.press("pageup", "pageup")
        transcript.scroll_to(y=transcript.flow.start(20) + 5)
        before = rows(transcript)
        for width in (40, 100, 33, 140):
            await pilot.resize_terminal(width, 20)
            await pilot.pause()
            assert before[0][:8] in "".join(rows(transcript)[0:2])
        await pilot.resize_terminal(60, 20)
        await pilot.pause()
        assert rows(transcript) == before


async def test_what_changed_while_it_was_hidden_is_there_when_it_is_shown_again() -> None:
    async with shown(long_chat(4)) as (pilot, transcript):
        transcript.display = False
        await pilot.pause()
        transcript.show([user("a\n\nb"), *long_chat(30)])
        transcript.begin_stream(reply("", 99))
        transcript.feed("**news**")
        transcript.display = True
        await pilot.pause()
        assert rows(transcript)[-2] == "news▌"


def test_a_line_that_nobody_prepared_is_blank() -> None:
    flow = Flow([user("word " * 40 + "\n" * 3)], 10)
    height = flow.height
    assert {flow.line(number).text for number in range(height, height + 5)} == {""}


async def test_resizing_at_the_end_keeps_the_end() -> None:
    async with shown(long_chat()) as (pilot, transcript):
        for size in ((30, 20), (100, 8), (60, 30)):
            await pilot.resize_terminal(*size)
            await pilot.pause()
            assert rows(transcript)[-2] == "The end."


async def test_a_branch_in_place_of_a_turn() -> None:
    async with shown(long_chat(10)) as (_, transcript):
        transcript.truncate(3)
        assert [turn.key for turn in transcript.turns] == [0, 1, 2]
        transcript.replace(2, user("Another?", 50, number=2, count=2))
        assert rows(transcript)[-3:-1] == [f"you{'‹ 2/2 ›':>53}", "Another?"]


# Keys and mouse.


async def test_up_and_down_select_turns_and_show_them() -> None:
    async with shown(long_chat(10)) as (pilot, transcript):
        assert transcript.selected == 9
        await pilot.press("up", "k", "k")
        assert transcript.selected == 6
        marked = [y for y in range(20) if transcript.render_line(y).text.startswith("▌")]
        assert rows(transcript)[marked[0]] == "you"
        await pilot.press("down", "j")
        assert transcript.selected == 8
        await pilot.press(*["up"] * 12)
        assert transcript.selected == 0
        assert rows(transcript)[1] == "you"


async def test_with_the_focus_comes_a_selected_turn_the_last() -> None:
    async with shown() as (pilot, transcript):
        transcript.blur()
        await pilot.pause()
        transcript.show(long_chat(4))
        assert transcript.selected is None
        transcript.append(user("and?", 9))
        transcript.focus()
        await pilot.pause()
        assert transcript.selected == 4
        transcript.show(long_chat(2))
        assert transcript.selected == 1


async def test_no_mark_without_focus() -> None:
    async with shown(long_chat(4)) as (pilot, transcript):
        transcript.blur()
        await pilot.pause()
        assert not any(transcript.render_line(y).text.startswith("▌") for y in range(20))


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("e", "edit"),
        ("r", "regenerate"),
        ("c", "continue"),
        ("y", "copy"),
        ("t", "tokens"),
        ("p", "prompt"),
        ("left", "previous"),
        ("right", "next"),
        ("i", "write"),
    ],
)
async def test_keys_ask_for_what_is_to_be_done(key: str, name: str) -> None:
    async with shown([user("?"), reply("!", count=2)]) as (pilot, transcript):
        await pilot.press(key)
        assert pilot.app.said == [(name, 1)]  # type: ignore[attr-defined]
        assert transcript.selected == 1


async def test_what_a_question_is_not_asked_for() -> None:
    async with shown([user("?")]) as (pilot, _):
        await pilot.press("c", "t", "left", "right", "e")
        assert pilot.app.said == [("edit", 0)]  # type: ignore[attr-defined]


async def test_code_blocks_have_the_focus_in_turn() -> None:
    first = "```py\none\n```\n\ntext\n\n```c\n" + "two;\n" * 150 + "```"
    async with shown([reply(first), user("?"), reply("no code"), reply("    three\n")], end=False) as (pilot, transcript):
        assert transcript.selected_code() is None
        await pilot.press("n")
        assert (transcript.selected, transcript.selected_code()) == (0, "one")
        edges = [y for y in range(20) if transcript.render_line(y).text[2:3] == "▌"]
        assert [rows(transcript)[y][1:].strip() for y in edges] == ["py", "one"]
        await pilot.press("n")
        assert transcript.selected_code() == "\n".join(["two;"] * 150)
        await pilot.press("n")
        assert (transcript.selected, transcript.selected_code()) == (3, "three")
        await pilot.press("n")
        assert transcript.selected == 3
        await pilot.press("b", "b")
        assert transcript.selected_code() == "one"
        await pilot.press("up")
        assert transcript.selected_code() is None


async def test_a_click_selects_the_turn_and_the_code_under_it() -> None:
    async with shown([user("?"), reply(REPLY)]) as (pilot, transcript):
        await pilot.click(Transcript, offset=(5, rows(transcript).index("?")))
        assert (transcript.selected, transcript.code) == (0, None)
        await pilot.click(Transcript, offset=(5, rows(transcript).index("  x = 1")))
        assert (transcript.selected, transcript.selected_code()) == (1, "x = 1")


# Selecting with the mouse.


async def dragged(pilot: Pilot[None], start: tuple[int, int], end: tuple[int, int]) -> str | None:
    await pilot.mouse_down(Transcript, offset=start)
    await pilot.hover(Transcript, offset=end)
    await pilot.mouse_up(Transcript, offset=end)
    await pilot.pause()
    return pilot.app.screen.get_selected_text()


async def test_what_the_mouse_selects_is_copied_as_it_was_written() -> None:
    text = "one two three four five six seven eight nine ten eleven twelve\n\n> quoted text\n\n- item\n\n```py\nx = 1\ny = 2\n```\n"
    async with shown([reply(text)], (40, 20)) as (pilot, transcript):
        first, last = rows(transcript).index("one two three four five six seven"), rows(transcript).index("  y = 2")
        assert await dragged(pilot, (2, first), (39, last)) == (
            "one two three four five six seven eight nine ten eleven twelve\n\nquoted text\n\n • item\n\nx = 1\ny = 2"
        )
        assert await dragged(pilot, (6, first), (8, first)) == "two"
        drawn = transcript.render_line(first)
        selected = [segment.text for segment in drawn if segment.style and segment.style.bgcolor != transcript._palette.blank.bgcolor]  # type: ignore[union-attr]
        assert selected == ["two"]


async def test_a_selection_moves_with_its_text() -> None:
    async with shown([reply("first line\n\nsecond line")]) as (pilot, transcript):
        assert await dragged(pilot, (2, 2), (7, 2)) == "first"
        transcript.append(user("more", 5))
        transcript.begin_stream(reply("", 6))
        transcript.feed("and\n\nmore\n\n" * 20)
        assert pilot.app.screen.get_selected_text() == "first"
        transcript.truncate(0)
        assert not pilot.app.screen.get_selected_text()


async def test_all_of_it() -> None:
    async with shown([user("a\x1b"), reply("**b**")]) as (_, transcript):
        assert transcript.get_selection(SELECT_ALL) == ("a\n\n**b**", "\n")
        start, end = Place(0, HEAD, 0).code, Place(1, FOOT, 0).code
        assert transcript.get_selection(Selection(Offset(0, start), Offset(0, end)))[0] == "\nyou\na\n\nqwen2\nb"  # type: ignore[index]


def test_places_in_order() -> None:
    places = [Place(0, HEAD, 0), Place(0, HEAD, 1), Place(0, 0, 0), Place(0, 0, 5), Place(0, 1, 0), Place(0, FOOT, 0), Place(1, HEAD, 0)]
    codes = [place.code for place in places]
    assert sorted(codes) == codes
    assert [Place.of(code) for code in codes] == places


# Looks.


async def test_another_theme_is_another_look() -> None:
    async with shown([reply("# Title")]) as (pilot, transcript):
        before = transcript.render_line(2)
        pilot.app.theme = "textual-light"
        await pilot.pause()
        after = transcript.render_line(2)
        assert before.text == after.text
        assert before != after


async def test_wide_characters_keep_their_columns() -> None:
    async with shown([user("中文字符很多" * 20), reply("| 河 | 长 |\n|--|--|\n| 湄公河 | 4,350 公里 |\n\n🎉👨‍👩‍👧 " + "中文，" * 40)], (31, 30)) as (
        _,
        transcript,
    ):
        assert {transcript.render_line(y).cell_length for y in range(30)} == {transcript.size.width}


# Size.


async def test_two_thousand_messages_open_at_once() -> None:
    turns = [reply(REPLY * 3, number) if number % 2 else user("Question?", number) for number in range(2000)]
    async with shown() as (pilot, transcript):
        began = time.process_time()
        transcript.show(turns)
        await pilot.pause()
        assert time.process_time() - began < 1.0
        assert rows(transcript)[-2] == "The end."
        assert sum(shown.opened for shown in transcript.flow._shown) < 10
        began = time.process_time()
        transcript.scroll_to(y=transcript.virtual_size.height // 2)
        rows(transcript)
        assert time.process_time() - began < 0.3


def test_turns_far_away_keep_their_heights_only() -> None:
    flow = Flow(long_chat(400), 60)
    flow.prepare(0, 30)
    height = flow[1].height
    flow.prepare(flow.height - 30, flow.height)
    assert flow[1].height == height
    assert all(lines is None for lines in flow[1].document._lines)
    assert flow.line(2).text == "Question 0?"

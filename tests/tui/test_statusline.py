"""The line of numbers, at every width."""

from __future__ import annotations

from typing import Any

import pytest

from qwen2_tui.conversation import Measure
from qwen2_tui.live import Progress
from qwen2_tui.widgets.limit import Offer, of_context
from qwen2_tui.widgets.statusline import Numbers, bar, line, rate, seconds, size

READING = Progress("reading", read=12_400, prompt=18_000, left_s=9.2)
WRITING = Progress("writing", read=100, prompt=100, written=40, tokens_per_s=38.21, first_token_s=0.31)
FULL = Numbers(progress=WRITING, memory=5_100_000_000, measure=Measure(1892, 1792, 32_768))


def said(numbers: Numbers, width: int = 100) -> list[str]:
    return [part for part in line(numbers, width).plain.split("   ") if part.strip()]


def test_reading_tells_how_far_it_is_and_how_long_it_takes():
    assert said(Numbers(progress=READING)) == ["reading 12,400 of 18,000 tokens · 9.2 s left"]


def test_no_time_is_made_up():
    assert said(Numbers(progress=Progress("reading", read=512, prompt=18_000))) == ["reading 512 of 18,000 tokens"]


def test_writing_tells_speed_first_token_memory_and_context():
    assert line(FULL, 100).plain == ("38.2 tok/s · first token 0.3 s · 5.1 GB" + " " * 9 + "context ▓░░░░░░░░░ 1,892 / 32,768 (1,792 from cache)")


@pytest.mark.parametrize("width", range(20, 130))
def test_at_every_width_whole_numbers_and_no_more_than_fits(width):
    text = line(FULL, width).plain
    assert len(text) == width
    assert text.startswith("38.2 tok/s")
    assert text.rstrip().endswith(("1,892 / 32,768", "from cache)")) or width < 28


def test_what_is_less_important_goes_first():
    shown = [line(FULL, width).plain for width in (100, 80, 60, 40)]
    assert ["▓" in text for text in shown] == [True, False, False, False]
    assert ["GB" in text for text in shown] == [True, False, False, False]
    assert ["first token" in text for text in shown] == [True, True, True, False]
    assert ["from cache" in text for text in shown] == [True, True, False, False]


def test_the_first_token_has_no_speed_yet():
    assert said(Numbers(progress=Progress("writing", written=1, first_token_s=2.0))) == ["1 token · first token 2.0 s"]


def test_before_anything_only_what_is_known_is_said():
    assert said(Numbers()) == []
    assert said(Numbers(memory=88_000_000)) == ["88 MB"]
    assert said(Numbers(progress=Progress("waiting"))) == ["waiting for the model"]
    assert said(Numbers(words="loading \x1b[31mguide", progress=WRITING)) == ["loading [31mguide"]


def test_near_the_limit_the_colour_warns():
    colours = {"text-warning": "#aaaa00", "text-error": "#aa0000"}

    def colour(used: int) -> list[Any]:
        return [str(span.style) for span in line(Numbers(measure=Measure(used, 0, 800)), 80, colours).spans if str(span.style)]

    assert colour(100) == [] and colour(750) == ["#aaaa00"] and colour(800) == ["#aa0000"]


@pytest.mark.parametrize(("used", "filled"), [(0, 0), (1, 1), (500, 5), (999, 9), (1000, 10), (9000, 10)])
def test_the_bar_is_empty_or_full_only_where_the_context_is(used, filled):
    assert bar(used, 1000) == "▓" * filled + "░" * (10 - filled)


def test_speeds_durations_and_sizes():
    assert [rate(speed) for speed in (0.44, 38.21, 99.94, 99.96, 1470.5)] == ["0.4 tok/s", "38.2 tok/s", "99.9 tok/s", "100 tok/s", "1,470 tok/s"]
    assert [seconds(time) for time in (0.04, 0.31, 9.94, 9.96, 59.4, 125, 7260)] == ["0.0 s", "0.3 s", "9.9 s", "10 s", "59 s", "2:05", "2 h 1 min"]
    assert [size(number) for number in (88_400_000, 5_140_000_000)] == ["88 MB", "5.1 GB"]


# The warning


def keys(offer: Offer | None) -> list[str]:
    return [] if offer is None else [choice.key for choice in offer.choices]


def test_no_warning_while_there_is_room():
    assert of_context(Measure(7000, 0, 8192), turns=3, shortened=False, bounded=True) is None


def test_before_a_message_would_not_fit_there_are_choices():
    offer = of_context(Measure(9000, 0, 8192), turns=3, shortened=False, bounded=True)
    assert offer is not None and offer.words == "This does not fit: 9,000 tokens, and the context holds 8,192, reply included."
    assert keys(offer) == ["shorten", "summarise", "new", "larger"]


def test_a_reply_needs_room_too():
    offer = of_context(Measure(8000, 0, 8192), turns=3, shortened=False, bounded=False)
    assert offer is not None and offer.words == "Only 192 tokens are left for the reply (8,000 of 8,192 are used)."


def test_only_what_helps_is_offered():
    assert keys(of_context(Measure(9000, 0, 8192), turns=3, shortened=True, bounded=False)) == ["summarise", "new"]
    alone = of_context(Measure(9000, 0, 8192), turns=1, shortened=False, bounded=False)
    assert keys(alone) == [] and alone is not None and alone.words.endswith("Write less, or attach less.")


def test_in_a_small_context_a_quarter_is_enough():
    assert of_context(Measure(250, 0, 400), turns=1, shortened=False, bounded=False) is None
    assert of_context(Measure(301, 0, 400), turns=1, shortened=False, bounded=False) is not None

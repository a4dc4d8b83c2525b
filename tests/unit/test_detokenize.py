from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2_local.detokenize import TextStream
from qwen2_local.errors import InvalidSampling

# Few letters, so that stop strings are met often and overlap.
TEXTS = st.text(alphabet="abé日😀\ufffd", max_size=30)
STOPS = st.lists(st.text(alphabet="abé日\ufffd", min_size=1, max_size=4), max_size=4)


def up_to_first_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """What TextStream is to do, told letter by letter."""
    for end in range(1, len(text) + 1):
        matches = [stop for stop in stops if text[:end].endswith(stop)]
        if matches:
            return text[: end - max(map(len, matches))], True
    return text, False


def chunks(data: bytes, cuts: list[int]) -> list[bytes]:
    borders = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[start:stop] for start, stop in itertools.pairwise(borders)]


@given(TEXTS, STOPS, st.lists(st.integers(0, 200), max_size=12))
def test_any_chunking_gives_the_text_up_to_the_first_stop(text: str, stops: list[str], cuts: list[int]) -> None:
    stream = TextStream(stops)
    shown = ""
    expected, stopped = up_to_first_stop(text, stops)
    for chunk in chunks(text.encode(), cuts):
        shown += stream.push(chunk)
        assert expected.startswith(shown), "shown text is never taken back"
    assert shown + stream.finish() == expected
    assert stream.stopped == stopped


@given(st.binary(max_size=40), STOPS, st.lists(st.integers(0, 200), max_size=12))
def test_any_bytes_give_what_decoding_them_at_once_gives(data: bytes, stops: list[str], cuts: list[int]) -> None:
    stream = TextStream(stops)
    shown = "".join(map(stream.push, chunks(data, cuts))) + stream.finish()
    assert (shown, stream.stopped) == up_to_first_stop(data.decode(errors="replace"), stops)


@given(TEXTS, STOPS)
def test_no_more_is_held_back_than_a_stop_needs(text: str, stops: list[str]) -> None:
    stream = TextStream(stops)
    shown = stream.push(text.encode())
    held = stream.finish()
    if not stream.stopped:
        assert shown + held == text
        assert held == "" or any(stop.startswith(held) for stop in stops)


def test_characters_come_whole() -> None:
    stream = TextStream()
    assert [stream.push(bytes([byte])) for byte in "é日".encode()] == ["", "é", "", "", "日"]


def test_an_unfinished_character_is_replaced_at_the_end() -> None:
    stream = TextStream()
    assert stream.push(b"a\xe6\x97") == "a"
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""


def test_a_stop_string_over_tokens_is_never_shown() -> None:
    stream = TextStream(["\nUser:"])
    assert [stream.push(part) for part in (b"Yes.", b"\n", b"Us", b"er", b":", b" no")] == ["Yes.", "", "", "", "", ""]
    assert stream.stopped
    assert stream.finish() == ""


def test_a_false_start_is_released() -> None:
    stream = TextStream(["abcd", "bx"])
    assert stream.push(b"abc") == ""
    assert stream.push(b"bx!") == "abc"
    assert stream.stopped


def test_the_stop_complete_first_wins_and_of_those_the_longest() -> None:
    for stops in (["abc", "b"], ["b", "abc"]):
        assert TextStream(stops).push(b"xabc") == "xa"
    for stops in (["abc", "c"], ["c", "abc"]):
        assert TextStream(stops).push(b"xabc") == "x"


def test_empty_stop_strings_are_refused() -> None:
    with pytest.raises(InvalidSampling):
        TextStream(["a", ""])

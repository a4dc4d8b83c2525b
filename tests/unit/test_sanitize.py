import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2_local.sanitize import clean, clean_line

HOSTILE = st.text(alphabet=st.one_of(st.characters(), st.sampled_from("\x1b\x9b\x07\r\n\t\x08\u202e\u2066\ud800[]0;31m")))


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("plain\n\ttext", "plain\n\ttext"),
        ("\x1b[31mred\x1b[0m", "[31mred[0m"),
        ("\x1b]0;title\x07", "]0;title"),
        ("\x9b2J", "2J"),
        ("wait\rgone", "waitgone"),
        ("windows\r\n", "windows\n"),
        ("a\x08b\x7f", "ab"),
        ("invoice\u202etxt.exe", "invoicetxt.exe"),
        ("half \ud83d", "half \N{REPLACEMENT CHARACTER}"),
        ("می‌خواهم 👩‍💻 שלום\u200f", "می‌خواهم 👩‍💻 שלום\u200f"),
    ],
)
def test_what_a_terminal_would_obey_goes(given, shown):
    assert clean(given) == shown


@given(HOSTILE)
def test_nothing_a_terminal_obeys_is_left(text):
    cleaned = clean(text)
    assert all(unicodedata.category(c) not in ("Cc", "Cs") or c in "\n\t" for c in cleaned)
    assert not set(cleaned) & {chr(c) for c in [*range(0x202A, 0x202F), *range(0x2066, 0x206A)]}
    assert clean(cleaned) == cleaned
    cleaned.encode()


@given(HOSTILE, HOSTILE)
def test_a_stream_may_be_cut_anywhere(first, second):
    assert clean(first) + clean(second) == clean(first + second)


@given(HOSTILE)
def test_a_line_is_one_line(text):
    assert len(clean_line(text).splitlines()) <= 1

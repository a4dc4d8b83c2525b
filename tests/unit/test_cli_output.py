"""The line about work under way."""

import io

import pytest

from qwen2_local.cli import output


@pytest.fixture
def shown(monkeypatch):
    """The lines of a status whose clock goes on by a second with every look at it."""
    lines: list[str] = []
    clock = iter(range(100))
    monkeypatch.setattr(output.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(output.Status, "show", lambda _, text: lines.append(text))
    return lines


def test_bytes_speed_and_the_time_left(shown):
    status = output.Status()
    status.bytes("converting", 0, 10**9)
    status.bytes("converting", 10**8, 10**9)
    assert shown == ["converting · 0% of 1.00 GB", "converting · 10% of 1.00 GB · 100 MB/s · 9 s left"]


def test_what_an_earlier_run_has_done_is_no_speed(shown):
    status = output.Status()
    status.bytes("checking", 0, 10**9)
    status.bytes("converting", 8 * 10**8, 10**9)
    status.bytes("converting", 8 * 10**8 + 10**7, 10**9)
    assert shown[1:] == ["converting · 80% of 1.00 GB", "converting · 81% of 1.00 GB · 10 MB/s · 19 s left"]


def test_what_has_no_end_yet_is_named(shown):
    output.Status().bytes("hashing", 5, 0)
    assert shown == ["hashing"]


def test_lines_break_between_words_on_a_terminal_only(monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    terminal, pipe = io.StringIO(), io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    text = "error: short\n  one two  three four five six seven"
    assert output.wrap(text, pipe) == text
    assert output.wrap(text, terminal) == "error: short\n  one two  three four five six\n  seven"
    assert output.wrap("a" * 40, terminal) == "a" * 40, "what is to be copied is not cut"

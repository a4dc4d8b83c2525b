"""The line that a pull shows, and the events that it tells instead."""

import json

import pytest

from qwen2_converters.pull_step import Step
from qwen2_local.cli import meter as module
from qwen2_local.cli.meter import Events, Meter


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


def lines(*steps):
    meter = Meter()
    return [meter.text(step, at) for at, step in enumerate(steps)]


def test_bytes_speed_and_the_time_left():
    first, second = lines(Step("fetching", "m.gguf", 0, 10**9), Step("fetching", "m.gguf", 10**8, 10**9))
    assert first.startswith("m.gguf") and "0%" in first and "MB/s" not in first
    assert "10%  0.10 GB of 1.00 GB  100.0 MB/s  0:09 left" in second


def test_what_an_earlier_run_has_fetched_is_no_speed():
    assert "10.0 MB/s" in lines(Step("fetching", "m", 5 * 10**8, 10**9), Step("fetching", "m", 5 * 10**8 + 10**7, 10**9))[1]


def test_the_speed_is_that_of_the_last_seconds():
    stalled = [Step("fetching", "m", 10**8, 10**9)] * 30
    assert "MB/s" not in lines(Step("fetching", "m", 0, 10**9), *stalled)[-1]


def test_other_phases_are_named():
    assert lines(Step("verifying", "m.gguf", 1, 2))[0].startswith("verifying m.gguf")
    assert lines(Step("checking", "m", 0, 0)) == ["checking m"]


def test_fetching_and_converting_at_once_are_on_one_line():
    shown = lines(
        Step("fetching", "a/b", 10, 100), Step("converting", "b:q4_0", 5, 100), Step("fetching", "a/b", 100, 100), Step("converting", "b", 6, 100)
    )
    assert shown[1].startswith("a/b") and shown[1].endswith("converting 5%")
    assert shown[3].startswith("converting b")


@pytest.mark.parametrize("columns", ["60", "80", "100"])
def test_a_narrow_terminal_gets_a_line_that_fits(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    name = "model-00001-of-00037.safetensors"
    for line in lines(Step("fetching", name, 0, 10**9, 5, 10**8), Step("fetching", name, 10**8, 10**9, 10, 10**8)):
        assert len(line) < int(columns) and "of 1.00 GB" in line


def test_the_bar_takes_the_room_that_there_is(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    line = lines(*(Step("fetching", "model.safetensors", done, 10**9) for done in (0, 10**8)))[1]
    assert "━" in line and len(line) < 80


def events(capsys, monkeypatch, *steps):
    """What is told of steps that come at these times: (seconds, step)."""
    told = Events()
    for at, step in steps:
        monkeypatch.setattr(module.time, "monotonic", lambda at=at: 1000.0 + at)
        told.step(step)
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_an_event_says_how_far_how_fast_and_how_long(capsys, monkeypatch):
    first, second = events(capsys, monkeypatch, (0, Step("fetching", "m", 0, 1000)), (1, Step("fetching", "m", 100, 1000)))
    assert first == {"phase": "fetching", "name": "m", "done": 0, "total": 1000, "speed": 0, "left_s": None}
    assert second == {"phase": "fetching", "name": "m", "done": 100, "total": 1000, "speed": 100, "left_s": 9.0}


def test_of_each_phase_five_a_second_and_the_last(capsys, monkeypatch):
    steps = [(at / 100, Step(phase, "m", at, 199)) for at in range(200) for phase in ("fetching", "converting")]
    told = events(capsys, monkeypatch, *steps)
    for phase in ("fetching", "converting"):
        mine = [one["done"] for one in told if one["phase"] == phase]
        assert 9 <= len(mine) <= 12 and mine[0] == 0 and mine[-1] == 199


def test_a_name_cannot_steer_a_terminal_nor_break_a_line(capsys, monkeypatch):
    (told,) = events(capsys, monkeypatch, (0, Step("checking", "\x1b[2J\n\u2028x", 0, 0)))
    assert told["name"] == "\x1b[2J\n\u2028x" and told["left_s"] is None

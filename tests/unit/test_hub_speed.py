"""The speed of the last pull is a guess at that of the next."""

import pytest

from qwen2_converters.hub import speed
from qwen2_local import paths


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("QWEN2_LOCAL_HOME", str(tmp_path))


def took(monkeypatch, seconds, *counts):
    clock = iter(seconds)
    monkeypatch.setattr(speed.time, "monotonic", lambda: next(clock))
    watch = speed.Stopwatch()
    for count in counts:
        watch.at(count)
    watch.remember()


def test_it_is_kept(monkeypatch):
    assert speed.last_speed() == 0
    took(monkeypatch, [10.0, 12.0, 14.0], 0, 10**8, 2 * 10**8)
    assert speed.last_speed() == 50_000_000


def test_what_was_there_before_was_not_fetched(monkeypatch):
    took(monkeypatch, [0.0, 4.0], 10**9, 10**9 + 10**8)
    assert speed.last_speed() == 25_000_000


def test_a_few_bytes_say_nothing(monkeypatch):
    took(monkeypatch, [0.0, 1.0], 0, 1000)
    took(monkeypatch, [])
    assert speed.last_speed() == 0


@pytest.mark.parametrize("text", ["", "-5", "fast", "9" * 40, "\0"])
def test_a_file_that_is_damaged_says_nothing(text):
    (paths.cache() / "download-speed").write_text(text)
    assert speed.last_speed() == 0

"""When a streaming reply is drawn again."""

from __future__ import annotations

import pytest

from qwen2_tui.pace import LEAST, MOST, SHARE, Pace


class Clock:
    """Time and CPU that pass when told."""

    def __init__(self) -> None:
        self.now = self.used = 0.0

    def pass_(self, seconds: float, cpu: float = 0.0) -> None:
        self.now += seconds
        self.used += cpu


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pace(clock: Clock) -> Pace:
    return Pace(lambda: clock.now, lambda: clock.used)


def test_the_first_flush_is_due_at_once(pace: Pace) -> None:
    assert pace.wait() == 0.0


def test_cheap_flushes_come_ten_times_a_second(pace: Pace, clock: Clock) -> None:
    pace.flushed()
    clock.pass_(0.02, cpu=0.002)
    assert pace.wait() == pytest.approx(LEAST - 0.02)
    clock.pass_(LEAST - 0.02)
    assert pace.wait() == 0.0


def test_dear_ones_wait_in_proportion_to_their_cost_drawing_included(pace: Pace, clock: Clock) -> None:
    pace.flushed()
    clock.pass_(0.01, cpu=0.01)
    assert pace.wait() == pytest.approx(SHARE * 0.01 - 0.01)
    clock.pass_(0.015, cpu=0.015)  # the drawing, later
    assert pace.wait() == pytest.approx(SHARE * 0.025 - 0.025)
    assert SHARE >= 3


def test_never_longer_than_a_second(pace: Pace, clock: Clock) -> None:
    pace.flushed()
    clock.pass_(0.5, cpu=0.5)
    assert pace.wait() == pytest.approx(MOST - 0.5)


def test_the_cost_of_a_flush_is_forgotten_at_the_next(pace: Pace, clock: Clock) -> None:
    pace.flushed()
    clock.pass_(1.0, cpu=0.3)
    assert pace.wait() == 0.0
    pace.flushed()
    assert pace.wait() == pytest.approx(LEAST)


def test_it_measures_this_thread() -> None:
    pace = Pace()
    pace.flushed()
    assert 0.0 < pace.wait() <= MOST

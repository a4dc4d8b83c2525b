"""A day in small: whatever was asked, cancelled, refused or killed, nothing is left behind. `benchmarks/day.py` is the long one."""

from __future__ import annotations

import pytest

from tests.support.day import Day, Footing, can_look

pytestmark = pytest.mark.skipif(not can_look(), reason="this system does not say what a process holds")


def test_after_requests_of_all_kinds_everything_is_where_it_began() -> None:
    day = Day(1)
    day.session(15)
    day.session(13, worker=True, kill=True)
    before, chats = Footing.now(), day.chats_left()
    for _ in range(2):
        day.session(25)
    day.session(13, worker=True, kill=True)
    after = Footing.now()
    assert not day.wrong
    assert (after.threads, after.files, after.children) == (before.threads, before.files, before.children)
    assert after.strangers <= before.strangers
    assert day.chats_left() == chats
    assert after.memory - before.memory < 40e6

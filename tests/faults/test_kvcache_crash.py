"""SIGKILL and power cuts at any write of the KV cache: what is found afterwards is right, and nothing half-written stays."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen2_local.kvcache import KvCache, chain, record
from tests.support.crashes import killed, recorded
from tests.support.kv import PROMPT, known, save

FP = "ab" * 32
FILE = record.size_of(chain.links(FP, PROMPT[:256])[0], 256 * 32)


def conversation(folder: Path, budget: int = 10**9) -> Callable[[], None]:
    """Two turns, an edit, and a deleted conversation."""

    def work() -> None:
        cache = KvCache(folder, budget=budget, memory=0, model="7b:q4_0")
        save(cache, FP, PROMPT[:300])
        save(cache, FP, PROMPT[:600])
        names = save(cache, FP, [*PROMPT[:280], *PROMPT[700:900]])
        cache.delete(names[-1:])
        cache.close()

    return work


def check(folder: Path) -> None:
    """All that is found is right (`known` looks at every byte), it works on, and leftovers go."""
    cache = KvCache(folder, budget=10**9, memory=0)
    for prompt in (PROMPT[:600], [*PROMPT[:280], *PROMPT[700:900]], PROMPT[:100]):
        known(cache, FP, prompt)
        save(cache, FP, prompt)
        assert known(cache, FP, prompt) == len(prompt)
    cache.close()
    assert not list(folder.glob("*/??/.qwen2-*"))


@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize("budget", [10**9, 2 * FILE])
def test_killed_at_any_write(tmp_path: Path, torn: bool, budget: int) -> None:
    for point in range(1000):
        folder = tmp_path / str(point) / "kv"
        folder.parent.mkdir()
        if not killed(folder.parent, point, conversation(folder, budget), torn=torn):
            assert point > 20, "the writes were not counted"
            return
        check(folder)
    pytest.fail("it never finished")


def test_a_power_cut_at_any_write(tmp_path: Path) -> None:
    (tmp_path / "live").mkdir()
    log = recorded(tmp_path / "live", conversation(tmp_path / "live" / "kv"))
    assert len(log.changes) > 20
    started = time.monotonic()
    for names in (True, False):
        for count in range(len(log.changes) + 1):
            place = tmp_path / f"{names}-{count}"
            place.mkdir()
            log.rebuild(count, place, names=names)
            check(place / "kv")
    assert time.monotonic() - started < 120

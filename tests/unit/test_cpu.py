"""How many cores we may use, from made-up files as Linux shows them."""

from __future__ import annotations

import os
import sys

import pytest

from qwen2_local import cpu

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's files")


@pytest.mark.parametrize(
    ("allowed", "files", "expected"),
    [
        ({0, 1, 2, 3}, {}, 4),
        ({0, 1, 2, 3}, {"cpu0": "0,2", "cpu1": "1,3", "cpu2": "0,2", "cpu3": "1,3"}, 2),
        ({0, 2}, {"cpu0": "0,2", "cpu2": "0,2"}, 1),
        ({0, 1, 2, 3}, {"cpu_core": "0-1"}, 2),
        ({2, 3}, {"cpu_core": "0-1"}, 2),
        ({0, 1, 2, 3}, {"/sys/fs/cgroup/box/cpu.max": "250000 100000"}, 2),
        ({0, 1, 2, 3}, {"/sys/fs/cgroup/cpu.max": "50000 100000"}, 1),
        ({0, 1, 2, 3}, {"/sys/fs/cgroup/box/cpu.max": "max 100000"}, 4),
    ],
)
def test_cores(monkeypatch: pytest.MonkeyPatch, allowed: set[int], files: dict[str, str], expected: int) -> None:
    def read(path: str) -> str:
        if path == "/proc/self/cgroup":
            return "0::/box"
        for name, text in files.items():
            if path == name or f"/{name}/" in path:
                return text
        return ""

    monkeypatch.setattr(cpu, "_read", read)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: allowed)
    assert cpu.cores() == expected


def test_this_machine() -> None:
    assert 1 <= cpu.cores() <= (os.cpu_count() or 1)
    assert cpu.features()

"""The scripted backend for worker processes: what it does wrong stands in the JSON file that it is loaded from."""

from __future__ import annotations

import ctypes
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qwen2_local.backends import Plan
from qwen2_local.backends.base import Layout, LoadOptions, Row, RowResult
from qwen2_local.errors import Cancelled, DoesNotFit
from qwen2_local.worker.setup import Setup
from tests.support.scripted import Scripted, scrambled

SITE = Path(__file__).parent / "worker_site"


def setup(folder: Path, **script: Any) -> Setup:
    """A worker whose backend does what `script` says; see `load` and `Odd`. SITE has to be in PYTHONPATH."""
    path = folder / "script.json"
    path.write_text(json.dumps(script))
    return Setup(Plan("scripted", path, Layout(1, 4096), LoadOptions("scripted", 4096)), "scripted", kv_cache=False, parallel=8, kv_memory=8 * 4096)


def loads(folder: Path) -> int:
    """How often a worker began to load it."""
    path = folder / "loads"
    return path.stat().st_size if path.exists() else 0


def load(path: Path, *, layout: Layout, options: LoadOptions, cancelled: Callable[[], bool] | None = None) -> Odd:
    """does_not_fit: raise that. crash_loads: so many times, die while loading. slow_load: seconds. chatty: print to all that is standard output."""
    script = json.loads(path.read_text())
    with (path.parent / "loads").open("ab") as file:
        file.write(b".")
    if script.get("does_not_fit"):
        raise DoesNotFit("It needs 9 GB.", hint="Take less.")
    end = time.monotonic() + script.get("slow_load", 0)
    while time.monotonic() < end:
        if cancelled is not None and cancelled():
            raise Cancelled("Stopped.")
        time.sleep(0.01)
    if loads(path.parent) <= script.get("crash_loads", 0):
        crash()
    return Odd(script)


class Odd(Scripted):
    """Any token by all before it. pause: seconds of a step, not to be cancelled. crash_at: the number of the step in which it crashes."""

    def __init__(self, script: dict[str, Any]) -> None:
        super().__init__(context=4096, rule=scrambled)
        self._script = script
        self._count = 0

    def step(self, rows: Sequence[Row]) -> list[RowResult]:
        self._count += 1
        if self._script.get("chatty"):
            print("hello from Python", flush=True)
            os.write(1, b"hello from native code\n")
        if self._count == self._script.get("crash_at"):
            crash()
        time.sleep(self._script.get("pause", 0))
        return super().step(rows)


def crash() -> None:
    """As native code does it."""
    ctypes.string_at(1)

"""The engine of a setup, in this process."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen2_local import backends
from qwen2_local.worker.setup import LocalEngine, Setup
from tests.support import scripted_worker
from tests.support.scripted import Scripted

pytestmark = pytest.mark.timeout(60)


@pytest.mark.parametrize("draft", [False, True])
def test_a_ctrl_c_while_a_large_model_loads_ends_the_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, draft: bool) -> None:
    monkeypatch.setitem(backends._BACKENDS, "scripted", ("json", "tests.support.scripted_worker"))
    real = scripted_worker.load
    large = scripted_worker.setup(tmp_path, slow_load=60)
    begun = threading.Event()

    def load(path: Path, *, cancelled: Callable[[], bool] | None = None, **more) -> Scripted:
        if draft and not begun.is_set():  # the model itself is quick
            begun.set()
            return Scripted(context=4096)
        begun.set()
        return real(path, cancelled=cancelled, **more)

    def interrupt() -> None:
        begun.wait()
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(scripted_worker, "load", load)
    threads = threading.active_count()
    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        LocalEngine(Setup(large.plan, "large", draft=large.plan if draft else None, kv_cache=False))
    interrupter.join()
    assert time.monotonic() - began < 5
    assert threading.active_count() == threads, "nothing goes on loading"

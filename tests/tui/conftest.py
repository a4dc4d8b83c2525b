"""Tests of the app: coroutines may be tests; each has a home of its own (QWEN2_LOCAL_HOME), and no network, as all tests."""

from __future__ import annotations

import asyncio
import inspect
from pathlib import Path

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Runs an `async def test_...` to its end."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    asyncio.run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}))
    return True


@pytest.fixture(autouse=True)
def own_home(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with nothing in it but what was converted once in this session."""
    own = tmp_path / "home"
    own.mkdir(mode=0o700)
    (home / "cache").mkdir(exist_ok=True)
    (own / "cache").symlink_to(home / "cache")
    monkeypatch.setenv("QWEN2_LOCAL_HOME", str(own))
    # Settings of whoever runs the tests are no part of them.
    for name in ("NO_COLOR", "TEXTUAL", "EDITOR", "VISUAL", "SSH_CONNECTION", "TMUX"):
        monkeypatch.delenv(name, raising=False)
    return own

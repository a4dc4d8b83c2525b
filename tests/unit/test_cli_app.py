"""`qwen2-local app`, and what a person gets who types no command: with an app that only says how it was called."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qwen2_local.chats import ChatStore
from tests.support.program import here
from tests.support.scripted_cli import ScriptedQwen2, install


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QWEN2_LOCAL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr("qwen2_local.cli.app.on_terminal", lambda: True)
    return tmp_path / "home"


class ScriptedApp:
    """Ends at once with `code`, or fails with `error`."""

    def __init__(self) -> None:
        self.calls: list[tuple[str | None, dict[str, Any]]] = []
        self.code = 0
        self.error: Exception | None = None

    def run(self, model: str | None = None, **asked: Any) -> int:
        self.calls.append((model, asked))
        if self.error is not None:
            raise self.error
        return self.code


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> ScriptedApp:
    app = ScriptedApp()
    monkeypatch.setitem(sys.modules, "qwen2_tui", SimpleNamespace(run=app.run))
    return app


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> ScriptedQwen2:
    return install(monkeypatch, lambda asked, seed: "")


NOTHING = {"chat": None, "continue_last": False, "temporary": False, "loads": {}}


def test_no_command_opens_the_app(opened: ScriptedApp, model: ScriptedQwen2) -> None:
    assert here().returncode == 0
    assert opened.calls == [(None, NOTHING)]
    assert model.loads == []


def test_what_was_asked_for_reaches_it(opened: ScriptedApp) -> None:
    with ChatStore.open() as store:
        chat = store.create()
    here("app", "0.5b", "--context", "4096", "--kv-bits", "8", "--backend", "mlx", "--draft", "guide", "--no-kv-cache")
    loads = {"context": 4096, "kv_bits": 8, "backend": "mlx", "draft": "guide", "kv_cache": False}
    assert opened.calls.pop() == ("0.5b", {**NOTHING, "loads": loads})
    here("app", "--continue")
    assert opened.calls.pop() == (None, {**NOTHING, "continue_last": True})
    here("app", "--temporary")
    assert opened.calls.pop() == (None, {**NOTHING, "temporary": True})
    here("app", "--resume", str(chat))
    assert opened.calls.pop() == (None, {**NOTHING, "chat": chat})


def test_its_exit_code_is_ours(opened: ScriptedApp) -> None:
    opened.code = 3
    assert here("app").returncode == here().returncode == 3


def test_what_cannot_be_is_refused_before_it_opens(opened: ScriptedApp) -> None:
    with ChatStore.open() as store:
        chat = store.create()
        store.trash([chat])
    for arguments in (("--continue", "--temporary"), ("--resume", "7"), ("--resume", str(chat))):
        done = here("app", *arguments)
        assert done.returncode == 2
        assert done.stderr
    assert opened.calls == []


@pytest.mark.parametrize("kind", ["dumb", "", "unknown"])
def test_a_simple_terminal_gets_the_plain_chat(opened: ScriptedApp, model: ScriptedQwen2, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setenv("TERM", kind)
    monkeypatch.setattr("qwen2_local.cli.chat._line", lambda: None)
    done = here()
    assert (done.returncode, opened.calls) == (0, [])
    assert "/help for help" in done.stderr
    assert "too simple" in here("app").stderr


@pytest.mark.parametrize("error", [ImportError("No module named 'textual'"), RuntimeError("no such\x1b[31m terminal")])
def test_an_app_that_does_not_start_is_said_and_the_plain_chat_comes(
    opened: ScriptedApp, model: ScriptedQwen2, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    opened.error = error
    monkeypatch.setattr("qwen2_local.cli.chat._line", lambda: None)
    done = here()
    assert done.returncode == 0
    assert type(error).__name__ in done.stderr
    assert "\x1b" not in done.stderr
    assert "/help for help" in done.stderr
    assert here("app").returncode == 1, "who asked for it by name is told that it failed"


def test_a_pipe_never_opens_it(opened: ScriptedApp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen2_local.cli.app.on_terminal", lambda: False)
    done = here("app")
    assert (done.returncode, opened.calls) == (2, [])
    assert "no terminal" in done.stderr

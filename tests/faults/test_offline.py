"""Nothing here touches the network: every command runs with sockets forbidden, and where the system allows it, in a space without a network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qwen2_local import backends
from qwen2_local.store import guide_folder
from tests.support.program import command

FORBID = """
import os, sys
def forbid(event, arguments):
    if event.startswith("socket.") and not event.startswith("socket.gethostname"):
        os.write(2, f"NETWORK: {event} {arguments}\\n".encode())
        raise OSError("no network")
sys.addaudithook(forbid)
"""
"""Python's own audit events: nothing in the interpreter makes a socket without one. Child processes get it too."""


@pytest.fixture(scope="module")
def without_network() -> list[str]:
    """What to put before a command, so that it has no network at all; nothing where this system does not allow that."""
    for prefix in (["unshare", "--net"], ["unshare", "--user", "--map-root-user", "--net"]):
        if shutil.which("unshare") and subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode == 0:
            return prefix
    return []


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """An empty home, so that everything done on a first use is done, and the hook."""
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(FORBID)
    return {**os.environ, "QWEN2_LOCAL_HOME": str(tmp_path / "home"), "PYTHONPATH": str(tmp_path / "hook")}


def offline(prefix: list[str], environment: dict[str, str], *arguments: str | Path) -> str:
    line = [*prefix, *command(*arguments)]
    done = subprocess.run(line, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False)
    assert "NETWORK" not in done.stderr, done.stderr
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_hook_works(environment: dict[str, str]) -> None:
    for code in ("import socket; socket.socket()", "import socket; socket.getaddrinfo('localhost', 80)"):
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
        assert "NETWORK" in done.stderr
        assert done.returncode != 0


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param(name, marks=pytest.mark.skipif(name not in backends.available(), reason=f"{name} is not installed here"))
        for name in backends.NAMES
    ],
)
def test_the_first_run_answers_offline(backend: str, without_network: list[str], environment: dict[str, str]) -> None:
    said = offline(without_network, environment, "run", "guide", "What is GGUF?", "--backend", backend, "--max-tokens", "3", "--json")
    assert json.loads(said)["usage"]["completion_tokens"] > 0


def test_the_other_commands_work_offline(without_network: list[str], environment: dict[str, str], tmp_path: Path) -> None:
    assert "guide" in offline(without_network, environment, "ls")
    assert "qwen2" in offline(without_network, environment, "show", "guide")
    offline(without_network, environment, "convert", guide_folder(), "--to", "gguf:q8_0", "-o", tmp_path / "guide.gguf")
    assert "llama.cpp" in offline(without_network, environment, "doctor")

"""Which backends there are, which is the default, and what is said where one is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from qwen2_local import backends
from qwen2_local.backends.base import Layout, LoadOptions
from qwen2_local.errors import BackendUnavailable

LAYOUT, OPTIONS = Layout(1, 16), LoadOptions("", 16)


@pytest.mark.parametrize(
    ("system", "machine", "installed", "expected"),
    [
        ("darwin", "arm64", ("mlx", "llama.cpp"), "mlx"),
        ("darwin", "arm64", ("llama.cpp",), "llama.cpp"),
        ("darwin", "x86_64", ("mlx", "llama.cpp"), "llama.cpp"),
        ("linux", "x86_64", ("mlx", "llama.cpp"), "llama.cpp"),
        ("linux", "aarch64", ("mlx",), "mlx"),
        ("linux", "x86_64", ("third",), "third"),
    ],
)
def test_the_default(monkeypatch: pytest.MonkeyPatch, system: str, machine: str, installed: tuple[str, ...], expected: str) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(backends, "available", lambda: installed)
    assert backends.default_backend() == expected


def test_none_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "available", tuple)
    with pytest.raises(BackendUnavailable, match="uv sync"):
        backends.default_backend()
    for name in backends.NAMES:
        with pytest.raises(BackendUnavailable, match="uv sync"):
            backends.load(name, Path("model"), layout=LAYOUT, options=OPTIONS)


def test_an_unknown_name() -> None:
    with pytest.raises(BackendUnavailable, match=r"mlx, llama\.cpp"):
        backends.load("torch", Path("model"), layout=LAYOUT, options=OPTIONS)


def test_looking_imports_no_library() -> None:
    code = "import sys; from qwen2_local import backends; backends.available(); sys.exit(bool({'llama_cpp', 'mlx'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_whole_binding_can_be_imported_beside_ours() -> None:
    pytest.importorskip("llama_cpp")
    code = """
from qwen2_local.backends import llamalib
ours = llamalib.library()
import llama_cpp
assert llama_cpp.Llama and llama_cpp.llama_cpp is ours
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

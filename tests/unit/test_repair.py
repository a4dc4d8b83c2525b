"""The command that repairs an installation fits how it was installed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from qwen2_local import repair


def test_in_a_clone_the_set_up_repairs() -> None:
    assert "scripts/start.py" in repair.rebuild()
    assert ".venv/bin/uv sync" in repair.reinstall("llama-cpp-python")


def test_elsewhere_the_pip_of_this_very_python_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(repair, "_CLONE", tmp_path)
    assert repair.rebuild().startswith(f"{sys.executable} -m pip install")
    assert repair.reinstall("llama-cpp-python") == f"{sys.executable} -m pip install 'llama-cpp-python'"


def test_mlx_on_linux_needs_its_cpu_variant(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    assert repair.reinstall("mlx").endswith("uv sync --inexact --extra mlx")
    monkeypatch.setattr(repair, "_CLONE", tmp_path)
    assert repair.reinstall("mlx").endswith("install 'mlx[cpu]'")


def test_a_path_with_spaces_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clone = tmp_path / "my clone"
    (clone / "scripts").mkdir(parents=True)
    (clone / "scripts" / "start.py").touch()
    monkeypatch.setattr(repair, "_CLONE", clone)
    assert f"cd '{clone}'" in repair.rebuild()

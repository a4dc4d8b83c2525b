"""The wheel: what is in it, and that it runs where nothing of this checkout is."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from pathlib import Path

import pytest

from qwen2_local import __version__

ROOT = Path(__file__).parents[2]
FOLDERS = ("qwen2_local", "converters/qwen2_converters", "tui/qwen2_tui")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built by hatchling itself, without the isolation that would fetch it again: no network."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)], cwd=ROOT, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts' folder of a fresh environment with the wheel in it.

    Its dependencies are borrowed through a .pth from the environment that runs the tests: building llama.cpp again takes minutes. An
    editable install there stays out of it, as a .pth in a borrowed folder is not followed.
    """
    pytest.importorskip("ensurepip")
    folder = tmp_path_factory.mktemp("installed") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, capture_output=True)
    python = folder / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(pip, check=True, capture_output=True, cwd=folder)
    (packages,) = (folder / "lib").glob("python*/site-packages")
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def sources() -> Iterator[str]:
    """Every file of the three packages that git would keep, as it is named in the wheel."""
    said = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *FOLDERS], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for line in said.stdout.splitlines():
        if (ROOT / line).exists():
            yield line.removeprefix("converters/").removeprefix("tui/")


def test_it_holds_the_three_packages_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    metadata = f"qwen2_local-{__version__}.dist-info/"
    assert sorted(name for name in names if not name.startswith(metadata)) == sorted(sources())
    extra = {name.removeprefix(metadata) for name in names if name.startswith(metadata)}
    assert extra == {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"}


def test_it_is_typed_and_small(wheel: Path) -> None:
    assert {f"{package}/py.typed" for package in ("qwen2_local", "qwen2_converters", "qwen2_tui")} <= set(zipfile.ZipFile(wheel).namelist())
    assert wheel.stat().st_size < 20_000_000  # the guide is most of it


def test_its_metadata(wheel: Path) -> None:
    metadata = Parser().parsestr(zipfile.ZipFile(wheel).read(f"qwen2_local-{__version__}.dist-info/METADATA").decode())
    assert metadata["Version"] == __version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert len(str(metadata.get_payload())) > 1000  # the README


def run(installed: Path, folder: Path, *command: str) -> str:
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | {"QWEN2_LOCAL_HOME": str(folder / "home")}
    done = subprocess.run([str(installed / command[0]), *command[1:]], cwd=folder, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["qwen2-local", "qwen2"])
def test_its_commands_run(installed: Path, tmp_path: Path, name: str) -> None:
    assert run(installed, tmp_path, name, "--version").split() == ["qwen2-local,", "version", __version__]
    assert "doctor" in run(installed, tmp_path, name, "--help")


def test_it_is_imported_from_where_it_was_installed(installed: Path, tmp_path: Path) -> None:
    code = "import qwen2_local, qwen2_converters, qwen2_tui, qwen2_local.model as m; print(qwen2_converters.__file__, qwen2_tui.__file__, m.__file__)"
    files = run(installed, tmp_path, "python", "-c", code).split()
    assert all(Path(file).is_relative_to(installed.parent) for file in files), files

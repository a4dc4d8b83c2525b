"""Homes that are missing, are no folder, cannot be written or are full: the guide still answers, with one warning; what must write says so."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.program import command

Runner = Callable[..., subprocess.CompletedProcess[str]]
ASK = ("run", "guide", "What is GGUF?", "--max-tokens", "3")


@pytest.fixture
def temporary(tmp_path: Path) -> Path:
    folder = tmp_path / "tmp"
    folder.mkdir()
    return folder


@pytest.fixture
def call(tmp_path: Path, temporary: Path) -> Runner:
    """Runs the program in the home `tmp_path / "home"`, after the shell line `first` in a mount space of its own."""

    def call(*arguments: str, home: Path | None = None, first: str = "", before: str = "") -> subprocess.CompletedProcess[str]:
        line: list[str | bytes | Path] = command(*arguments, before=before)
        if first:
            line = ["unshare", "--mount", "sh", "-ec", f'{first}; exec "$@"', "sh", *line]
        environment = {**os.environ, "QWEN2_LOCAL_HOME": str(home or tmp_path / "home"), "TMPDIR": str(temporary)}
        done = subprocess.run(line, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False)
        assert "Traceback" not in done.stderr
        assert "bug" not in done.stderr
        return done

    return call


def works_with_a_warning(done: subprocess.CompletedProcess[str], temporary: Path) -> None:
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("note: ")
    assert "QWEN2_LOCAL_HOME" in done.stderr
    assert list(temporary.iterdir()) == [], "what was made for this run is gone"


def can_mount() -> bool:
    if os.geteuid() != 0 or not shutil.which("unshare"):
        return False
    return subprocess.run(["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, check=False).returncode == 0


needs_mounts = pytest.mark.skipif(not can_mount(), reason="only root can mount file systems for a test")


def test_a_missing_home_is_made(call: Runner, tmp_path: Path) -> None:
    home = tmp_path / "not" / "yet" / "there"
    done = call(*ASK, home=home)
    assert (done.returncode, done.stderr) == (0, "")
    assert home.stat().st_mode & 0o777 == 0o700
    assert (home / "cache" / "converted").is_dir()


@pytest.mark.parametrize("below", [False, True])
def test_a_file_in_the_place_of_the_home(call: Runner, tmp_path: Path, temporary: Path, below: bool) -> None:
    (tmp_path / "home").write_text("mine")
    home = tmp_path / "home" / "below" if below else tmp_path / "home"
    works_with_a_warning(call(*ASK, home=home), temporary)
    assert call("ls", home=home).stdout.count("\n") == 2
    assert call("show", "guide", home=home).returncode == 0
    assert (tmp_path / "home").read_text() == "mine"


def test_a_large_model_is_not_converted_for_one_run(call: Runner, tmp_path: Path, temporary: Path) -> None:
    (tmp_path / "home").write_text("mine")
    done = call(*ASK, before="import qwen2_local.loading as loading; loading._SMALL = 1_000_000")
    assert (done.returncode, done.stdout) == (2, "")
    assert "QWEN2_LOCAL_HOME" in done.stderr
    assert "qwen2-local convert" in done.stderr
    assert list(temporary.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_home_without_permission(call: Runner, tmp_path: Path, temporary: Path) -> None:
    (tmp_path / "home").mkdir(mode=0o500)
    works_with_a_warning(call(*ASK), temporary)


@needs_mounts
def test_a_read_only_home(call: Runner, tmp_path: Path, temporary: Path) -> None:
    (tmp_path / "home").mkdir()
    works_with_a_warning(call(*ASK, first=f"mount -t tmpfs -o ro tmpfs '{tmp_path}/home'"), temporary)


@needs_mounts
def test_a_home_that_has_become_read_only_serves_what_it_has(call: Runner, tmp_path: Path) -> None:
    home = tmp_path / "home"
    before = call(*ASK)
    done = call(*ASK, first=f"mount --bind '{home}' '{home}'; mount -o remount,ro,bind '{home}'")
    assert (done.returncode, done.stdout, done.stderr) == (0, before.stdout, "")


@needs_mounts
def test_a_full_home(call: Runner, tmp_path: Path, temporary: Path) -> None:
    (tmp_path / "home").mkdir()
    fill = f"mount -t tmpfs -o size=64k tmpfs '{tmp_path}/home'; head -c 200000 /dev/zero >'{tmp_path}/home/mine' 2>&- || true"
    works_with_a_warning(call(*ASK, first=fill), temporary)


@needs_mounts
def test_no_room_anywhere(call: Runner, tmp_path: Path, temporary: Path) -> None:
    (tmp_path / "home").write_text("mine")
    done = call(*ASK, first=f"mount -t tmpfs -o size=1m tmpfs '{temporary}'")
    assert (done.returncode, done.stdout) == (5, "")
    assert done.stderr.startswith("error: ")
    assert "GB" in done.stderr


@needs_mounts
def test_what_must_write_says_that_it_cannot(call: Runner, tmp_path: Path) -> None:
    from qwen2_local.store import Store
    from tests.support.installed import install

    models = tmp_path / "home" / "models"
    models.mkdir(parents=True)
    install(Store(models), "0.5b:q4_0")
    home = tmp_path / "home"
    read_only = f"mount --bind '{home}' '{home}'; mount -o remount,ro,bind '{home}'"
    done = call("rm", "0.5b:q4_0", "--yes", first=read_only)
    assert done.returncode == 2
    assert "cannot be written" in done.stderr
    assert "0.5b:q4_0" in call("ls", first=read_only).stdout
    made = call("convert", "guide-folder-that-is-not-there", "--to", "gguf:f16", "-o", str(home / "x.gguf"), first=read_only)
    assert made.returncode in (2, 3)


@needs_mounts
def test_a_conversion_to_where_nothing_can_be_written(call: Runner, tmp_path: Path) -> None:
    from qwen2_local.store import guide_folder

    folder = tmp_path / "target"
    folder.mkdir()
    arguments = ("convert", str(guide_folder()), "--to", "gguf:f16", "-o", str(folder / "x.gguf"))
    done = call(*arguments, first=f"mount -t tmpfs -o ro tmpfs '{folder}'")
    assert done.returncode == 2
    assert "Read-only" in done.stderr
    done = call(*arguments, first=f"mount -t tmpfs -o size=1m tmpfs '{folder}'")
    assert done.returncode == 5
    assert "GB" in done.stderr

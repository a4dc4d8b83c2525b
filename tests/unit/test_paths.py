import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from qwen2_local import paths


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_home_is_the_environment_s_choice_and_private(tmp_path, monkeypatch):
    monkeypatch.setenv("QWEN2_LOCAL_HOME", str(tmp_path / "mine"))
    assert paths.home() == tmp_path / "mine"
    assert mode(paths.home()) == 0o700
    for folder in (paths.models(), paths.cache(), paths.logs()):
        assert folder.parent == paths.home()
        assert mode(folder) == 0o700


@pytest.mark.skipif(sys.platform != "linux", reason="XDG folders")
def test_without_it_home_is_the_platform_s_data_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("QWEN2_LOCAL_HOME", "")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert paths.home() == tmp_path / "qwen2-local"


def test_a_relative_home_is_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QWEN2_LOCAL_HOME", "here")
    assert paths.home() == tmp_path / "here"


def test_a_home_that_cannot_be_made_is_told_not_raised(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QWEN2_LOCAL_HOME", str(tmp_path / "file" / "home"))
    assert not paths.writable(paths.models())
    monkeypatch.setenv("QWEN2_LOCAL_HOME", str(tmp_path / "good"))
    assert paths.writable(paths.models())


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_home_is_not_writable(tmp_path, monkeypatch):
    monkeypatch.setenv("QWEN2_LOCAL_HOME", str(tmp_path))
    tmp_path.chmod(0o500)
    try:
        assert not paths.writable(paths.home())
    finally:
        tmp_path.chmod(0o700)


def test_import_reads_and_makes_nothing(tmp_path):
    code = "import qwen2_local.paths, sys; assert 'platformdirs' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "QWEN2_LOCAL_HOME": str(tmp_path / "none")})
    assert not (tmp_path / "none").exists()

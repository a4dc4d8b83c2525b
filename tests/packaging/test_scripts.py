"""scripts/start.py and its set-up, with stand-ins for uv and pip: what it runs, what it says, and when it runs nothing; what check.py runs."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


environment = load("environment")

FAKE_UV = """#!/bin/sh
test "$1" = --version && exit 0
echo "$UV_PROJECT_ENVIRONMENT $VIRTUAL_ENV|$*" >> "$UV_PROJECT_ENVIRONMENT/calls"
if test -n "$FAKE_UV_FAULT"; then
  case "$*" in
    *--no-install-package*) ;;
    *) echo "$FAKE_UV_FAULT"; exit 1;;
  esac
fi
printf '#!/bin/sh\\necho "started $*"\\n' > "$UV_PROJECT_ENVIRONMENT/bin/qwen2-local"
chmod +x "$UV_PROJECT_ENVIRONMENT/bin/qwen2-local"
"""

BUILD_FAULT = "  x Failed to build `llama-cpp-python==0.3.36`\n  CMake Error: No CMAKE_CXX_COMPILER could be found."


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with an environment that has a Python and a stand-in for uv."""
    binaries = tmp_path / ".venv" / "bin"
    binaries.mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    (binaries / "python").symlink_to(sys.executable)
    (binaries / "uv").write_text(FAKE_UV)
    (binaries / "uv").chmod(0o755)
    monkeypatch.setenv("VIRTUAL_ENV", "/elsewhere")
    monkeypatch.delenv("FAKE_UV_FAULT", raising=False)
    return tmp_path


def calls(checkout: Path) -> list[str]:
    return (checkout / ".venv" / "calls").read_text().splitlines()


def test_set_up_once(checkout: Path) -> None:
    place = environment.Environment(checkout)
    assert not place.ready()
    place.set_up()
    assert place.ready()
    place.set_up()
    (call,) = calls(checkout)
    folder = checkout / ".venv"
    assert call == f"{folder} |sync --project {checkout} --python {folder}/bin/python --inexact --no-dev"
    assert "sync" in (folder / "set-up.log").read_text()


def test_again_when_the_project_changes(checkout: Path) -> None:
    place = environment.Environment(checkout)
    place.set_up()
    (checkout / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    assert not place.ready()
    place.set_up()
    assert len(calls(checkout)) == 2


def test_the_tests_needs_stay(checkout: Path) -> None:
    place = environment.Environment(checkout)
    place.set_up()
    assert not place.ready(dev=True)
    place.set_up(dev=True)
    assert place.ready(dev=True) and place.ready()
    (checkout / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    place.set_up()
    assert place.ready(dev=True)
    assert ["--extra mlx" in call for call in calls(checkout)] == [False, True, True]


@pytest.mark.parametrize("stamp", ["", "{", "[]", '{"pyproject": 1}'])
def test_a_broken_stamp_is_none(checkout: Path, stamp: str) -> None:
    place = environment.Environment(checkout)
    place.set_up()
    (checkout / ".venv" / "set-up.json").write_text(stamp)
    assert not place.ready()


def test_a_python_that_went_away_means_a_new_environment(checkout: Path) -> None:
    place = environment.Environment(checkout)
    place.set_up()
    (checkout / ".venv/bin/python").unlink()
    (checkout / ".venv/bin/python").symlink_to("/nowhere/python3.11")
    assert not place.ready()
    place._make_folder()
    assert not (checkout / ".venv" / "calls").exists()  # cleared
    assert subprocess.run([str(place.python), "-c", "pass"], check=False).returncode == 0


def test_no_compiler_is_said_plainly(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_UV_FAULT", BUILD_FAULT)
    monkeypatch.setattr(environment, "compiler", lambda: "")
    monkeypatch.setattr(environment.platform, "machine", lambda: "x86_64")
    with pytest.raises(environment.SetupError, match=r"apt install g\+\+"):
        environment.Environment(checkout).set_up()


def test_where_mlx_serves_it_goes_on_without_llama_cpp(checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FAKE_UV_FAULT", BUILD_FAULT)
    monkeypatch.setattr(environment, "compiler", lambda: "")
    place = environment.Environment(checkout)
    place.set_up(dev=True)
    assert calls(checkout)[-1].endswith("--no-install-package llama-cpp-python")
    assert "no GGUF files" in capsys.readouterr().err
    assert place.ready(dev=True)
    # A compiler was installed: worth another try.
    monkeypatch.setattr(environment, "compiler", lambda: "/usr/bin/c++")
    assert not place.ready(dev=True)


def test_a_fault_of_the_build_itself_is_shown(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_UV_FAULT", BUILD_FAULT)
    monkeypatch.setattr(environment, "compiler", lambda: "/usr/bin/c++")
    monkeypatch.setattr(environment.platform, "machine", lambda: "x86_64")
    with pytest.raises(environment.SetupError, match=r"CMake Error.*[\s\S]*set-up\.log"):
        environment.Environment(checkout).set_up()


def test_other_faults_of_uv_are_no_fault_of_a_compiler(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_UV_FAULT", "error: Request failed: dns error")
    place = environment.Environment(checkout)
    with pytest.raises(environment.SetupError, match="dns error"):
        place.set_up(dev=True)
    assert not place.ready()


def test_certificates_that_only_the_system_knows(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UV_SYSTEM_CERTS", "")  # so that it is as before afterwards
    monkeypatch.setenv("FAKE_UV_FAULT", "cause: invalid peer certificate: UnknownIssuer")
    (checkout / ".venv/bin/uv").write_text(FAKE_UV.replace('test -n "$FAKE_UV_FAULT"', 'test -z "$UV_SYSTEM_CERTS"'))
    environment.Environment(checkout).set_up()
    assert len(calls(checkout)) == 2


def pips(monkeypatch: pytest.MonkeyPatch, inside: bool, outside: bool) -> list[tuple[str, ...]]:
    """Stand-ins for pip; gives the steps that are run."""
    steps: list[tuple[str, ...]] = []

    def works(*command: str) -> bool:
        return {"uv": False, "python": inside}.get(Path(command[0]).name, outside) if command[0] != sys.executable else outside

    def step(self: object, what: str, *command: str) -> tuple[int, str]:
        steps.append(command)
        return 0, ""

    monkeypatch.setattr(environment, "_works", works)
    monkeypatch.setattr(environment.Environment, "_run", step)
    return steps


def test_uv_comes_from_the_environments_pip(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = pips(monkeypatch, inside=True, outside=True)
    place = environment.Environment(checkout)
    place._install_uv()
    assert steps == [(str(place.python), "-m", "pip", "install", environment.UV)]


def test_or_from_the_systems_pip(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = pips(monkeypatch, inside=False, outside=True)
    place = environment.Environment(checkout)
    place._install_uv()
    assert steps == [(sys.executable, "-m", "pip", "--python", str(place.python), "install", environment.UV)]


def test_or_it_says_what_to_install(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pips(monkeypatch, inside=False, outside=False)
    with pytest.raises(environment.SetupError, match="apt install python3-venv"):
        environment.Environment(checkout)._install_uv()


def test_without_ensurepip_the_environment_is_made_without_pip(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = pips(monkeypatch, inside=False, outside=True)
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: None)
    environment.Environment(checkout)._make_folder()
    assert [step[1:5] for step in steps] == [("-m", "venv", "--clear", "--without-pip")]


def test_an_old_python_gives_way_to_a_newer_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    became: list[tuple[str, list[str]]] = []
    newer = tmp_path / "python3.12"
    newer.write_text("#!/bin/sh\n")
    newer.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(environment.os, "execv", lambda path, arguments: became.append((path, arguments)))
    monkeypatch.setattr(environment.sys, "version_info", (3, 9))
    with pytest.raises(environment.SetupError):  # only because the stand-in for execv returns
        environment.newer_python()
    assert became == [(str(newer), [str(newer), *sys.argv])]


def clone_of_scripts(checkout: Path) -> Path:
    folder = checkout / "scripts"
    folder.mkdir()
    for name in ("start.py", "environment.py"):
        (folder / name).write_text((ROOT / "scripts" / name).read_text("utf-8"), "utf-8")
    return folder / "start.py"


def test_start_becomes_the_program(checkout: Path) -> None:
    start = clone_of_scripts(checkout)
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, str(start), "run", "guide", "a b"], capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL
        )
        assert done.stdout == "started run guide a b\n"
    assert done.stderr == ""  # set up: nothing to say
    assert len(calls(checkout)) == 1


def test_start_is_quick_once_set_up(checkout: Path) -> None:
    start = clone_of_scripts(checkout)
    times, computed = [], []
    for _ in range(6):
        started, before = time.monotonic(), os.times()
        subprocess.run([sys.executable, str(start)], capture_output=True, check=True)
        after = os.times()
        times.append(time.monotonic() - started)
        computed.append(after.children_user + after.children_system - before.children_user - before.children_system)
    # 0.1 s where nothing else runs; other tests may hold the processors, but it computes no longer for that.
    assert min(computed[1:]) < 0.3
    assert min(times[1:]) < 3


def test_start_ends_with_one_message(checkout: Path) -> None:
    start = clone_of_scripts(checkout)
    variables = {**os.environ, "FAKE_UV_FAULT": "error: no network"}
    done = subprocess.run([sys.executable, str(start)], capture_output=True, text=True, check=False, env=variables)
    assert done.returncode == 1
    assert done.stdout == "" and "no network" in done.stderr and "Traceback" not in done.stderr


def test_two_at_once_set_up_once(checkout: Path) -> None:
    start = clone_of_scripts(checkout)
    both = [subprocess.Popen([sys.executable, str(start)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [process.communicate()[0] for process in both] == [b"started \n"] * 2
    assert len(calls(checkout)) == 1


def test_the_stamp_is_whole_or_not_there(checkout: Path) -> None:
    environment.Environment(checkout).set_up()
    assert json.loads((checkout / ".venv/set-up.json").read_text())["dev"] is False
    assert not (checkout / ".venv/set-up.new").exists()


@pytest.mark.parametrize(("cores", "processes"), [(1, 1), (2, 2), (3, 3), (16, 4)])
def test_the_tests_run_in_as_many_processes_as_there_are_cores(monkeypatch: pytest.MonkeyPatch, cores: int, processes: int) -> None:
    monkeypatch.setitem(sys.modules, "environment", environment)
    check = load("check")
    monkeypatch.setattr(check.os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setattr(check.os, "cpu_count", lambda: 64)
    names, commands = zip(*check.steps(check.workers()), strict=True)
    assert names == ("ruff check", "ruff format", "mypy", "pytest")
    several = ["-n", str(processes), "--dist", "worksteal"] if processes > 1 else []
    assert commands[-1] == ["pytest", "--durations=10", *several]


def test_libraries_have_upper_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert [line for line in project["project"]["dependencies"] if "<" not in line] == []
    assert project["tool"]["uv"]["constraint-dependencies"]
    assert "llama-cpp-python" in project["tool"]["uv"]["config-settings-package"]
    assert project["tool"]["uv"]["compile-bytecode"] is True


def test_no_file_names_a_registry_or_this_machine() -> None:
    # Put together here, so that this file does not find itself. A lock file would name registries, so none is kept.
    hosts = ["py" + "pi.org", "python" + "hosted.org", "/simple" + "/"]
    here = [f"{ROOT}/", f"{Path.home()}/", f"{sys.base_prefix}/"]
    patterns = [part for text in (*hosts, *(place for place in here if place.count("/") > 1 and place != "/usr/")) for part in ("-e", text)]
    found = subprocess.run(["git", "grep", "-I", "-n", "-F", *patterns], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (1, "")
    assert not subprocess.run(["git", "ls-files", "uv.lock"], cwd=ROOT, capture_output=True, text=True, check=True).stdout

"""A llama.cpp whose fast matrix code really crashes, by a preloaded library that takes its place: the program answers without it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qwen2_local.backends import llamalib, tinygguf

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("g++") or not shutil.which("nm"),
    reason="takes over functions by LD_PRELOAD, compiled with g++: needs Linux, g++ and nm",
)

FAST_KERNELS = r"ggml_gem[mv]_\w+|\w*ggml_backend_amx_mul_mat\w*"
EVERYTHING = r"ggml_backend_sched_graph_compute_async"
ANSWER = """
import sys
from pathlib import Path
from qwen2_local import backends
from qwen2_local.backends.base import Choice, Layout, LoadOptions, Row
from qwen2_local.errors import Qwen2LocalError
try:
    model = backends.load("llama.cpp", Path(sys.argv[1]), layout=Layout(1, 64), options=LoadOptions("", 64))
except Qwen2LocalError as error:
    sys.exit(f"{type(error).__name__}: {error}")
print(model.step([Row(model.open(), range(40), (Choice(320),))])[0].chosen[0].token)
for note in model.info.notes:
    print(note)
"""


def exported(pattern: str) -> list[str]:
    library = llamalib.folder() / "lib"
    names = set()
    for part in ("libggml-cpu.so", "libggml-base.so"):
        listed = subprocess.run(["nm", "-D", "--defined-only", library / part], capture_output=True, text=True, check=True).stdout
        names |= {name for kind, name in re.findall(r"^\w+ (\w) (\S+)$", listed, re.MULTILINE) if kind == "T" and re.fullmatch(pattern, name)}
    assert names
    return sorted(names)


def saboteur(folder: Path, pattern: str, deed: str) -> Path:
    """A library that has these functions, each of which does `deed`."""
    source, library = folder / "saboteur.cpp", folder / "saboteur.so"
    lines = [f'extern "C" void f{i}() __asm__("{name}"); void f{i}() {{ {deed} }}' for i, name in enumerate(exported(pattern))]
    source.write_text("\n".join(["#include <csignal>", "#include <cstdlib>", *lines]))
    subprocess.run(["g++", "-shared", "-fPIC", "-o", library, source], check=True)
    return library


def answer(model: Path, home: Path, library: Path | None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "QWEN2_LOCAL_HOME": str(home)}
    if library:
        environment["LD_PRELOAD"] = str(library)
    return subprocess.run([sys.executable, "-c", ANSWER, model], env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    tinygguf.write(path)
    return path


@pytest.fixture(scope="module")
def right(model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    ran = answer(model, tmp_path_factory.mktemp("home"), None)
    assert (ran.returncode, ran.stderr) == (0, "")
    return ran.stdout.strip()


@pytest.mark.parametrize(
    ("deed", "how"),
    [("raise(SIGSEGV);", "crashed"), ("raise(SIGILL);", "crashed"), ("abort();", "crashed"), ("", "gave wrong numbers")],
)
def test_without_its_fast_code_it_answers_and_says_so(tmp_path: Path, model: Path, right: str, deed: str, how: str) -> None:
    library = saboteur(tmp_path, FAST_KERNELS, deed)
    ran = answer(model, tmp_path / "home", library)
    assert ran.returncode == 0, ran.stderr
    token, *notes = ran.stdout.splitlines()
    assert token == right
    assert len(notes) == 1
    assert how in notes[0]
    assert "doctor" in notes[0]
    assert ran.stderr == ""

    kept = json.loads((tmp_path / "home" / "selftest.json").read_text())
    assert kept["safe"] is True
    assert answer(model, tmp_path / "home", library).stdout == ran.stdout


def test_where_everything_crashes_it_says_by_what(tmp_path: Path, model: Path) -> None:
    ran = answer(model, tmp_path / "home", saboteur(tmp_path, EVERYTHING, "raise(SIGSEGV);"))
    assert ran.returncode == 1
    assert "BackendUnavailable" in ran.stderr
    assert "SIGSEGV" in ran.stderr
    assert not (tmp_path / "home" / "selftest.json").exists()


def test_a_killed_test_is_no_verdict(tmp_path: Path, model: Path, right: str) -> None:
    ran = answer(model, tmp_path / "home", saboteur(tmp_path, FAST_KERNELS, "raise(SIGKILL);"))
    assert ran.stdout.splitlines()[0] == right
    assert not (tmp_path / "home" / "selftest.json").exists()

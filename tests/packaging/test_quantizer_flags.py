"""ggml's quantizers are built for this CPU, as its arithmetic is. The setting in pyproject.toml reaches their C files alone and changes no byte."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import subprocess
import tomllib
from pathlib import Path

import numpy as np
import pytest

from qwen2_converters import ggml
from qwen2_local.formats.ggml_types import BY_NAME

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
FLAGS = {"-march=native", "-ffp-contract=off", "-fno-trapping-math"}

# As in ggml: a list of its own flags after the user's, given as compile options for C. @CPU@: what its CPU library is built with.
CMAKE = """
cmake_minimum_required(VERSION 3.14)
project(flags C CXX)
list(APPEND C_FLAGS -Wshadow)
add_compile_options("$<$<COMPILE_LANGUAGE:C>:${C_FLAGS};>")
add_library(ggml-base SHARED part.c part.cpp)
add_library(ggml-cpu SHARED part.c part.cpp)
target_compile_options(ggml-cpu PRIVATE -O3 @CPU@)
add_library(llama SHARED part.c part.cpp)
"""

# Of `rows()`, quantized by llama.cpp 0.3.36 as `pip install` builds it with GCC 12 on x86-64.
DIGESTS = {
    "Q2_K": "eac7c4f54a35f4ed",
    "Q3_K": "14e8f6d201404625",
    "Q4_0": "977d0ada2dd7f5a2",
    "Q4_1": "9109e327d2cd38d4",
    "Q4_K": "4afa2e4d18aa05a4",
    "Q5_0": "b7ab2bb815bcab43",
    "Q5_1": "7f302dfadf16e74b",
    "Q5_K": "8449f1d83b440c41",
    "Q6_K": "c52c23cf5351698d",
    "Q8_0": "7fbc96465fb71803",
    "IQ4_NL": "67f91f4b9b358cfc",
    "IQ4_XS": "93d3dd25ed9b50a8",
}


def commands(folder: Path, cpu: str) -> dict[str, set[str]]:
    """The flags of each object file, as CMake would call the compiler."""
    setting = tomllib.loads(PYPROJECT.read_text("utf-8"))["tool"]["uv"]["config-settings-package"]["llama-cpp-python"]["cmake.define.C_FLAGS"]
    (folder / "CMakeLists.txt").write_text(CMAKE.replace("@CPU@", cpu))
    for name in ("part.c", "part.cpp"):
        (folder / name).write_text("int part;\n")
    configure = ["cmake", "-S", folder, "-B", folder / "build", "-G", "Unix Makefiles", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON", f"-DC_FLAGS={setting}"]
    ran = subprocess.run(configure, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    listed = json.loads((folder / "build" / "compile_commands.json").read_text())
    calls = [entry["command"].split() for entry in listed]
    return {call[call.index("-o") + 1].removeprefix("CMakeFiles/").removesuffix(".o"): set(call) for call in calls}


needs_cmake = pytest.mark.skipif(not shutil.which("cmake") or platform.system() != "Linux", reason="needs cmake, and GCC or clang")


@needs_cmake
def test_the_quantizers_alone_get_the_flags(tmp_path: Path) -> None:
    built = commands(tmp_path, "-march=native")
    assert {name for name, flags in built.items() if "-ffp-contract=off" in flags} == {"ggml-base.dir/part.c"}
    assert built["ggml-base.dir/part.c"] >= {*FLAGS, "-Wshadow"}
    assert not FLAGS & (built["llama.dir/part.c"] | built["ggml-base.dir/part.cpp"])


@needs_cmake
@pytest.mark.parametrize("cpu", ["-mcpu=native", "-msse4.2"])
def test_not_on_other_processors_nor_in_a_portable_build(tmp_path: Path, cpu: str) -> None:
    assert not any(FLAGS & flags for flags in commands(tmp_path, cpu).values())


def rows() -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """256 wide: of all sizes, tiny and denormal, on a grid, sparse, constant, zeros of both signs."""
    random = np.random.default_rng(0)
    plain = random.integers(-(2**23), 2**23, (64, 256)).astype(np.float32) / np.float32(2**23)
    kinds = [plain * np.float32(size) for size in (0.02, 1, 6e3, 1e-6, 1e-38, 1e-42)]
    kinds += [np.abs(plain), -np.abs(plain), np.where(np.abs(plain) < 0.9, 0, plain), np.round(plain * 8) / 8, np.copysign(0, plain)]
    kinds += [np.full_like(plain, 0.37), np.full_like(plain, -0.37)]
    return np.concatenate(kinds).astype(np.float32).reshape(-1)


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="other processors round otherwise")
@pytest.mark.parametrize("kind", DIGESTS)
def test_the_bytes_are_those_of_a_plain_build(kind: str) -> None:
    ggml.prepare(BY_NAME[kind])
    assert hashlib.sha256(ggml.quantize(rows(), 256, BY_NAME[kind]).tobytes()).hexdigest()[:16] == DIGESTS[kind]

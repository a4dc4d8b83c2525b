"""GCC before 13.2.1 removes most of an AMX tile configuration (llama.cpp#20824). The setting in pyproject.toml cures that, and suits clang too.

Seen in the assembly of ggml's own few lines, so no processor with AMX is needed. CMake evaluates the setting as it does in ggml's build.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="AMX is for x86-64"),
    pytest.mark.skipif(not shutil.which("cmake"), reason="cmake is not installed"),
]

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"

# As in ggml/src/ggml-cpu/amx/mmq.cpp.
SOURCE = """
#include <immintrin.h>
#include <cstdint>

struct tile_config_t {
    uint8_t palette_id = 0;
    uint8_t start_row = 0;
    uint8_t reserved_0[14] = {0};
    uint16_t colsb[16] = {0};
    uint8_t rows[16] = {0};
};

extern "C" void configure(void) {
    alignas(64) tile_config_t tc = {};
    tc.palette_id = 1;
    for (int i = 0; i < 8; ++i) {
        tc.rows[i] = i < 2 ? 8 : 16;
        tc.colsb[i] = 64;
    }
    _tile_loadconfig(&tc);
}
"""

# As in ggml: a list of its own flags after the user's, given as compile options for C++.
CMAKE = """
cmake_minimum_required(VERSION 3.14)
project(cure CXX)
list(APPEND CXX_FLAGS -Wmissing-declarations)
add_compile_options("$<$<COMPILE_LANGUAGE:CXX>:${CXX_FLAGS}>")
add_library(cure STATIC tiles.cpp)
target_compile_options(cure PRIVATE -O3 -march=sapphirerapids -save-temps=obj)
"""


def setting() -> str:
    return str(tomllib.loads(PYPROJECT.read_text("utf-8"))["tool"]["uv"]["config-settings-package"]["llama-cpp-python"]["cmake.define.CXX_FLAGS"])


def gcc_version() -> tuple[int, ...]:
    """Of a real g++ (on macOS that name is clang); (0,) if there is none."""
    if not shutil.which("g++"):
        return (0,)
    said = subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout
    version = subprocess.run(["g++", "-dumpfullversion"], capture_output=True, text=True, check=False).stdout.strip()
    return (0,) if "clang" in said else tuple(int(part) for part in re.findall(r"\d+", version))


def clang() -> str | None:
    found = shutil.which("clang++")
    return found or next((path for version in range(30, 11, -1) if (path := shutil.which(f"clang++-{version}"))), None)


def assembly(folder: Path, compiler: str, flags: str) -> str:
    """The assembly of `configure`, up to its ldtilecfg, as CMake and this compiler make it."""
    (folder / "tiles.cpp").write_text(SOURCE)
    (folder / "CMakeLists.txt").write_text(CMAKE)
    build = folder / "build"
    defines = [f"-DCMAKE_CXX_COMPILER={compiler}", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON", *([f"-DCXX_FLAGS={flags}"] if flags else [])]
    for command in (["cmake", "-S", folder, "-B", build, *defines], ["cmake", "--build", build]):
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stdout + ran.stderr
    (listing,) = build.rglob("*.s")
    return listing.read_text().split("configure:")[1].split("ldtilecfg")[0]


def stores(text: str) -> int:
    """How many instructions write to memory."""
    return len(re.findall(r"^\s+v?mov\w*\s+[$%][^,]+,\s*-?\d*\(%r[sb]p\)", text, re.MULTILINE))


needs_old_gcc = pytest.mark.skipif(not (0,) < gcc_version() < (13, 2, 1), reason="only GCC before 13.2.1 has this fault")


@needs_old_gcc
def test_without_the_setting_the_configuration_is_lost(tmp_path: Path) -> None:
    assert stores(assembly(tmp_path, "g++", "")) <= 2  # zeros, and the first byte


@needs_old_gcc
def test_with_the_setting_it_is_whole(tmp_path: Path) -> None:
    assert stores(assembly(tmp_path, "g++", setting())) >= 4  # zeros, the first byte, widths, rows


@pytest.mark.skipif(gcc_version() < (13, 2, 1), reason="no GCC of 13.2.1 or newer here")
def test_a_newer_gcc_needs_no_flags(tmp_path: Path) -> None:
    assert stores(assembly(tmp_path, "g++", setting())) >= 3
    assert "no-dse" not in (tmp_path / "build" / "compile_commands.json").read_text()


@pytest.mark.skipif(clang() is None, reason="clang++ is not installed")
def test_clang_takes_the_setting(tmp_path: Path) -> None:
    assert stores(assembly(tmp_path, clang() or "", setting())) >= 3

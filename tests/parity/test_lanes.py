"""The fast K-quantizers: ggml's own bytes, or ggml itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2_converters import ggml, lanes
from qwen2_converters.convert import convert
from qwen2_converters.target import Target
from qwen2_local import paths
from qwen2_local.formats.ggml_types import BY_NAME
from tests.support import tiny_checkpoint

Weights = npt.NDArray[np.float32]

pytestmark = pytest.mark.skipif(lanes._compiler() is None, reason="needs a C compiler")


@pytest.fixture(scope="module")
def kernels() -> Mapping[str, lanes.Kernel]:
    """Built in the home of this session."""
    for kind in lanes.KINDS:
        ggml.prepare(BY_NAME[kind])
    found = lanes.kernels()
    if not found:
        pytest.skip("this build of llama.cpp rounds otherwise")
    return found


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Of a fresh home; what this process knows of the library is forgotten."""
    monkeypatch.setenv("QWEN2_LOCAL_HOME", str(tmp_path / "home"))
    lanes._kernels.cache_clear()
    yield paths.cache()
    lanes._kernels.cache_clear()


def assert_same(kernels: Mapping[str, lanes.Kernel], weights: Weights, importance: Weights | None = None) -> None:
    columns = importance.size if importance is not None else 256
    for name, kernel in kernels.items():
        kind = BY_NAME[name]
        ours, theirs = (ggml.quantize(weights, columns, kind, importance, kernel=way) for way in (kernel, None))
        wrong = (ours != theirs).reshape(-1, kind.block_bytes).any(1).nonzero()[0]
        assert wrong.size == 0, (name, wrong, weights.reshape(-1, 256)[wrong[0]])


# The bytes


FINITE = st.floats(-65504, 65504, width=32, allow_nan=False)


@st.composite
def blocks(draw: st.DrawFn) -> Weights:
    """1 to 5 blocks, whose sub-blocks are each of few different weights, of any, or of random ones of one size."""
    parts: list[Weights] = []
    for _ in range(16 * draw(st.integers(1, 5))):
        shape = draw(st.sampled_from(["same", "few", "any", "size", "size", "narrow"]))
        random = np.random.default_rng(draw(st.integers(0, 2**32)))
        if shape == "any":
            part = np.array(draw(st.lists(FINITE, min_size=16, max_size=16)))
        elif shape in ("same", "few"):
            part = random.choice(draw(st.lists(FINITE, min_size=1, max_size=1 if shape == "same" else 4)), 16)
        else:
            part = random.normal(0, 10.0 ** draw(st.integers(-45, 3)), 16)
            if shape == "narrow":  # about a centre
                part = draw(FINITE) * (1 + part.clip(-1e-3, 1e-3))
        parts.append(np.clip(part, -65504, 65504).astype(np.float32))
    return np.concatenate(parts)


@given(weights=blocks())
@settings(max_examples=60, deadline=None)
def test_any_weights(kernels: Mapping[str, lanes.Kernel], weights: Weights) -> None:
    assert_same(kernels, weights)


@given(weights=blocks(), sizes=st.lists(st.one_of(st.just(0.0), st.floats(0, 2.0**66, width=32)), min_size=1, max_size=9))
@settings(max_examples=60, deadline=None)
def test_any_weights_of_any_importance(kernels: Mapping[str, lanes.Kernel], weights: Weights, sizes: list[float]) -> None:
    columns = weights.size if weights.size % 512 else weights.size // 2
    random = np.random.default_rng(len(sizes))
    importance = np.resize(np.array(sizes), columns) * random.uniform(0, 1, columns)
    assert_same(kernels, weights, importance.astype(np.float32))


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -1.0, 65504.0, -65504.0, 1e-15, -9.99e-16, 1e-38, -1e-42, 1.4e-45])
def test_constant_weights(kernels: Mapping[str, lanes.Kernel], value: float) -> None:
    assert_same(kernels, np.full(3 * 256, value, np.float32))


@pytest.mark.parametrize("seed", range(4))
def test_many_random_weights(kernels: Mapping[str, lanes.Kernel], seed: int) -> None:
    random = np.random.default_rng(seed)
    assert_same(kernels, random.normal(0, 0.02, 601 * 256).astype(np.float32))
    assert_same(kernels, random.normal(0, 0.02, 200 * 1280).astype(np.float32), (random.standard_normal(1280) ** 4).astype(np.float32))
    assert_same(kernels, np.clip(random.standard_t(1.5, 201 * 256), -65504, 65504).astype(np.float32))
    sizes = 10.0 ** random.integers(-44, 4, (201, 32))
    assert_same(kernels, (random.normal(0, 1, (201, 256)) * np.repeat(sizes, 8, 1)).astype(np.float32).reshape(-1))


def test_an_importance_that_makes_no_numbers_is_noticed(kernels: Mapping[str, lanes.Kernel]) -> None:
    weights, huge = np.random.default_rng(0).normal(0, 1, 512).astype(np.float32), np.full(256, 3e38, np.float32)
    for name in ("Q4_K", "Q5_K"):
        with pytest.raises(ValueError, match="no finite numbers"):
            ggml.quantize(weights, 256, BY_NAME[name], huge, kernel=kernels[name])


# Around it


def converted(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch, lanes_are: str) -> bytes:
    monkeypatch.setattr(lanes, "WORTH_IT", 0)
    monkeypatch.setenv("QWEN2_LOCAL_LANES", lanes_are)
    kind = name.partition(".")[0]
    return convert(folder, Target("gguf", kind), folder.parent / f"{name}-{lanes_are}.gguf").read_bytes()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_checkpoint.dense(hidden_size=256, intermediate_size=512)
    return tiny_checkpoint.write(tmp_path_factory.mktemp("lanes") / "hf", config, tiny_checkpoint.weights(config))


@pytest.mark.parametrize("kind", ["q4_k_m", "q5_k_m", "q6_k"])
def test_a_conversion_with_and_without(checkpoint: Path, kind: str, kernels: Mapping[str, lanes.Kernel], monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []
    real = ggml.quantize

    def watched(*given: object, kernel: lanes.Kernel | None = None) -> object:
        used.append("fast" if kernel else "ggml")
        return real(*given, kernel=kernel)

    monkeypatch.setattr(ggml, "quantize", watched)
    without = converted(checkpoint, kind, monkeypatch, "off")
    assert "fast" not in used
    assert converted(checkpoint, kind, monkeypatch, "on") == without
    assert "fast" in used


def test_a_small_conversion_builds_nothing(checkpoint: Path, cache: Path) -> None:
    convert(checkpoint, Target("gguf", "q4_k_m"), checkpoint.parent / "small.gguf")
    assert not list(cache.glob("lanes-*"))


def test_it_is_built_once_for_its_owner_alone(cache: Path, kernels: object, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(lanes.kernels()) == set(lanes.KINDS)
    (folder,) = cache.iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["lanes.so", "verdict.json"]
    assert {path.stat().st_mode & 0o077 for path in (folder, *folder.iterdir())} == {0}
    lanes._kernels.cache_clear()
    monkeypatch.setattr(lanes, "_build", None)
    assert set(lanes.kernels()) == set(lanes.KINDS)


BROKEN = {
    "no bytes": "",
    "wrong bytes": "memset(to, 1, blocks);",
    "a crash": "*(volatile int *)0 = 1;",
    "an abort": "__builtin_trap();",
}


@pytest.mark.parametrize("body", BROKEN.values(), ids=BROKEN.keys())
def test_a_miscompiled_kernel_is_never_used(body: str, cache: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    functions = "".join(
        f"void {name}(const float *x, unsigned char *to, long blocks, float *i, long row) {{ {body} }}\n" for name in lanes.KINDS.values()
    )
    monkeypatch.setattr(lanes, "__file__", str(tmp_path / "lanes.py"))
    (tmp_path / "lanes.c").write_text("#include <string.h>\n" + functions)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    assert lanes.kernels() == {}
    (folder,) = cache.iterdir()
    assert json.loads((folder / "verdict.json").read_text()) == {"passed": False}
    assert [path.name for path in folder.iterdir()] == ["verdict.json"]
    lanes._kernels.cache_clear()
    monkeypatch.setattr(lanes, "_build", None)  # known to be broken
    assert lanes.kernels() == {}


@pytest.mark.parametrize("broken", ["the library", "the verdict", "no library", "no verdict"])
def test_garbage_in_the_cache_is_built_anew(broken: str, cache: Path, kernels: object) -> None:
    assert lanes.kernels()
    (folder,) = cache.iterdir()
    good = (folder / "lanes.so").read_bytes()
    path = folder / ("lanes.so" if "library" in broken else "verdict.json")
    path.unlink()  # it is loaded: never write into it
    if broken.startswith("the"):
        path.write_bytes(good[:5000] + b"garbage")
    lanes._kernels.cache_clear()
    assert lanes.kernels()
    assert cache.joinpath(folder.name, "lanes.so").read_bytes()[:4] == b"\x7fELF" or sys.platform == "darwin"
    assert lanes._recall(folder)


def test_no_compiler(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"relative{os.pathsep}{cache}")
    assert lanes.kernels() == {}
    assert list(cache.iterdir()) == []


GARBAGE = 'while [ "$1" != -o ]; do [ $# -gt 0 ] || exit 0; shift; done; echo garbage > "$2"'


@pytest.mark.parametrize("script", ["exit 1", "exit 0", GARBAGE], ids=["fails", "makes nothing", "makes garbage"])
def test_a_compiler_that_fails(script: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    compiler = tmp_path / "bin" / "cc"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    assert lanes.kernels() == {}
    assert not [path for path in cache.iterdir() if not path.name.startswith("lanes-")]


@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_a_folder_that_others_may_write_to_is_not_used(mode: int, cache: Path) -> None:
    cache.chmod(mode)
    assert lanes.kernels() == {}
    assert list(cache.iterdir()) == []


def test_a_home_below_a_folder_of_everybody_is_not_used(cache: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    assert lanes.kernels() == {}


def test_processes_that_build_at_once_agree(cache: Path, kernels: object) -> None:
    code = "from qwen2_converters import lanes; print(len(lanes.kernels()))"
    children = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(2)]
    assert [child.communicate(timeout=120)[0].strip() for child in children] == [b"3", b"3"]
    assert len(list(cache.iterdir())) == 1

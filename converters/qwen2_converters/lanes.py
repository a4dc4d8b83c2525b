"""Fast K-quantizers: `lanes.c`, built once by this machine's compiler, and used only if it gives ggml's own bytes.

    cache/lanes-KEY/     KEY: of the source, the compiler, the processor and the build of llama.cpp
     ├─ lanes.so         loaded by ctypes; not there if it failed
     └─ verdict.json     whether it passed, and its SHA-256

A child process, which may crash, compares it with ggml on `trial_rows` before this process loads it. Where there is no compiler, where anything
fails, or with QWEN2_LOCAL_LANES=off, ggml's own quantizers do the work: the same bytes, several times as slowly.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import logging
import os
import platform
import shutil
import signal
import stat
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

import qwen2_local
from qwen2_local import files, paths
from qwen2_local.backends import llamalib
from qwen2_local.errors import Qwen2LocalError

if TYPE_CHECKING:
    import subprocess

_log = logging.getLogger("qwen2_local.lanes")

_Floats: TypeAlias = "npt.NDArray[np.float32]"
Kernel: TypeAlias = Any
"""A C function, from any thread: (address of finite float32 weights smaller than 65520, address of the result, number of blocks of 256, address
of a row's importance or None, blocks of a row)."""

WORTH_IT = 1 << 24
"""Weights whose conversion ggml's own quantizers take longer for than the compiler takes."""

KINDS = {"Q4_K": "quantize_q4_k", "Q5_K": "quantize_q5_k", "Q6_K": "quantize_q6_k"}
"""Types that have a kernel, and its name in the library."""

_COMPILERS = ("cc", "gcc", "clang")
# No multiply-add is fused, since that rounds otherwise; square roots and divisions need neither report errors nor trap.
_FLAGS = ("-std=gnu11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", "-pipe", "-w")
_TIME_LIMIT_S = 60
_FAILED = 3
_CRASHES = {-signal.SIGSEGV, -signal.SIGILL, -signal.SIGBUS, -signal.SIGFPE, -signal.SIGABRT}
"""What a library does to itself. Anything else (killed, out of time) happened to it, and is not remembered."""


def kernels() -> Mapping[str, Kernel]:
    """The kernel of each type that has one, by the type's name; built now if need be, which takes seconds. Empty if there are none. Never raises."""
    if os.environ.get("QWEN2_LOCAL_LANES") == "off":
        return {}
    return _kernels(paths.cache())


@functools.cache
def _kernels(cache: Path) -> Mapping[str, Kernel]:
    try:
        library = _library(cache)
        return _bound(library) if library else {}
    except (OSError, AttributeError, Qwen2LocalError) as error:
        _log.info("Conversions go without the fast quantizers: %s", error)
        return {}


def _bound(library: Path) -> Mapping[str, Kernel]:
    lib = ctypes.CDLL(str(library))
    found = {kind: getattr(lib, name) for kind, name in KINDS.items()}
    for function in found.values():
        function.restype, function.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64]
    return found


def _library(cache: Path) -> Path | None:
    """A library that has passed, in `cache`; None if it cannot be had. Raises OSError, Qwen2LocalError."""
    compiler = _compiler()
    if compiler is None or not _private(cache):
        _log.info("Conversions go without the fast quantizers: no C compiler, or others may write to %s", cache)
        return None
    source = Path(__file__).with_name("lanes.c").read_bytes()
    version = _run([str(compiler), "--version"]).stdout
    parts = [source, repr((compiler, _flags())).encode(), version, llamalib.identity().encode()]
    folder = cache / f"lanes-{hashlib.sha256(b''.join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:24]}"
    passed = _recall(folder)
    if passed is None:
        passed = _build(compiler, source, folder)
    return folder / "lanes.so" if passed else None


def _recall(folder: Path) -> bool | None:
    """What is known of the library in `folder`; None if it has to be built. What is no longer what it was is deleted."""
    if not os.path.lexists(folder):
        return None
    if not _private(folder):
        return False
    try:
        verdict = json.loads((folder / "verdict.json").read_bytes())
        if verdict == {"passed": False} or verdict == {"passed": True, "sha256": files.sha256(folder / "lanes.so")}:
            return bool(verdict["passed"])
    except (OSError, ValueError):
        pass
    files.remove_folder(folder)
    return None


def _build(compiler: Path, source: bytes, folder: Path) -> bool:
    """Compile, try, and publish the verdict. False without one if something came between."""
    try:
        with files.staging(folder) as made:
            library = made / "lanes.so"
            ran = _run([str(compiler), *_flags(), "-o", str(library), "-x", "c", "-"], source, TMPDIR=str(made))
            if ran.returncode:
                raise OSError(f"{compiler} ended with {ran.returncode}: {ran.stderr.decode('utf-8', 'replace')[-500:]}")
            library.chmod(0o700)
            passed = _try(library)
            verdict = {"passed": True, "sha256": files.sha256(library)} if passed else {"passed": False}
            if not passed:
                library.unlink()
            files.write_file(made / "verdict.json", json.dumps(verdict))
    except Qwen2LocalError:
        return bool(_recall(folder))  # another process was faster
    return passed


def _try(library: Path) -> bool:
    """Does it give ggml's bytes? Raises OSError if that cannot be told."""
    places = [str(Path(__file__).parents[1]), str(Path(qwen2_local.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    ran = _run([sys.executable, "-P", "-m", "qwen2_converters.lanes", str(library)], PYTHONPATH=os.pathsep.join(filter(None, places)))
    if ran.returncode not in {0, _FAILED, *_CRASHES}:
        raise OSError(f"the trial ended with {ran.returncode}: {ran.stderr.decode('utf-8', 'replace')[-500:]}")
    return ran.returncode == 0


def _flags() -> tuple[str, ...]:
    arm = platform.machine().lower() in ("arm64", "aarch64")
    return (*_FLAGS, "-mcpu=native" if arm else "-march=native")


def _compiler() -> Path | None:
    """The first on those places of PATH that do not depend on the working folder."""
    places = os.pathsep.join(place for place in os.get_exec_path() if Path(place).is_absolute())
    found = (shutil.which(name, path=places) for name in _COMPILERS)
    return next((Path(name) for name in found if name), None)


def _run(command: list[str], text: bytes = b"", **environment: str) -> subprocess.CompletedProcess[bytes]:
    import subprocess  # slow to import

    try:
        return subprocess.run(
            command, input=text, env={**os.environ, "LC_ALL": "C", **environment}, capture_output=True, timeout=_TIME_LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise OSError(f"{command[0]} took longer than {_TIME_LIMIT_S} s") from error


def _private(folder: Path) -> bool:
    """Is `folder` ours, nobody else's to write to, and not where others could put another in its place?"""
    folder = folder.resolve()
    state = folder.stat()
    if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.geteuid() or state.st_mode & 0o022:
        return False
    above = [parent.stat().st_mode for parent in folder.parents]
    return all(not mode & stat.S_IWOTH or mode & stat.S_ISVTX for mode in above)


# The child process


def trial_rows() -> _Floats:
    """Blocks of 256 weights: plain ones, and all that is special to a quantizer. An odd number, which no number of lanes divides."""
    random = np.random.default_rng(0)
    plain = random.integers(-(2**23), 2**23, (64, 256)) / 2**23
    kinds = [plain * size for size in (0.02, 1.0, 6e4, 1e-6, 3e-15, 1e-15, 1e-38, 1e-42)]
    kinds += [np.abs(plain), -np.abs(plain), np.where(np.abs(plain) < 0.9, 0, plain), np.round(plain * 8) / 8, np.copysign(0, plain)]
    kinds += [plain * 1e-6 + 1, plain * 1e-6 - 1, plain * 0 + 0.37, plain * 0 - 0.37, np.repeat(plain[:, :8], 32, 1)]
    kinds += [random.normal(0, 0.02, (512, 256)), random.standard_t(2, (64, 256))]
    # Sub-blocks and weights of very different sizes in one block.
    kinds += [plain * np.repeat(10.0 ** random.integers(-low, 5, (64, 16)), 16, 1) for low in (3, 8, 44)]
    kinds += [np.copysign(np.exp(random.uniform(-100, 11, (64, 256))), plain), plain[:1]]
    return np.concatenate(kinds).astype(np.float32).reshape(-1)


def _trials() -> Iterator[tuple[_Floats, int, _Floats | None]]:
    """Rows, their width, and the importance of their columns."""
    rows = trial_rows()
    yield rows, 256, None
    random = np.random.default_rng(1)
    three = rows[: rows.size // 768 * 768]
    yield three, 768, (100 * random.standard_normal(768) ** 4).astype(np.float32)
    yield three, 768, (10.0 ** random.uniform(-40, 20, 768) * (random.random(768) < 0.9)).astype(np.float32)


def _child(library: str) -> None:
    import resource

    from qwen2_converters import ggml
    from qwen2_local.formats.ggml_types import BY_NAME

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    trials = list(_trials())
    expected = {}
    for name in KINDS:
        ggml.prepare(BY_NAME[name])
        expected[name] = [ggml.quantize(rows, columns, BY_NAME[name], guide) for rows, columns, guide in trials]
    try:
        found = _bound(Path(library))
    except (OSError, AttributeError):
        sys.exit(_FAILED)
    for name, kernel in found.items():
        for (rows, columns, guide), right in zip(trials, expected[name], strict=True):
            if not np.array_equal(ggml.quantize(rows, columns, BY_NAME[name], guide, kernel=kernel), right):
                sys.exit(_FAILED)


if __name__ == "__main__":
    _child(sys.argv[1])

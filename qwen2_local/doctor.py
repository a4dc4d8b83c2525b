"""What `qwen2-local doctor` finds out, as plain data: this machine, its folders, each backend, and what would make it work or run faster."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from qwen2_local import __version__, backends, cpu, files, fit, paths, repair
from qwen2_local.errors import BackendError, BackendUnavailable

Level = Literal["ok", "warn", "fail"]


# What it is called, the processor's names of it, llama.cpp's name of it.
_FEATURES = (
    ("AVX2", {"avx2"}, "AVX2"),
    ("AVX-512", {"avx512f"}, "AVX512"),
    ("AVX-512 VNNI", {"avx512_vnni"}, "AVX512_VNNI"),
    ("AVX-512 BF16", {"avx512_bf16"}, "AVX512_BF16"),
    ("dot product", {"asimddp", "feat_dotprod"}, "DOTPROD"),
    ("8-bit matrix product", {"i8mm", "feat_i8mm"}, "MATMUL_INT8"),
)


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. "fail": no model runs here. fix: what to do about it; empty if nothing."""

    level: Level
    subject: str
    text: str
    fix: str = ""


def collect() -> list[Check]:
    """All findings, in the order to show them. Never raises for what it looks at; tests llama.cpp anew, in another process."""
    checks: list[Check] = []
    for look in (_machine, _memory, _folders, _mlx, _llamacpp, _worker):
        checks += _guarded(look)
    return checks


def _guarded(look: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    try:
        yield from look()
    except Exception as error:  # doctor is for machines where things are broken
        yield Check("fail", look.__name__.strip("_"), f"could not be looked at: {type(error).__name__}: {error}", "Attach this to a bug report.")


def _machine() -> Iterator[Check]:
    yield Check("ok", "program", f"qwen2-local {__version__}, Python {platform.python_version()} at {sys.executable}")
    yield Check("ok", "system", f"{platform.system()} {platform.release()}, {platform.machine()}")
    threads = cpu.cores()
    yield Check("ok", "processor", f"{cpu.name() or 'unknown'}; computing on {threads} {'core' if threads == 1 else 'cores'}")
    if sys.platform == "darwin" and platform.machine() == "x86_64" and "Apple" in cpu.name():
        yield Check("warn", "processor", "this Python is made for Intel and runs translated: slower", "Install a Python for Apple silicon (arm64).")


def _memory() -> Iterator[Check]:
    memory = fit.machine_memory()
    text = f"{memory.total / 1e9:.1f} GB, {memory.available / 1e9:.1f} GB available"
    if memory.available < 1e9:
        yield Check("warn", "memory", text, "Close other programs, or use a small model.")
    else:
        yield Check("ok", "memory", text)


def _folders() -> Iterator[Check]:
    home = paths.home()
    if not paths.writable(home):
        yield Check("warn", "folder", f"{home} cannot be written: nothing can be kept there.", "Set QWEN2_LOCAL_HOME to a folder of yours.")
        return
    mode = stat.S_IMODE(home.stat().st_mode)
    if os.name == "posix" and mode & 0o077:
        yield Check("warn", "folder", f"{home} is open to other users (mode {mode:04o}).", f"Run `chmod 700 '{home}'`.")
    else:
        yield Check("ok", "folder", f"{home} is writable, and yours alone")
    free = files.free_bytes(home)
    if free < 2e9:
        yield Check("warn", "disk", f"{free / 1e9:.1f} GB free for models", "Make room, or set QWEN2_LOCAL_HOME to another disk.")
    else:
        yield Check("ok", "disk", f"{free / 1e9:.1f} GB free for models")


def _mlx() -> Iterator[Check]:
    apple = sys.platform == "darwin" and platform.machine() == "arm64"
    if "mlx" in backends.available():
        use = "the default here" if apple else "on this system only for testing: slow"
        yield Check("ok", "MLX", f"{importlib.metadata.version('mlx')}, {use}")
    elif apple:
        yield Check("warn", "MLX", "not installed, though it is the fastest on this Mac", f"Run `{repair.reinstall('mlx')}`.")
    else:
        yield Check("ok", "MLX", "not installed; it is for Macs with Apple silicon")


def _llamacpp() -> Iterator[Check]:
    worst: Level = "warn" if "mlx" in backends.available() else "fail"
    if "llama.cpp" not in backends.available():
        yield Check(worst, "llama.cpp", "not installed", f"Run `{repair.reinstall('llama-cpp-python')}`.")
        return
    from qwen2_local.backends import llamalib, selftest

    try:
        yield Check("ok", "llama.cpp", f"llama-cpp-python {llamalib.version()}")
        # First in another process: a library that crashes must not take doctor along.
        verdict = selftest.verdict(again=True)
        lib = llamalib.library()
    except BackendUnavailable as error:
        yield Check(worst, "llama.cpp", error.what, error.hint)
        return
    used = set(re.findall(r"(\w+) = [1-9]", lib.llama_print_system_info().decode("ascii", "replace")))
    speed = f"{verdict.tokens_per_s:,.0f} tokens/s of a one-layer model"
    if verdict.safe:
        yield Check("warn", "self-test", f"fast matrix code failed ({verdict.fault}); without it all is right: {speed}", _cure(used))
    else:
        yield Check("ok", "self-test", f"passed: {speed}")
    yield from _features(used, verdict.safe)
    if lib.llama_supports_gpu_offload():
        yield Check("ok", "graphics", "this llama.cpp computes on the graphics processor")


def _worker() -> Iterator[Check]:
    from qwen2_local.worker import process

    try:
        seconds = process.try_out()
    except BackendError as error:
        yield Check("warn", "worker", error.what, error.hint)
    else:
        yield Check("ok", "worker", f"a process for a model starts in {seconds:.1f} s")


def _features(used: set[str], safe: bool) -> Iterator[Check]:
    """The processor's instruction sets against those of the build."""
    offered = cpu.features()
    if not offered:
        yield Check("ok", "instructions", f"used: {', '.join(sorted(used)) or 'none'}; what this CPU offers is unknown")
        return
    both = [name for name, flags, build in _FEATURES if flags & offered and build in used]
    missing = [name for name, flags, build in _FEATURES if flags & offered and build not in used]
    yield Check("ok", "instructions", f"used: {', '.join(both) or 'none beyond the basic ones'}")
    if missing:
        yield Check("warn", "instructions", f"on this CPU, but not in this build of llama.cpp: {', '.join(missing)}", _build_here())
    if "amx_int8" not in offered:
        yield Check("ok", "AMX", "not on this CPU")
    elif "AMX_INT8" not in used:
        yield Check("warn", "AMX", "on this CPU, but not in this build of llama.cpp, which would be twice as fast", _build_here())
    elif safe:
        yield Check("warn", "AMX", "on this CPU and in this build, but switched off after the self-test", _cure(used))
    else:
        yield Check("ok", "AMX", "in use")


def _build_here() -> str:
    return f"Build it here: `{repair.rebuild()}`."


def _cure(used: set[str]) -> str:
    """How to get a build whose fast code works."""
    if "AMX_INT8" in used:  # see pyproject.toml for what these flags cure; set-up from a clone gives them by itself
        return (
            f"Build it with GCC 13.3 or newer, with clang, or with an older GCC and `export CXXFLAGS='-fno-tree-dse -fno-dse'`: `{repair.rebuild()}`."
        )
    return _build_here()

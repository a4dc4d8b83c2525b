"""Does this build of llama.cpp compute rightly on this machine? Asked once per build, in a child process that may crash.

A wrong compiler or a wrong wheel shows as a crash in the first matrix product. The child computes a tiny model (`tinygguf`) first without
and then with the CPU's special matrix code, and says after each that it lived; how far it came is the verdict.

    qwen2-local/selftest.json     the verdict, and which build and processor it is about
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from qwen2_local import paths, repair
from qwen2_local.backends import llamalib, tinygguf
from qwen2_local.errors import BackendUnavailable, Qwen2LocalError

_log = logging.getLogger("qwen2_local.selftest")

_CRASHES = {"SIGSEGV", "SIGILL", "SIGBUS", "SIGFPE", "SIGABRT", "wrong numbers"}
"""What a build does to itself. Anything else (killed, out of time) happened to it, and is not remembered."""
_TIME_LIMIT_S = 60
_WRONG_NUMBERS = 3
_STEPS = (range(40), (7,), (300,))
# Logits 0, 40, ... after each step, from the same weights in 32-bit floats; theirs spread by 1.04, 8-bit activations err by 0.05.
_EXPECTED = (
    (-1.02, -0.19, -0.34, -0.35, 0.92, 0.54, -0.66, -0.34),
    (0.40, 0.00, -0.26, 1.40, -1.68, -1.20, -0.21, -0.50),
    (1.50, -0.40, -1.13, -0.48, -0.19, -1.36, -3.25, -0.75),
)
_TOLERANCE = 0.25

_this_process: dict[str, Verdict] = {}


@dataclass(frozen=True, slots=True)
class Verdict:
    """safe: the special matrix code must stay off; `fault` then says what happened. tokens_per_s: of the tiny model, 0 if unknown."""

    safe: bool
    fault: str = ""
    tokens_per_s: float = 0.0

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences for the user."""
        if not self.safe:
            return ()
        how = "gave wrong numbers" if self.fault == "wrong numbers" else "crashed"
        return (
            f"llama.cpp's fast matrix code {how} in a self-test on this machine; running without it, slower. "
            "`qwen2-local doctor` says how to fix it.",
        )


def verdict(*, again: bool = False) -> Verdict:
    """The verdict on this build; remembered in the data folder, or in memory where that cannot be written. again: test anew.

    Raises BackendUnavailable if nothing that llama.cpp computes here is right.
    """
    build = llamalib.identity()
    known = None if again else _this_process.get(build) or _recall(build)
    found = known or _test()
    _this_process[build] = found
    if known is None and found.tokens_per_s and (not found.safe or found.fault in _CRASHES):
        _remember(build, found)
    return found


def _recall(build: str) -> Verdict | None:
    try:
        kept = json.loads((paths.home() / "selftest.json").read_text("utf-8"))
        return Verdict(bool(kept["safe"]), str(kept["fault"]), float(kept["tokens_per_s"])) if kept["build"] == build else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _remember(build: str, found: Verdict) -> None:
    from qwen2_local import files

    try:
        files.write_atomic(paths.home() / "selftest.json", json.dumps({"build": build, **asdict(found)}))
    except (OSError, Qwen2LocalError) as error:
        _log.info("The self-test's verdict is not kept: %s", error)


def _test() -> Verdict:
    """Run the child and judge by how far it came."""
    import subprocess  # slow to import, and rarely needed here

    child = [sys.executable, "-P", "-m", "qwen2_local.backends.selftest"]
    places = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))}
    try:
        ran = subprocess.run(child, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=_TIME_LIMIT_S, check=False)
    except subprocess.TimeoutExpired as error:
        said, fault, trace = error.stdout or b"", f"no answer in {_TIME_LIMIT_S} s", ""
    except OSError as error:  # a place where no process may be started: then it has to be tried in this one
        _log.info("The self-test could not start: %s", error)
        return Verdict(safe=False)
    else:
        said, fault, trace = ran.stdout, _fault(ran.returncode), ran.stderr.decode("utf-8", "replace").strip()
    words = said.decode("ascii", "replace").split()
    if not fault and "fast" in words:
        return Verdict(safe=False, tokens_per_s=float(words[-1]))
    if "safe" in words:
        _log.info("llama.cpp's fast matrix code failed its self-test (%s)", fault)
        return Verdict(safe=True, fault=fault, tokens_per_s=float(words[words.index("safe") + 1]))
    raise BackendUnavailable(
        f"llama.cpp does not work on this machine: its self-test failed ({fault}). {trace[-500:]}".rstrip(),
        hint=f"Build it here: `{repair.rebuild()}`.",
    )


def _fault(code: int) -> str:
    """What a process's exit code says; empty for success."""
    if code < 0:
        with contextlib.suppress(ValueError):
            return signal.Signals(-code).name
    return {0: "", _WRONG_NUMBERS: "wrong numbers"}.get(code, f"exit code {code}")


def _child() -> None:
    """What the child process does."""
    import tempfile

    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with tempfile.TemporaryDirectory(prefix="qwen2-selftest-") as folder:
        model = Path(folder) / "tiny.gguf"
        tinygguf.write(model)
        for mode in ("safe", "fast"):
            speed = _compute(model, safe=mode == "safe")
            if speed == 0:
                sys.exit(_WRONG_NUMBERS)
            print(mode, f"{speed:.1f}", flush=True)


def _compute(model: Path, *, safe: bool) -> float:
    """Tokens per second of decoding, or 0 if the numbers are wrong."""
    from qwen2_local.backends.base import Layout, Row
    from qwen2_local.backends.llamacpp import LlamaCpp

    backend = LlamaCpp.load(model, layout=Layout(1, 128), safe=safe)
    sequence = backend.open()
    for tokens, expected in zip(_STEPS, _EXPECTED, strict=True):
        logits = backend.step([Row(sequence, tokens, logits="last")])[0].logits
        # Not `>`: a NaN has to fail.
        if logits is None or not np.abs(logits[0, :: tinygguf.VOCABULARY // 8] - expected).max() <= _TOLERANCE:
            return 0.0
    started = time.perf_counter()
    count = 20
    for token in range(count):
        backend.step([Row(sequence, (token,), logits="last")])
    return count / (time.perf_counter() - started)


if __name__ == "__main__":
    _child()

"""Conversions against the peers, in one run: llama.cpp's own convert_hf_to_gguf.py and quantizer, and mlx_lm.convert.

    python benchmarks/convert.py [--sizes 0.5b 1.5b] [--work FOLDER] [--repeat 3]     in the project's environment; 20 GB of disk for 1.5b

Checkpoints are of random weights at the real shapes. llama.cpp's script needs torch and transformers 4, so it gets an environment of its own in
FOLDER, with llama.cpp as pip builds it, without this project's compiler flags; its source comes with llama-cpp-python's source distribution. pip
fetches all that once, and builds for some minutes. Times are of whole commands, taken in turn; memory is the peak of resident memory (of the
larger of two commands). The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
OURS = Path(sys.executable).with_name("qwen2-local")
PEER = ("torch>=2.6", "transformers==4.57.6", "numpy~=2.2.6", "sentencepiece", "protobuf<5")
QUANTIZE = """
import ctypes, sys, llama_cpp
params = llama_cpp.llama_model_quantize_default_params()
params.ftype, params.nthread = int(sys.argv[3]), int(sys.argv[4])
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(params)))
"""


@dataclass(frozen=True)
class Cost:
    """Seconds of a command, its peak of resident memory in MB, and the bytes it left beside its result."""

    seconds: float
    peak_mb: float
    temporary: int = 0


def run(*command: str | Path, env: dict[str, str] | None = None) -> Cost:
    """One whole command. VmHWM as the system counts it: of the process itself, or of its largest child."""
    before = time.perf_counter()
    with subprocess.Popen(
        [str(part) for part in command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, env=env
    ) as process:
        assert process.stderr is not None
        text = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command} ended with {process.returncode}:\n{text.decode(errors='replace')[-2000:]}")
    return Cost(time.perf_counter() - before, usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3))


def fetch_peer(work: Path) -> tuple[Path, Path]:
    """The Python and the llama.cpp source of the peer, made in `work` unless they are there."""
    python, source = work / "peer/bin/python", work / "llama.cpp"
    version = importlib.metadata.version("llama-cpp-python")
    if not python.exists():
        run(sys.executable, "-m", "venv", work / "peer")
        run(python, "-m", "pip", "install", "-q", *PEER, f"llama-cpp-python=={version}")
    if not source.exists():
        run(python, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "llama-cpp-python", f"llama-cpp-python=={version}", "-d", work)
        with tarfile.open(next(work.glob("llama_cpp_python-*.tar.gz"))) as archive:
            archive.extractall(work / "sdist", filter="data")
        next((work / "sdist").glob("*/vendor/llama.cpp")).rename(source)
    return python, source


def ours(source: Path, target: str, output: Path) -> Cost:
    return run(OURS, "convert", source, "--to", target, "-o", output)


def llama(python: Path, llama_cpp: Path, source: Path, output: Path) -> Cost:
    """To bf16 by the script, then to Q4_K_M by the library."""
    between = output.with_suffix(".bf16.gguf")
    env = os.environ | {"PYTHONPATH": str(llama_cpp / "gguf-py")}
    first = run(python, llama_cpp / "convert_hf_to_gguf.py", source, "--outtype", "bf16", "--outfile", between, env=env)
    second = run(python, "-c", QUANTIZE, between, output, "15", str(os.cpu_count()))
    size = between.stat().st_size
    between.unlink()
    return Cost(first.seconds + second.seconds, max(first.peak_mb, second.peak_mb), size)


def mlx_lm(source: Path, output: Path) -> Cost:
    return run(sys.executable, "-m", "mlx_lm", "convert", "--hf-path", source, "--mlx-path", output, "-q", "--q-bits", "4")


def in_turn(repeat: int, work: Path, *commands: Callable[[Path], Cost]) -> list[list[Cost]]:
    """A B A B …, each into a fresh place."""
    costs: list[list[Cost]] = [[] for _ in commands]
    for _ in range(repeat):
        for command, cost in zip(commands, costs, strict=True):
            with tempfile.TemporaryDirectory(dir=work) as place:
                cost.append(command(Path(place)))
    return costs


def row(us: list[Cost], peer: list[Cost]) -> dict[str, Any]:
    ratios = [a.seconds / b.seconds for a, b in zip(us, peer, strict=True)]
    return {
        "ours_s": round(statistics.median(cost.seconds for cost in us), 1),
        "peer_s": round(statistics.median(cost.seconds for cost in peer), 1),
        "time_ratio": round(statistics.median(ratios), 3),
        "ours_peak_mb": round(max(cost.peak_mb for cost in us)),
        "peer_peak_mb": round(max(cost.peak_mb for cost in peer)),
        "peer_temporary_mb": round(max(cost.temporary for cost in peer) / 1e6),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["0.5b", "1.5b"])
    parser.add_argument("--work", type=Path, help="a folder to keep for the next run; default: a temporary one")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--alone", action="store_true", help="without the peers")
    options = parser.parse_args()
    report: dict[str, Any] = {}
    work = options.work or Path(tempfile.mkdtemp())
    work.mkdir(parents=True, exist_ok=True)
    try:
        for size in options.sizes:
            source = work / f"Qwen2-{size}"
            if not source.exists():
                run(sys.executable, HERE / "random_checkpoint.py", size, source)
            report[size] = measure(source, work, options.repeat, alone=options.alone)
            print(size, json.dumps(report[size]), flush=True)
    finally:
        if options.work is None:
            shutil.rmtree(work)
    print(json.dumps(report))


def measure(source: Path, work: Path, repeat: int, *, alone: bool) -> dict[str, Any]:
    def gguf(place: Path) -> Cost:
        return ours(source, "gguf:q4_k_m", place / "ours.gguf")

    def mlx(place: Path) -> Cost:
        return ours(source, "mlx:4bit", place / "ours")

    if alone:
        costs = dict(zip(("gguf:q4_k_m", "mlx:4bit"), in_turn(repeat, work, gguf, mlx), strict=True))
        return {
            name: {"s": round(statistics.median(c.seconds for c in cost), 1), "peak_mb": round(max(c.peak_mb for c in cost))}
            for name, cost in costs.items()
        }
    python, llama_cpp = fetch_peer(work)
    us, peer = in_turn(repeat, work, gguf, lambda place: llama(python, llama_cpp, source, place / "peer.gguf"))
    us_mlx, peer_mlx = in_turn(repeat, work, mlx, lambda place: mlx_lm(source, place / "peer"))
    return {"gguf:q4_k_m": row(us, peer), "mlx:4bit": row(us_mlx, peer_mlx)}


if __name__ == "__main__":
    main()

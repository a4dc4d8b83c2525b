"""How long until something is seen: `--help`, `--version`, and the first word of a reply, each from the start of the process.

    python benchmarks/startup.py [--runs 21] [--model guide] [--backend llama.cpp]      in the project's environment

A first run of each is not counted: it compiles bytecode, converts the guide and self-tests llama.cpp, as on a user's first start, and its
time is given as `first`. Everything is measured in a data folder of its own. The last line is one JSON object; times are seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMMAND = str(Path(sys.executable).with_name("qwen2-local"))


def first_byte(arguments: list[str], environment: dict[str, str]) -> float:
    """Seconds from starting the command to its first byte on stdout. Raises if it ends without one or fails."""
    before = time.perf_counter()
    pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
    with subprocess.Popen([COMMAND, *arguments], stdin=nothing, stdout=pipe, stderr=pipe, env=environment) as process:
        assert process.stdout is not None and process.stderr is not None
        byte = process.stdout.read(1)
        took = time.perf_counter() - before
        _, errors = process.communicate()
    if not byte or process.returncode:
        raise RuntimeError(f"{' '.join(arguments)}: {errors.decode().strip()}")
    return took


def whole(arguments: list[str], environment: dict[str, str]) -> float:
    """Seconds from starting the command to its end."""
    before = time.perf_counter()
    subprocess.run([COMMAND, *arguments], stdin=subprocess.DEVNULL, capture_output=True, env=environment, check=True)
    return time.perf_counter() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=21)
    parser.add_argument("--model", default="guide")
    parser.add_argument("--backend", default="llama.cpp")
    options = parser.parse_args()
    reply = ["run", options.model, "What is GGUF?", "--backend", options.backend]
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        # A shell that forbids bytecode would have every start pay for compiling.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"} | {"QWEN2_LOCAL_HOME": folder}
        for name, measure, arguments in (("version", whole, ["--version"]), ("help", whole, ["--help"]), ("first_token", first_byte, reply)):
            first = measure(arguments, environment)
            times = [measure(arguments, environment) for _ in range(options.runs)]
            results[name] = {"median": round(statistics.median(times), 4), "best": round(min(times), 4), "first": round(first, 4)}
            print(f"{name:<12} median {results[name]['median']:.3f} s   best {min(times):.3f} s   first {first:.3f} s   of {options.runs} runs")
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    print(json.dumps({**vars(options), "cores": cores, **results}))


if __name__ == "__main__":
    main()

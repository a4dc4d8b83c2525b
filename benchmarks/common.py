"""What several benchmarks need: child processes, medians, models of random weights."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def spread(values: Iterable[float], digits: int = 3) -> list[float]:
    """Median, lowest and highest."""
    known = list(values)
    return [round(value, digits) for value in (statistics.median(known), min(known), max(known))]


def child(script: str, *arguments: object, home: Path, **environment: str) -> Any:
    """Run a benchmark's own script in a new process, with a data folder of its own, and give the JSON of its last line."""
    command = [sys.executable, script, *map(str, arguments)]
    # A shell that forbids bytecode would have every start pay for compiling.
    known = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        command, env=known | {"QWEN2_LOCAL_HOME": str(home)} | environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def forget_pages(folder: Path) -> None:
    """Have the system drop what it holds in memory of all files in a folder (posix_fadvise DONTNEED; Linux)."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_from_disk() -> int:
    """Bytes that this process has had read from a disk so far; 0 where the system does not say."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes")), 0)


def resident() -> int:
    """Bytes of this process that are in memory (Linux; elsewhere its peak)."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def turns_of(items: Sequence[Any], number: int) -> list[Any]:
    """In another order each round, so that nothing always comes first."""
    at = number % len(items)
    return [*items[at:], *items[:at]]

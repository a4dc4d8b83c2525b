"""Everything that is checked, here and in CI: `python3 scripts/check.py`. Sets up `.venv` with the tests' needs first. Exit code 0: all is well."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from environment import ROOT, Environment, SetupError, newer_python, say

MOST_WORKERS = 4
"""Each loads models of its own."""


def workers() -> int:
    """How many processes run the tests: one for each processor that this one may use, but not more than a laptop has memory for."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(allowed, MOST_WORKERS)


def steps(count: int) -> list[tuple[str, list[str]]]:
    """Every step's name and command. count: of the processes that run the tests.

    Each process gets tests that follow each other, so that what a module sets up is set up once; who is done early takes over some of another's.
    """
    # The floors of the house (no import goes up) are tests too: tests/unit/test_floors.py.
    return [
        ("ruff check", ["ruff", "check", "."]),
        ("ruff format", ["ruff", "format", "--check", "--quiet", "."]),
        ("mypy", ["mypy"]),
        ("pytest", ["pytest", "--durations=10", *(["-n", str(count), "--dist", "worksteal"] if count > 1 else [])]),
    ]


def main() -> int:
    """Runs every step, also after one has failed."""
    # In the background of a shell script Ctrl-C is ignored, and every child would inherit that; some tests send it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    started = time.monotonic()
    environment = Environment()
    try:
        newer_python()
        environment.set_up(dev=True)
    except SetupError as error:
        say(f"error: {error}")
        return 1
    # The tests find the environment's tools (cmake) first.
    variables = {**os.environ, "PATH": f"{environment.python.parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    # llama.cpp's threads wait for each other in loops; several processes would take the processors from one another that way.
    variables.setdefault("OMP_WAIT_POLICY", "passive")
    took = [("set-up", True, time.monotonic() - started)]
    for name, command in steps(workers()):
        say(f"\n== {name}")
        started = time.monotonic()
        done = subprocess.run([str(environment.python), "-m", *command], cwd=ROOT, stdin=subprocess.DEVNULL, env=variables, check=False)
        took.append((name, done.returncode == 0, time.monotonic() - started))
    say("")
    for name, fine, seconds in took:
        say(f"{'ok    ' if fine else 'FAILED'}  {name:<12} {seconds:7.1f} s")
    return 0 if all(fine for _, fine, _ in took) else 1


if __name__ == "__main__":
    sys.exit(main())

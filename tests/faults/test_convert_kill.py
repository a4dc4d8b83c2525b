"""Conversions that are killed at any write, or lose what they had not synced: the same command then makes the same bytes.

A sample of the writes; all of them with `python -m pytest tests/faults/test_convert_kill.py --every-write`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SAMPLE = 5


@pytest.mark.skipif(sys.platform != "linux", reason="open files are known by /proc")
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("scenario", ["gguf", "mlx", "both", "replaced", "installed", "arriving"])
@pytest.mark.parametrize("how", ["kill", "lose"])
def test_the_same_command_makes_the_same_bytes(how: str, scenario: str, request: pytest.FixtureRequest) -> None:
    every = request.config.getoption("--every-write", default=False)
    command = [sys.executable, "-m", "tests.support.conversion_crashes", how, scenario, "--points", "0" if every else str(SAMPLE)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    count = int(done.stdout.split(": ")[-1].split()[0])
    assert count >= 50 if every else count == SAMPLE

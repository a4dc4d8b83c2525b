"""What else this machine has to do."""

from __future__ import annotations

import os


def busy() -> float:
    """How many times as long as alone everything may take here: programs that want to run, for each processor that we may use. At least 1."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1.0, os.getloadavg()[0] / processors)

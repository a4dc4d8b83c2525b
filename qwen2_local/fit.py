"""What fits: into memory at a context, and onto the disk. The one place that knows; everybody asks it.

Memory = weights + KV cache + 0.15 GB for buffers and the program. 1 GB is 1e9 bytes, shown rounded up to 0.1.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from qwen2_local.errors import DoesNotFit

OVERHEAD = 150_000_000
"""Bytes for compute buffers and the program itself."""

SHARE = 0.75
"""Of the memory, what a model may take to run well beside everything else."""

MLX_WIDENS = sys.platform != "darwin"
"""Where it has no GPU, MLX computes in float32, and keeps weights and KV in it."""

_STEP = 256  # Contexts are offered in whole chunks of the KV cache.


@dataclass(frozen=True, slots=True)
class Memory:
    """The memory of this machine, or of the container we run in. Bytes."""

    total: int
    available: int


def show_gb(count: int) -> str:
    """Bytes for people: "5.3 GB", rounded up."""
    return f"{-(-count // 10**8) / 10:.1f} GB"


def kv_bytes(kv_values_per_token: int, context: int, kv_bits: float = 16) -> int:
    """Bytes of the KV cache of one sequence. kv_values_per_token: as configs and headers give it; kv_bits: bits of each value, on average."""
    return math.ceil(context * kv_values_per_token * kv_bits / 8)


def memory_needed(weight_bytes: int, kv_values_per_token: int, context: int, kv_bits: float = 16) -> int:
    """Bytes of memory for a model at a context of so many tokens."""
    return weight_bytes + kv_bytes(kv_values_per_token, context, kv_bits) + OVERHEAD


def largest_context(weight_bytes: int, kv_values_per_token: int, available: int, limit: int, kv_bits: float = 16) -> int:
    """The most tokens, up to `limit`, with which a model fits into `available` bytes: `limit`, else whole multiples of 256, or 0."""
    room = max(0, available - weight_bytes - OVERHEAD)
    fitting = int(room * 8 / (kv_values_per_token * kv_bits))
    return limit if fitting >= limit else fitting // _STEP * _STEP


def require(
    weight_bytes: int, kv_values_per_token: int, context: int, *, kv_bits: float = 16, what: str = "This model", memory: Memory | None = None
) -> None:
    """Raises DoesNotFit, with the numbers and the largest context that fits, unless the model fits into what is available now.

    weight_bytes: as they lie in memory. what: its name, for the message. memory: by default what this machine has.
    """
    memory = memory or machine_memory()
    needed = memory_needed(weight_bytes, kv_values_per_token, context, kv_bits)
    if needed <= memory.available:
        return
    largest = largest_context(weight_bytes, kv_values_per_token, memory.available, context, kv_bits)
    hint = "Take a smaller size or fewer bits, or close other programs."
    if largest:
        hint = f"The largest context that fits is {largest}: `--context {largest}`."
    # What there is is rounded down, so that the two numbers never look alike.
    available, total = memory.available // 10**8 / 10, memory.total // 10**8 / 10
    raise DoesNotFit(
        f"{what} needs {show_gb(needed)} of memory at a context of {context:,}; {available:.1f} GB of {total:.1f} GB are available.", hint=hint
    )


def machine_memory() -> Memory:
    """The memory there is now: of the machine, or what the control group of this process leaves."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if sys.platform == "darwin":
        with suppress(OSError, subprocess.SubprocessError):
            output = subprocess.run(["/usr/bin/vm_stat"], capture_output=True, text=True, timeout=5, check=True).stdout
            return Memory(total, parse_vm_stat(output, total))
        return Memory(total, total * 3 // 4)
    memory = Memory(total, total * 3 // 4)
    with suppress(OSError):
        memory = parse_meminfo(Path("/proc/meminfo").read_text(), memory)
    with suppress(OSError):
        memory = within_cgroup(memory, Path("/proc/self/cgroup").read_text(), Path("/sys/fs/cgroup"))
    return memory


def parse_meminfo(text: str, default: Memory) -> Memory:
    """MemTotal and MemAvailable of /proc/meminfo, which counts in KiB."""
    values = {name: int(number) * 1024 for name, number in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}
    return Memory(values.get("MemTotal", default.total), values.get("MemAvailable", default.available))


def parse_vm_stat(text: str, total: int) -> int:
    """Bytes that macOS can give without swapping: pages free, inactive, speculative, purgeable."""
    size = re.search(r"page size of (\d+) bytes", text)
    pages = sum(int(number) for number in re.findall(r"^Pages (?:free|inactive|speculative|purgeable):\s+(\d+)", text, re.MULTILINE))
    return min(total, pages * int(size[1])) if size and pages else total * 3 // 4


def within_cgroup(memory: Memory, membership: str, root: Path) -> Memory:
    """`memory` cut to the limits of the control groups (version 2 or 1) that /proc/self/cgroup names, parents included."""
    for line in membership.splitlines():
        number, controllers, path = ([*line.split(":", 2), "", ""])[:3]
        if number == "0":
            base, limit_name, used_name = root, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            base, limit_name, used_name = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        # In a container the path may be the host's, and the group is mounted at the root.
        group = base / path.strip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(base):
                memory = _cut(memory, folder, limit_name, used_name)
    return memory


def _cut(memory: Memory, folder: Path, limit_name: str, used_name: str) -> Memory:
    with suppress(OSError, ValueError):
        limit = int((folder / limit_name).read_text())
        used = int((folder / used_name).read_text())
        # The page cache counts as used, but is given back on demand: a model file read twice lies in its active part.
        stat: dict[str, str] = dict(re.findall(r"^(\w+) (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE))
        cached = sum(int(stat.get(f"total_{name}", stat.get(name, "0"))) for name in ("active_file", "inactive_file"))
        left = min(limit, max(0, limit - used + cached))
        return Memory(min(memory.total, limit), min(memory.available, left))
    return memory

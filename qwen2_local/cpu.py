"""What this computer's processor is: its name, its features, and how many cores we may use. Reads files and sysctl only; no processes."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from pathlib import Path

_MAC_FEATURES = ("FEAT_DotProd", "FEAT_I8MM", "FEAT_BF16", "FEAT_SVE", "FEAT_SME")


def cores() -> int:
    """How many threads to compute with: physical (fast) cores that this process may use, by affinity and control group. At least 1."""
    if sys.platform == "linux":
        allowed = os.sched_getaffinity(0)
        fast = allowed & _cpu_list("/sys/devices/cpu_core/cpus")  # only hybrid processors have this file
        physical = len({_core(cpu) for cpu in fast or allowed})
        return max(1, min(physical, _quota()))
    if sys.platform == "darwin":
        return _mac_number("hw.perflevel0.physicalcpu") or _mac_number("hw.physicalcpu") or 1
    return max(1, (os.cpu_count() or 1) // 2)


def name() -> str:
    """The processor's name, as it calls itself; empty if unknown."""
    if sys.platform == "darwin":
        return _mac_text("machdep.cpu.brand_string")
    return _cpuinfo().get("model name", "")


def features() -> frozenset[str]:
    """Names of its instruction sets: Linux's flags (`avx2`, `amx_int8`, `asimddp`), or macOS's (`feat_i8mm`). Empty if unknown."""
    if sys.platform == "darwin":
        return frozenset(key.lower() for key in _MAC_FEATURES if _mac_number(f"hw.optional.arm.{key}"))
    info = _cpuinfo()
    return frozenset((info.get("flags") or info.get("Features") or "").split())


def _cpuinfo() -> dict[str, str]:
    """The first processor's block of /proc/cpuinfo."""
    found: dict[str, str] = {}
    with contextlib.suppress(OSError), Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if not line.strip():
                break
            key, _, value = line.partition(":")
            found[key.strip()] = value.strip()
    return found


def _core(cpu: int) -> str:
    """A name shared by the hardware threads of one core."""
    topology = f"/sys/devices/system/cpu/cpu{cpu}/topology"
    return _read(f"{topology}/thread_siblings_list") or str(cpu)


def _cpu_list(path: str) -> set[int]:
    """The numbers in a list such as `0-3,8`; empty if there is no such file."""
    numbers: set[int] = set()
    for part in _read(path).split(","):
        first, _, last = part.partition("-")
        if first.isdigit():
            numbers.update(range(int(first), int(last or first) + 1))
    return numbers


def _quota() -> int:
    """Whole processors that the control group (version 2) grants; a large number if it sets no limit."""
    group = Path("/sys/fs/cgroup") / _read("/proc/self/cgroup").rpartition("::")[2].strip("/")
    granted = 1 << 16
    for folder in (group, *group.parents):
        limit, _, period = _read(str(folder / "cpu.max")).partition(" ")
        if limit.isdigit() and period.isdigit():
            granted = min(granted, int(limit) // int(period))
        if folder == Path("/sys/fs/cgroup"):
            break
    return granted


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""


def _mac_bytes(key: str) -> bytes:
    buffer = ctypes.create_string_buffer(256)
    size = ctypes.c_size_t(len(buffer))
    if ctypes.CDLL(None).sysctlbyname(key.encode(), buffer, ctypes.byref(size), None, ctypes.c_size_t(0)) != 0:
        return b""
    return buffer.raw[: size.value]


def _mac_number(key: str) -> int:
    return int.from_bytes(_mac_bytes(key), "little")


def _mac_text(key: str) -> str:
    return _mac_bytes(key).rstrip(b"\0").decode("utf-8", "replace")

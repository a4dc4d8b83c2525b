"""Which of the ten Qwen2 suit this machine, and which one to recommend. From the catalog and the machine alone: no network is asked.

What a hub really has, and the bytes to the last, is in the plan of a pull.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from qwen2_local import files, fit, paths
from qwen2_local.catalog import CATALOG, CatalogModel, Size

CONTEXT = 8192
"""Tokens at which memory is compared."""

_SHORT = 2048
_SLOW = 4.0  # tokens a second, below which one reads faster than it writes
_OTHERS = ("q4_k_m", "q3_k_m")

Verdict = Literal["fits", "slow", "tight", "disk", "large"]
"""Of a model on a machine. tight: it loads, and leaves little for anything else. disk: there is too little of it. large: it does not fit at all."""


@dataclass(frozen=True, slots=True)
class Advice:
    """What one model would mean here. level: the quantization that suits it. All in bytes.

    download: over the network. disk: to have free meanwhile (an original is fetched before it is converted). size: once it is installed.
    memory: at a context of `CONTEXT` tokens. recommended: the best choice for this machine; of all, at most one is.
    """

    model: CatalogModel
    level: str
    download: int
    disk: int
    size: int
    memory: int
    verdict: Verdict
    recommended: bool = False

    def memory_at(self, context: int) -> int:
        """Bytes of memory at another context."""
        return fit.memory_needed(self.size, self.model.size.kv_values_per_token, context)


def advise(memory: fit.Memory, disk_free: int, *, bandwidth: float | None = None) -> list[Advice]:
    """Of all ten, smallest first, Instruct before base. bandwidth: bytes of memory that can be read in a second; by default a guess."""
    speed = bandwidth or _bandwidth(memory.total)
    return _marked([_advice(model, memory, disk_free, speed) for model in CATALOG])


def here() -> list[Advice]:
    """`advise` for this machine, as it is now."""
    return advise(fit.machine_memory(), files.free_bytes(paths.models()))


def recommended(advices: Sequence[Advice]) -> Advice | None:
    """The one to recommend, the largest Instruct model that fits and runs well; None on a machine that is too small for any."""
    return next((one for one in advices if one.recommended), None)


def _marked(advices: list[Advice]) -> list[Advice]:
    best = max((one for one in advices if one.model.instruct and one.verdict == "fits"), key=lambda one: one.model.size.weights, default=None)
    return [replace(one, recommended=one is best) for one in advices]


def _advice(model: CatalogModel, memory: fit.Memory, disk_free: int, bandwidth: float) -> Advice:
    size = model.size
    levels = dict.fromkeys((size.recommended, *_OTHERS))
    level = next((one for one in levels if _needs(size, one) <= memory.total * fit.SHARE), size.recommended)
    written = size.gguf_bytes[level]
    # Of base models there is no GGUF: their originals, 16 bits a weight, are converted here.
    fetched = written if model.instruct else 2 * size.weights
    disk = written if model.instruct else fetched + written
    needs = _needs(size, level)
    verdict: Verdict
    if fit.memory_needed(written, size.kv_values_per_token, _SHORT) >= memory.total:
        verdict = "large"
    elif needs > memory.total * fit.SHARE:
        verdict = "tight"
    elif disk > disk_free:
        verdict = "disk"
    else:
        verdict = "fits" if bandwidth / (written * size.active_share) >= _SLOW else "slow"
    return Advice(model, level, fetched, disk, written, needs, verdict)


def _needs(size: Size, level: str) -> int:
    return fit.memory_needed(size.gguf_bytes[level], size.kv_values_per_token, CONTEXT)


def _bandwidth(total: int) -> float:
    """A guess: every weight is read for every token, so this decides the speed. Of Apple's chips only the large ones come with much memory."""
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return 400e9 if total >= 64e9 else 100e9
    return 50e9

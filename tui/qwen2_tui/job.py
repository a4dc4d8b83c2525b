"""A piece of work as it is shown, and what becomes of it by what its process tells. Plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from qwen2_local.sanitize import clean_line
from qwen2_tui.child import Ended

STOPPED = 130
"""The exit code of a command that was stopped, and kept what it had."""

Kind = Literal["fetch", "verify"]
State = Literal["running", "paused", "done", "failed", "cancelled"]


@dataclass(frozen=True, slots=True)
class Job:
    """How far a piece of work is. name: what was asked for ("7b"), or the model that is verified. done, total: bytes of the phase, 0 if unknown.

    speed: bytes a second, 0 if unknown. left_s: of the phase. kept: bytes that lie on the disk, of a paused fetch.
    words: what is going on beside ("converting 12 %"), what was found, or what went wrong and what to do. models: what a fetch has installed.
    """

    name: str
    kind: Kind = "fetch"
    phase: str = ""
    done: int = 0
    total: int = 0
    speed: float = 0.0
    left_s: float | None = None
    state: State = "running"
    words: str = ""
    kept: int = 0
    models: tuple[str, ...] = ()

    @property
    def news(self) -> str:
        """For somebody who does something else: how it ended. Empty while it goes on, or where it was ended on purpose."""
        if self.state == "failed":
            return f"{self.name}: {self.words}"
        if self.state != "done":
            return ""
        return f"{self.name}: {self.words}" if self.words or not self.models else f"{' and '.join(self.models)} is installed."


def told(before: Job, event: Mapping[str, Any]) -> Job:
    """After an event of `--events`, whatever is in it."""
    phase, done, total = clean_line(str(event.get("phase", ""))), _count(event.get("done")), _count(event.get("total"))
    if phase == "converting" and before.phase == "fetching" and before.done < before.total:
        # Both go on at once: what is fetched is what one waits for.
        return replace(before, words=f"converting {done / total:.0%}" if total else "")
    words = before.words if phase == before.phase else ""
    speed, left = _number(event.get("speed")) or 0.0, _number(event.get("left_s"))
    return replace(before, phase=phase, done=done, total=total, speed=speed, left_s=left, words=words)


def over(job: Job, ended: Ended) -> Job:
    """Once its process has ended, and was not stopped."""
    if ended.code == 0:
        return replace(job, state="done", done=job.total, words=_found(ended), models=_models(ended))
    return replace(job, state="failed", words=_fault(job, ended))


def _fault(job: Job, ended: Ended) -> str:
    faults = ended.answer.get("faults")
    if job.kind == "verify" and isinstance(faults, (list, tuple)) and faults:
        return "\n".join(clean_line(str(fault)) for fault in faults[:5]) + f"\n`qwen2-local rm {job.name}`, then fetch it again."
    return ended.words.removeprefix("error: ") or f"It ended with the exit code {ended.code}."


def _found(ended: Ended) -> str:
    """What was found out."""
    if "ok" in ended.answer:
        hashed = _count(ended.answer.get("files_hashed"))
        return f"All is well: its files ({hashed}) are those that were installed." if hashed else "All is well."
    return "It is up to date." if ended.answer.get("status") == "current" else ""


def _models(ended: Ended) -> tuple[str, ...]:
    models = ended.answer.get("models")
    return tuple(clean_line(str(one.get("name"))) for one in models if isinstance(one, dict)) if isinstance(models, list) else ()


def _count(value: object) -> int:
    return value if type(value) is int and value > 0 else 0


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None

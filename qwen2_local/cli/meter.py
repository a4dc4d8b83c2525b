"""How far a long piece of work is: a line that is drawn again for a person, or events for a program."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections import deque
from types import TracebackType
from typing import TYPE_CHECKING, Self

from qwen2_local.cli import output

if TYPE_CHECKING:
    from qwen2_converters.pull_step import Step

_BAR = 20
_SHORTEST_BAR = 6
_WINDOW_S = 10.0
_SOONEST_S = 0.5
_REDRAW_S = 0.1
_EVENT_S = 0.2


class Speeds:
    """Bytes a second of each phase, over its last seconds: what an earlier run has done took this one no time."""

    def __init__(self) -> None:
        self._samples: dict[str, deque[tuple[float, int]]] = {}

    def at(self, phase: str, done: int, now: float) -> float:
        """The speed, now that so many bytes are done; 0 while that is not known."""
        samples = self._samples.setdefault(phase, deque())
        samples.append((now, done))
        while len(samples) > 2 and now - samples[0][0] > _WINDOW_S:
            samples.popleft()
        began, before = samples[0]
        return max(0.0, (done - before) / (now - began)) if now - began > _SOONEST_S else 0.0


class Meter(output.Status):
    """Shows the steps of a pull on one line: the file, a bar, bytes, speed and time left. The speed is that of the last seconds.

    While shards are converted as they come, both are on the line.
    """

    def __init__(self) -> None:
        super().__init__()
        self._speeds = Speeds()
        self._seen: dict[str, Step] = {}
        self._drawn = 0.0
        self._width = shutil.get_terminal_size().columns - 1

    def step(self, step: Step) -> None:
        """Show how far it is, a few times a second."""
        at = time.monotonic()
        text = self.text(step, at)
        if at - self._drawn >= _REDRAW_S or step.done == step.total:
            self._drawn = at
            self.show(text)

    def text(self, step: Step, at: float) -> str:
        """The line, at the time `at` (seconds)."""
        if not step.total:
            return f"{step.phase} {step.name}"
        self._seen[step.phase] = step
        fetching, converting = self._seen.get("fetching"), self._seen.get("converting")
        if fetching and converting and fetching.done < fetching.total:
            return self._line(fetching, at, f" · converting {converting.done / converting.total:.0%}")
        return self._line(step, at, "")

    def _line(self, step: Step, at: float, more: str) -> str:
        share = min(1.0, step.done / step.total)
        file = f" {step.file_done / step.file_total:.0%}" if step.file_total and step.file_total != step.total else ""
        doing = "" if step.phase == "fetching" else f"{step.phase} "
        done = f"  {share:.0%}  {output.gigabytes(step.done)} of {output.gigabytes(step.total)}"
        speed = self._speeds.at(step.phase, step.done, at)
        if speed > 0:
            left = int((step.total - step.done) / speed)
            done += f"  {speed / 1e6:.1f} MB/s  {left // 60}:{left % 60:02d} left"
        done += more
        # What does not fit goes: the bar first, then the end of the name.
        name = f"{doing}{step.name}{file}"
        length = min(_BAR, self._width - len(name + done) - 2)
        if length >= _SHORTEST_BAR:
            full = round(share * length)
            return f"{name}  {'━' * full}{'─' * (length - full)}{done}"
        return name[: max(8, self._width - len(done))] + done


class Events:
    """Tells the same to a program: lines of JSON on stderr, of each phase at most five a second, and always its first and its last.

    {"phase": "fetching", "name": "x.gguf", "done": 1200, "total": 4800, "speed": 600.0, "left_s": 6.0}
    """

    def __init__(self) -> None:
        self._speeds = Speeds()
        self._told: dict[str, float] = {}

    def step(self, step: Step) -> None:
        """Tell it, if it is time."""
        self.at(step.phase, step.name, step.done, step.total)

    def at(self, phase: str, name: str, done: int, total: int) -> None:
        """The same in single values: bytes done, and to do in all (0 while that is not known)."""
        now = time.monotonic()
        if now - self._told.get(phase, -_EVENT_S) < _EVENT_S and (not total or done < total):
            return
        self._told[phase] = now
        speed = self._speeds.at(phase, done, now)
        left = (total - done) / speed if speed > 0 and total else None
        # ASCII: a name may be a stranger's. One write, so that no line is cut by another.
        event = {"phase": phase, "name": name, "done": done, "total": total, "speed": round(speed), "left_s": left and round(left, 1)}
        sys.stderr.write(json.dumps(event) + "\n")
        sys.stderr.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """There is nothing to take away."""

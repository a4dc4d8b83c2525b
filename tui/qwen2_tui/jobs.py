"""Fetches and verifications: each a child process of our own command line, so that one goes on chatting meanwhile.

A fetch that is stopped, by a person, a crash or the end of the app, is kept by the store, and is here again as paused the next time (`look`).
No network is touched unless `plan`, `start` or `resume` is called.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from qwen2_local.errors import Qwen2LocalError
from qwen2_local.sanitize import clean_line
from qwen2_local.store import Store
from qwen2_tui.child import Child, Ended
from qwen2_tui.plan import Plan, look_up

NICE = 12
"""Behind a model that computes on all cores, a job gets about 6 % of one; else all there is."""

_TELL_EVERY_S = 0.5
_CLOSE_S = 1.0
_STOPPED = 130

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


class Jobs:
    """All of them, by name. Methods may be called from any thread; none waits but `look`, `free` and `close`, for a moment."""

    def __init__(self) -> None:
        self.tell: Callable[[Job], None] = lambda job: None
        """Is called in a thread, at every change of a state, and twice a second meanwhile."""
        self._lock = threading.RLock()
        self._jobs: dict[str, Job] = {}
        self._children: dict[str, Child] = {}
        self._arguments: dict[str, tuple[str, ...]] = {}
        self._ending: dict[str, Literal["pause", "cancel"]] = {}
        self._told: dict[str, float] = {}
        self._closed = False

    @property
    def jobs(self) -> Mapping[str, Job]:
        """What there is, also what is over until `dismiss`."""
        with self._lock:
            return dict(self._jobs)

    def look(self) -> None:
        """Find what was begun in earlier days, by the app or the command line. Reads folders: not for the UI thread."""
        from qwen2_converters.again import unfinished

        for one in unfinished(Store()):
            order = one.order
            name = order.name
            arguments = (*(part for target in order.targets for part in ("--to", target)), *(["--original"] if order.original else []))
            for option, value in (("--revision", order.revision), ("--source", order.source), ("--name", order.install_as)):
                arguments += (option, value) if value else ()
            # Whoever began it has accepted its licence.
            arguments += ("--accept-licence", *(["--discard-source"] if order.discard_source else []))
            with self._lock:
                known = self._jobs.get(name)
                if name not in self._children and (known is None or known.state != "failed"):
                    self._arguments[name] = arguments
                    self._jobs[name] = Job(name, phase="fetching", done=min(one.kept, one.total), total=one.total, state="paused", kept=one.kept)

    def plan(self, name: str, on_end: Callable[[Plan | None, str], None]) -> Child:
        """What fetching `name` would do; see `plan.look_up`. Asks the hub."""
        return look_up(name, on_end)

    def start(self, name: str, *, accept_licence: bool = False) -> None:
        """Fetch a model, as `qwen2-local pull NAME` does. accept_licence: a person has read and accepted it."""
        with self._lock:
            self._arguments[name] = ("--accept-licence",) if accept_licence else ()
        self.resume(name)

    def verify(self, name: str) -> None:
        """Read an installed model back, and compare it with its checksums."""
        self._begin(Job(name, "verify", "hashing"), ["verify", name, "--json", "--events"])

    def resume(self, name: str) -> None:
        """Go on with a fetch. Touches the network."""
        with self._lock:
            arguments = self._arguments.get(name, ())
            before = self._jobs.get(name, Job(name))
        # The name comes last: one that looks like an option would be one.
        job = Job(name, "fetch", "looking", done=before.done, total=before.total)
        self._begin(job, ["pull", "--yes", "--json", "--events", *arguments, "--", name])

    def pause(self, name: str) -> None:
        """Stop a fetch, and keep what has come; stop a verification."""
        self._stop(name, "pause")

    def cancel(self, name: str) -> None:
        """Stop a fetch, and delete what has come."""
        if self._stop(name, "cancel"):
            return
        with self._lock:
            job = self._jobs.get(name)
        if job is not None:
            threading.Thread(target=self._free, args=(job,), name="qwen2-local frees", daemon=True).start()

    def dismiss(self, name: str) -> None:
        """Forget what is over."""
        with self._lock:
            if name in self._jobs and self._jobs[name].state in ("done", "failed"):
                del self._jobs[name]

    def close(self) -> None:
        """Pause all. What takes longer ends by itself. Idempotent."""
        with self._lock:
            self._closed = True
            children = dict(self._children)
        for name, child in children.items():
            self._ending.setdefault(name, "pause")
            child.stop()
        until = time.monotonic() + _CLOSE_S
        for child in children.values():
            child.wait(max(0.0, until - time.monotonic()))

    def _begin(self, job: Job, arguments: list[str]) -> None:
        name = job.name
        with self._lock:
            if name in self._children or self._closed:
                return
            self._ending.pop(name, None)
            try:
                child = Child(arguments, on_event=partial(self._event, name), on_end=partial(self._ended, name), nice=NICE)
            except OSError as error:
                job = replace(job, state="failed", words=clean_line(f"No process can be started: {error.strerror}."))
            else:
                self._children[name] = child
            self._jobs[name] = job
        self.tell(job)

    def _stop(self, name: str, why: Literal["pause", "cancel"]) -> bool:
        with self._lock:
            child = self._children.get(name)
            if child is None:
                return False
            self._ending[name] = why
            job = self._jobs[name] = replace(self._jobs[name], phase="stopping", speed=0.0, left_s=None, words="")
        child.stop()
        self.tell(job)
        return True

    def _event(self, name: str, event: Mapping[str, Any]) -> None:
        phase, done, total = clean_line(str(event.get("phase", ""))), _count(event.get("done")), _count(event.get("total"))
        with self._lock:
            before = self._jobs[name]
            if name in self._ending:
                return
            if phase == "converting" and before.phase == "fetching" and before.done < before.total:
                # Both go on at once: what is fetched is what one waits for.
                job = replace(before, words=f"converting {done / total:.0%}" if total else "")
            else:
                words = before.words if phase == before.phase else ""
                job = replace(
                    before, phase=phase, done=done, total=total, speed=_number(event.get("speed")), left_s=_left(event.get("left_s")), words=words
                )
            self._jobs[name] = job
            now = time.monotonic()
            due = now - self._told.get(name, 0.0) >= _TELL_EVERY_S or job.phase != before.phase
            if due:
                self._told[name] = now
        if due:
            self.tell(job)

    def _ended(self, name: str, ended: Ended) -> None:
        with self._lock:
            self._children.pop(name, None)
            why = self._ending.pop(name, None)
            job = replace(self._jobs[name], speed=0.0, left_s=None)
        if why == "cancel":
            self._free(job)
            return
        if ended.code == 0:
            job = replace(job, state="done", done=job.total, words=_told_by(ended), models=_models(ended))
        elif why == "pause" or ended.code == _STOPPED:
            job = self._paused(job)
        else:
            job = replace(job, state="failed", words=_fault(job, ended))
        self._set(job)

    def _paused(self, job: Job) -> Job:
        """With what the store keeps of it."""
        from qwen2_converters.again import unfinished

        job = replace(job, state="paused", phase="", words="")
        if job.kind == "fetch":
            for one in unfinished(Store()):
                if one.order.name == job.name:
                    return replace(job, phase="fetching", done=min(one.kept, one.total), total=one.total, kept=one.kept)
        return job

    def _free(self, job: Job) -> None:
        """In a thread: what is kept of it goes."""
        from qwen2_converters.again import free, unfinished

        try:
            for one in unfinished(Store()):
                if one.order.name == job.name and job.kind == "fetch":
                    free(Store(), one)
        except (Qwen2LocalError, OSError) as error:
            self._set(replace(job, state="failed", words=clean_line(str(error))))
            return
        with self._lock:
            self._jobs.pop(job.name, None)
        self.tell(replace(job, state="cancelled", words=""))

    def _set(self, job: Job) -> None:
        with self._lock:
            self._jobs[job.name] = job
        self.tell(job)


def _fault(job: Job, ended: Ended) -> str:
    faults = ended.answer.get("faults")
    if job.kind == "verify" and isinstance(faults, (list, tuple)) and faults:
        return "\n".join(clean_line(str(fault)) for fault in faults[:5]) + f"\n`qwen2-local rm {job.name}`, then fetch it again."
    return ended.words.removeprefix("error: ") or f"It ended with the exit code {ended.code}."


def _told_by(ended: Ended) -> str:
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


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else 0.0


def _left(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None

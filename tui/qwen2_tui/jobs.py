"""Fetches and verifications: each a child process of our own command line, so that one goes on chatting meanwhile.

A fetch that is stopped, by a person, a crash or the end of the app, is kept by the store, and is here again as paused the next time (`look`).
No network is touched unless `plan`, `start` or `resume` is called.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from qwen2_local.errors import Qwen2LocalError
from qwen2_local.sanitize import clean_line
from qwen2_local.store import Store
from qwen2_tui.child import Child, Ended
from qwen2_tui.job import STOPPED, Job, over, told
from qwen2_tui.plan import Plan, look_up

__all__ = ["Job", "Jobs"]

NICE = 12
"""Behind a model that computes on all cores, a job gets about 6 % of one; else all there is."""

_TELL_EVERY_S = 0.5
_CLOSE_S = 1.0


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
        """What there is, also what is over."""
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
        with self._lock:
            before = self._jobs[name]
            if name in self._ending:
                return
            job = self._jobs[name] = told(before, event)
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
        if ended.code == 0:
            self._set(over(job, ended))
        elif why == "cancel" or (why == "pause" and job.kind == "verify"):
            self._free(job)
        else:
            self._set(self._paused(job) if why == "pause" or ended.code == STOPPED else over(job, ended))

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

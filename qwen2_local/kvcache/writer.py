"""Stores links on disk from a thread of its own, so that nobody who computes waits for a disk. What it cannot take in time is not stored."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from qwen2_local.errors import DoesNotFit
from qwen2_local.kvcache.chain import Link
from qwen2_local.kvcache.disk import Disk

_log = logging.getLogger(__name__)
_JOBS = 1000
_RETRY_S = 60.0
"""After the disk has refused a write, the next is tried so much later."""


@dataclass(frozen=True, slots=True)
class _Store:
    link: Link
    data: bytes


@dataclass(frozen=True, slots=True)
class _Use:
    path: tuple[Link, ...]


class Writer:
    """Stores what it is given in `disk`.

    limit: bytes that may wait. model: what to call the model they are of. tell: gets a sentence, once, when the disk refuses; from the
    writer's thread. It must not raise.
    """

    def __init__(self, disk: Disk, *, limit: int, model: str, tell: Callable[[str], None]) -> None:
        self._disk = disk
        self._limit = limit
        self._model = model
        self._tell: Callable[[str], None] | None = tell
        self._changed = threading.Condition()
        self._queue: deque[_Store | _Use] = deque()
        self._waiting = 0
        self._now: str | None = None
        self._busy = False
        self._closed = False
        self._thread: threading.Thread | None = None
        self._retry = 0.0

    def store(self, entries: Sequence[tuple[Link, bytes]]) -> None:
        """Store these soon; from the first one on that does not fit into what may wait, they are dropped. Returns at once."""
        with self._changed:
            for link, data in entries:
                if self._waiting + len(data) > self._limit:
                    break
                self._waiting += len(data)
                self._add(_Store(link, data))

    def use(self, path: Sequence[Link]) -> None:
        """The links of a sequence were used just now. Returns at once."""
        with self._changed:
            if len(self._queue) < _JOBS:  # else the disk hangs
                self._add(_Use(tuple(path)))

    def forget(self, names: Collection[str] | None) -> None:
        """Returns when nothing of these names (None: nothing at all) is being stored, nor will be because of an earlier `store`."""
        with self._changed:
            kept: deque[_Store | _Use] = deque()
            for job in self._queue:
                if isinstance(job, _Store) and (names is None or job.link.name in names):
                    self._waiting -= len(job.data)
                else:
                    kept.append(job)
            self._queue = kept
            self._changed.wait_for(lambda: self._now is None or (names is not None and self._now not in names))

    def flush(self, timeout: float) -> bool:
        """Wait, at most so many seconds, until all is stored that can be. Is it?"""
        with self._changed:
            return self._changed.wait_for(lambda: not self._queue and not self._busy, timeout)

    def close(self, timeout: float) -> bool:
        """`flush`, then end the thread; what is not stored by then never will be."""
        done = self.flush(timeout)
        with self._changed:
            self._closed = True
            self._queue.clear()
            self._waiting = 0
            self._changed.notify_all()
        if self._thread is not None and done:
            self._thread.join()
        return done

    def _add(self, job: _Store | _Use) -> None:
        if self._closed:
            return
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="kv-writer", daemon=True)
            thread.start()
            self._thread = thread
        self._queue.append(job)
        self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._busy, self._now = False, None
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._queue or self._closed)
                if self._closed:
                    return
                job = self._queue.popleft()
                self._busy = True
                if isinstance(job, _Store):
                    self._now = job.link.name
                    self._waiting -= len(job.data)
            try:
                if isinstance(job, _Use):
                    self._disk.touch(job.path)
                elif time.monotonic() >= self._retry:
                    self._store(job)
            except Exception:  # whoever waits for this thread would wait for ever
                _log.exception("The KV cache's writer failed; it goes on.")
            del job  # its data may be large

    def _store(self, job: _Store) -> None:
        try:
            self._disk.write(job.link, job.data, self._model)
        except (OSError, DoesNotFit, ValueError, MemoryError) as error:
            self._retry = time.monotonic() + _RETRY_S
            if self._tell is not None:
                reason = error.what if isinstance(error, DoesNotFit) else f"{self._disk.folder} cannot be written ({error})."
                self._tell(f"What the model has read is kept in memory only, so it is read again the next time: {reason}")
                self._tell = None

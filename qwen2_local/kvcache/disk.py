"""The stored links of all models in one folder, by their names; the least recently used go when they take more than the budget.

    kv/                              0700
     └─ 1f3a9c0b77de2210/            a fingerprint (`chain.root_of`)
         ├─ about.json               {"model": "7b:q4_0"}
         └─ 4e/                      the first two digits of the parent, so that no folder grows large
             └─ 4e..-9b..-07c1..     a link: parent, own hash, sketch; 0600

A file is written aside and renamed, never changed, and only ever deleted; whoever has it open reads on. Its time of change is when it was
last used. Any number of processes may use one folder: none waits for another, and the budget is kept by each that writes.
"""

from __future__ import annotations

import json
import os
import re
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from qwen2_local import files
from qwen2_local.errors import DoesNotFit
from qwen2_local.kvcache import chain, record
from qwen2_local.kvcache.chain import Link

DEFAULT_BUDGET = 20 * 10**9
"""Bytes on disk, if a quarter of what is free is not less."""

_ABOUT = "about.json"
_FINGERPRINT = re.compile(r"[0-9a-f]{16}")
_PART = re.compile(r"[0-9a-f]{2}")
_OPENED = 16
"""The most promising files that are looked into for one lookup. Where more begin alike, at most 15 tokens of a match are missed."""

_MANY = 1000
"""With more files than this, a tenth of the budget is freed at once, as looking at all of them takes a while."""

_ABANDONED_S = 86400.0


@dataclass(frozen=True, slots=True)
class Stored:
    """What is stored under one fingerprint. fingerprint: 16 hexadecimal digits; model: as whoever stored it called it; used: seconds since 1970."""

    fingerprint: str
    model: str
    chunks: int
    bytes: int
    used: float


@dataclass(frozen=True, slots=True)
class _File:
    used: int
    size: int
    path: str


class Disk:
    """The links in `folder`, which is made when the first one is written. budget: in bytes; None: the default."""

    def __init__(self, folder: Path, budget: int | None = None) -> None:
        self.folder = folder
        self._budget = budget
        self._limit = DEFAULT_BUDGET if budget is None else budget
        self._total: int | None = None
        self._since = 0

    # Reading. Never raises for what lies there.

    def has(self, link: Link) -> bool:
        """Is there a file of that name? What it holds was not looked at."""
        return os.path.lexists(self._path(link.name))

    def closest(self, wanted: Link, least: int = 0) -> tuple[Link, int] | None:
        """The stored link of the same parent with the most tokens in common with `wanted`, and how many; None if none has more than `least`."""
        best = None
        for name, most in chain.closest(self._children(wanted), wanted)[:_OPENED]:
            if most <= least:
                break
            found = self._peek(name, wanted.start)
            if found is not None and (count := chain.common(found.packed, wanted.packed)) > least:
                best, least = (found, count), count
        return best

    def read(self, link: Link) -> bytes | None:
        """The data of a link; None if it is not there, or damaged (then it is deleted)."""
        if not self._sound(link.name):
            return None
        try:
            return record.read(self._path(link.name), link)
        except record.Damaged:
            self._discard(link.name)
        except (OSError, MemoryError):
            pass
        return None

    def _peek(self, name: str, start: int) -> Link | None:
        if not chain.is_name(name) or not self._sound(name):
            return None
        try:
            found = record.peek(self._path(name), start)
        except record.Damaged:
            found = None
        except OSError:
            return None
        if found is None or found.name != name:
            self._discard(name)
            return None
        return found

    def _children(self, link: Link) -> list[str]:
        """What has a name that begins as those of the links of the same parent; not all may be names."""
        folder, start = self._path(link.family).parent, link.family.rpartition("/")[2]
        with suppress(OSError):
            return [f"{link.name[:17]}{name}" for name in os.listdir(folder) if name.startswith(start)]  # noqa: PTH208 (names are enough)
        return []

    # Writing

    def write(self, link: Link, data: bytes, model: str = "") -> bool:
        """Store a link, and delete those that it begins with. False if it is too large for the budget. Raises OSError, DoesNotFit (disk full).

        A link is no use without those before it, so it is also too large if all of them together are.
        """
        if self.has(link):
            return True
        size = record.size_of(link, len(data))
        if self._total is None or self._since > self._limit // 20:  # others store, too
            self._measure()
        if size * link.end > self._limit * link.count:
            return False
        self._make_room(size)
        try:
            self._put(link, data, model)
        except FileNotFoundError:  # somebody has just deleted the empty folder
            self._put(link, data, model)
        except DoesNotFit:
            self._total = None  # the default budget shrinks with what is free
            raise
        assert self._total is not None
        self._total += size
        self._since += size
        older = [name for name in self._children(link) if name != link.name]
        if older:
            for name in link.beginnings().intersection(older):
                self.remove(name)
        return True

    def touch(self, links: Sequence[Link]) -> None:
        """These were used just now, the first the most recently: a link is no use without those before it."""
        now = time.time_ns()
        for place, one in enumerate(links):
            with suppress(OSError):
                stamp = now - place * 1000
                os.utime(self._path(one.name), ns=(stamp, stamp), follow_symlinks=False)

    def remove(self, name: str) -> None:
        """Delete the link of that name, if it is there. What is no name is ignored; raises OSError where nothing can be deleted."""
        if chain.is_name(name):
            self._path(name).unlink(missing_ok=True)

    def clear(self, model: str | None = None) -> int:
        """Delete what is stored of all models, or of one (its name or a fingerprint); how many bytes that frees.

        Raises OSError where nothing can be deleted.
        """
        freed = 0
        for folder in list(self._fingerprints()):
            if model is not None and model not in (_about(folder), folder.name):
                continue
            for one in self._scan(folder):
                Path(one.path).unlink(missing_ok=True)
                freed += one.size
            _remove_empty(folder)
        self._total = None
        return freed

    def stored(self) -> list[Stored]:
        """What is stored, by fingerprint. Never raises for what lies there."""
        found = []
        for folder in self._fingerprints():
            held = list(self._scan(folder))
            if held:
                used = max(one.used for one in held) / 1e9
                found.append(Stored(folder.name, _about(folder), len(held), sum(one.size for one in held), used))
        return sorted(found, key=lambda one: (one.model, one.fingerprint))

    def names(self) -> list[str]:
        """The names of all stored links."""
        return [f"{folder.name}/{Path(one.path).name}" for folder in self._fingerprints() for one in self._scan(folder)]

    def used(self) -> int:
        """Bytes of all stored links. Looks at every file."""
        return sum(one.size for folder in self._fingerprints() for one in self._scan(folder))

    def limit(self, used: int) -> int:
        """The budget in bytes, when so many are used. The default one depends on the disk: 20 GB, or a quarter of what could be used."""
        if self._budget is not None:
            return self._budget
        return min(DEFAULT_BUDGET, (files.free_bytes(self.folder) + used) // 4)

    def _put(self, link: Link, data: bytes, model: str) -> None:
        path = self._path(link.name)
        self._make(path.parent.parent, path.parent)
        about = path.parent.parent / _ABOUT
        if model and not os.path.lexists(about):
            files.write_atomic(about, json.dumps({"model": model[:200]}))
        with files.staging_file(path, overwrite=True, needed=record.size_of(link, len(data)), durable=False) as temporary:
            handle = os.open(temporary, os.O_WRONLY | os.O_CLOEXEC)
            try:
                files.write_all(handle, record.head(link, data))
                files.write_all(handle, data)
            finally:
                os.close(handle)

    def _make(self, *folders: Path) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = self.folder.stat()
        if state.st_mode & 0o077 and state.st_uid == os.geteuid():
            self.folder.chmod(0o700)
        for folder in folders:
            with suppress(FileExistsError):
                folder.mkdir(mode=0o700)
            if not _is_folder(folder):
                folder.unlink(missing_ok=True)  # a file, or a link out of here
                folder.mkdir(mode=0o700)

    def _sound(self, name: str) -> bool:
        """Are the folders on the way to a link folders, no symbolic links?"""
        folder = self._path(name).parent
        return _is_folder(folder) and _is_folder(folder.parent)

    def _discard(self, name: str) -> None:
        """Delete what is not what its name says."""
        path = self._path(name)
        with suppress(OSError):
            if _is_folder(path):
                files.remove_folder(path)
            else:
                path.unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        fingerprint, _, rest = name.partition("/")
        return self.folder / fingerprint / rest[:2] / rest

    # The budget

    def _measure(self) -> list[_File]:
        held = [one for folder in list(self._fingerprints()) for one in self._tidy(folder)]
        self._total = sum(one.size for one in held)
        self._since = 0
        self._limit = self.limit(self._total)
        return held

    def _make_room(self, size: int) -> None:
        assert self._total is not None
        if self._total + size <= self._limit:
            return
        held = sorted(self._measure(), key=lambda one: one.used)
        spare = self._limit // 10 if len(held) > _MANY else 0
        for one in held:
            if self._total + size <= self._limit - spare:
                break
            Path(one.path).unlink(missing_ok=True)
            self._total -= one.size

    def _tidy(self, folder: Path) -> Iterator[_File]:
        """All links in a fingerprint's folder. Sweeps what crashes left, and the folder if nothing is in it for a day.

        A time to come is from a clock that was wrong: such a file would never be the least recently used one.
        """
        now = time.time_ns()
        empty = True
        for part in _parts(folder):
            for one in _links(folder, part, sweep=True):
                empty = False
                if one.used > now:
                    with suppress(OSError):
                        os.utime(one.path, ns=(now, now), follow_symlinks=False)
                    one = _File(now, one.size, one.path)
                yield one
            time.sleep(0)  # let whoever computes go on
        if empty:
            with suppress(OSError):
                if now / 1e9 - folder.stat().st_mtime > _ABANDONED_S:
                    _remove_empty(folder)

    def _scan(self, folder: Path) -> Iterator[_File]:
        for part in _parts(folder):
            yield from _links(folder, part)

    def _fingerprints(self) -> Iterator[Path]:
        yield from _folders(self.folder, _FINGERPRINT)


def _folders(folder: Path, pattern: re.Pattern[str]) -> Iterator[Path]:
    with suppress(OSError):
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if pattern.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                yield Path(entry.path)


def _parts(folder: Path) -> Iterator[Path]:
    yield from _folders(folder, _PART)


def _links(folder: Path, part: Path, *, sweep: bool = False) -> Iterator[_File]:
    """What has a link's name in a part of a fingerprint's folder. sweep: delete what crashes have left."""
    start, unfinished = f"{folder.name}/", False
    with suppress(OSError), os.scandir(part) as entries:
        for entry in entries:
            if chain.is_name(start + entry.name):
                with suppress(FileNotFoundError):
                    state = entry.stat(follow_symlinks=False)
                    if not stat.S_ISDIR(state.st_mode):
                        yield _File(state.st_mtime_ns, state.st_size, entry.path)
            else:
                unfinished = True
    if sweep and unfinished:
        files.sweep(part)


def _is_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except OSError:
        return False


def _about(folder: Path) -> str:
    """What the model of a fingerprint's folder was called; "" if nobody knows."""
    try:
        handle = os.open(folder / _ABOUT, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            said = json.loads(os.read(handle, 4096))
        finally:
            os.close(handle)
    except (OSError, ValueError, RecursionError):
        return ""
    model = said.get("model") if isinstance(said, dict) else None
    return model if isinstance(model, str) else ""


def _remove_empty(folder: Path) -> None:
    """Delete a fingerprint's folder, unless somebody has just stored something there."""
    with suppress(OSError):
        for part in _parts(folder):
            files.sweep(part)
            with suppress(OSError):
                part.rmdir()
        if not any(_parts(folder)):
            (folder / _ABOUT).unlink(missing_ok=True)
            files.sweep(folder)
            folder.rmdir()

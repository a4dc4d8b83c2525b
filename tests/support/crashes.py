"""Crashes on command: kills a process at any of its writes, or takes away all that it had not synced.

Both watch the functions of `os` that change files. Code that writes otherwise would be missed, so opening a file for writing with Python's own
`open` is an error here.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHANGES = ("open", "write", "pwrite", "ftruncate", "fsync", "mkdir", "rename", "replace", "link", "unlink", "rmdir")


def _path_of(first: Any, dir_fd: int | None) -> str:
    """What an argument means: an open file, or a path."""
    if isinstance(first, int):
        return str(Path(f"/proc/self/fd/{first}").readlink())
    path = os.fsdecode(first)
    return path if dir_fd is None else str(Path(f"/proc/self/fd/{dir_fd}").readlink() / path)


@contextmanager
def watched(folder: Path, see: Callable[[str, tuple[Any, ...], dict[str, Any], Callable[[], Any]], Any]) -> Iterator[None]:
    """Calls `see` (name, arguments, the call itself) for every change below `folder`. Nothing is synced really: that takes time."""
    plain = {name: getattr(os, name) for name in CHANGES}
    lock = threading.RLock()
    active = True

    def replacement(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if (name == "open" and not args[1] & os.O_CREAT) or not Path(_path_of(args[0], kwargs.get("dir_fd"))).is_relative_to(folder):
                return plain[name](*args, **kwargs)
            with lock:
                return see(name, args, kwargs, (lambda: None) if name == "fsync" else (lambda: plain[name](*args, **kwargs)))

        return call

    def audit(event: str, args: tuple[Any, ...]) -> None:
        # The system's open has no mode.
        if active and event == "open" and args[1] is not None and set(args[1]) & set("wax+") and str(args[0]).startswith(f"{folder}/"):
            raise AssertionError(f"{args[0]} is written by other means")

    sys.addaudithook(audit)
    for name in CHANGES:
        setattr(os, name, replacement(name))
    try:
        yield
    finally:
        active = False
        for name in CHANGES:
            setattr(os, name, plain[name])


@contextmanager
def counted(folder: Path) -> Iterator[list[str]]:
    """The names of all changes below `folder`, in their order."""
    seen: list[str] = []

    def see(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], call: Callable[[], Any]) -> Any:
        seen.append(name)
        return call()

    with watched(folder, see):
        yield seen


def killed(folder: Path, point: int, work: Callable[[], object], *, torn: bool) -> bool:
    """Does `work` in a child process that is killed before its change number `point` below `folder`. False if it had fewer.

    torn: it is killed in the middle instead, if that change is a write.
    """
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            return True
        assert status == 0, f"the child ended with {status}"
        return False
    number = 0

    def see(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], call: Callable[[], Any]) -> Any:
        nonlocal number
        number += 1
        if number > point:
            if torn and name in ("write", "pwrite"):
                getattr(os_plain, name)(args[0], bytes(args[1])[: len(args[1]) // 2], *args[2:])
            os.kill(os.getpid(), signal.SIGKILL)
        return call()

    os_plain = _Plain(os.write, os.pwrite)
    code = 1
    try:
        with watched(folder, see):
            work()
        code = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


@dataclass(frozen=True)
class _Plain:
    write: Any
    pwrite: Any


# Unsynced writes


@dataclass(eq=False)
class _File:
    """data: what it holds; durable: what survives a crash."""

    data: bytearray = field(default_factory=bytearray)
    durable: bytes = b""


@dataclass(eq=False)
class _Folder:
    entries: dict[str, _File | _Folder] = field(default_factory=dict)
    durable: dict[str, _File | _Folder] = field(default_factory=dict)


@dataclass
class Log:
    """All changes below `folder`, to be done again up to any of them."""

    folder: Path
    before: dict[str, Any]
    changes: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)

    def rebuild(self, count: int, place: Path, *, names: bool) -> None:
        """Makes the empty folder `place` what the disk may hold when the system fails after `count` changes: of files only what was synced.

        names: creations, renames and deletions, on the other hand, have all reached the disk; else only those of synced folders.
        """
        disk = _Disk(self.folder, _load(self.before))
        for name, args in self.changes[:count]:
            getattr(disk, name)(*args)
        _store(disk.root, place, names=names)


def recorded(folder: Path, work: Callable[[], object]) -> Log:
    """Does `work` and writes down what it changes below `folder`."""
    log = Log(folder, _snapshot(folder))

    def see(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], call: Callable[[], Any]) -> Any:
        path = _path_of(args[0], kwargs.get("dir_fd"))
        result = call()
        match name:
            case "open":
                log.changes.append(("create", (path, bool(args[1] & os.O_TRUNC))))
            case "write":
                end = os.lseek(args[0], 0, os.SEEK_CUR)
                log.changes.append(("put", (path, bytes(args[1])[:result], end - result)))
            case "pwrite":
                log.changes.append(("put", (path, bytes(args[1])[:result], args[2])))
            case "ftruncate":
                log.changes.append(("cut", (path, args[1])))
            case "fsync" | "mkdir" | "unlink" | "rmdir":
                log.changes.append((name, (path,)))
            case "rename" | "replace":
                log.changes.append(("rename", (path, _path_of(args[1], None))))
            case "link":
                log.changes.append(("link", (path, _path_of(args[1], None))))
        return result

    with watched(folder, see):
        work()
    return log


class _Disk:
    def __init__(self, folder: Path, root: _Folder) -> None:
        self.folder = folder
        self.root = root

    def _find(self, path: str) -> tuple[_Folder, str]:
        parts = Path(path).relative_to(self.folder).parts
        here = self.root
        for part in parts[:-1]:
            inner = here.entries[part]
            assert isinstance(inner, _Folder)
            here = inner
        return here, parts[-1] if parts else ""

    def _file(self, path: str) -> _File | None:
        # Of a file that was deleted or renamed while open, nothing is written any more.
        folder, name = self._find(path.removesuffix(" (deleted)"))
        found = folder.entries.get(name)
        return found if isinstance(found, _File) else None

    def create(self, path: str, truncate: bool) -> None:
        folder, name = self._find(path)
        file = folder.entries.setdefault(name, _File())
        assert isinstance(file, _File)
        if truncate:
            file.data = bytearray()

    def put(self, path: str, data: bytes, offset: int) -> None:
        if file := self._file(path):
            file.data.extend(bytes(max(0, offset + len(data) - len(file.data))))
            file.data[offset : offset + len(data)] = data

    def cut(self, path: str, size: int) -> None:
        if file := self._file(path):
            file.data = file.data[:size].ljust(size, b"\0")

    def fsync(self, path: str) -> None:
        folder, name = self._find(path.removesuffix(" (deleted)"))
        found = folder.entries.get(name) if name else self.root
        if isinstance(found, _File):
            found.durable = bytes(found.data)
        elif found is not None:
            gone = set(map(id, found.entries.values())) - set(map(id, found.durable.values()))
            found.durable = dict(found.entries)
            # A rename is in both folders, or in none.
            for other in _folders(self.root):
                if other is not found:
                    kept = {name: inner for name, inner in other.durable.items() if id(inner) not in gone or other.entries.get(name) is inner}
                    other.durable = kept

    def mkdir(self, path: str) -> None:
        folder, name = self._find(path)
        folder.entries[name] = _Folder()

    def unlink(self, path: str) -> None:
        folder, name = self._find(path)
        del folder.entries[name]

    rmdir = unlink

    def rename(self, path: str, to: str) -> None:
        folder, name = self._find(path)
        other, other_name = self._find(to)
        other.entries[other_name] = folder.entries.pop(name)

    def link(self, path: str, to: str) -> None:
        folder, name = self._find(path)
        other, other_name = self._find(to)
        other.entries[other_name] = folder.entries[name]


def _folders(root: _Folder) -> Iterator[_Folder]:
    yield root
    inner = {id(one): one for one in (*root.entries.values(), *root.durable.values())}
    for one in inner.values():
        if isinstance(one, _Folder):
            yield from _folders(one)


def _snapshot(folder: Path) -> dict[str, Any]:
    return {path.name: _snapshot(path) if path.is_dir() else path.read_bytes() for path in folder.iterdir()}


def _load(snapshot: dict[str, Any]) -> _Folder:
    entries = {name: _load(one) if isinstance(one, dict) else _File(bytearray(one), one) for name, one in snapshot.items()}
    return _Folder(entries, dict(entries))


def _store(folder: _Folder, place: Path, *, names: bool, stored: dict[int, Path] | None = None) -> None:
    stored = {} if stored is None else stored
    for name, one in (folder.entries if names else folder.durable).items():
        if isinstance(one, _Folder):
            (place / name).mkdir(mode=0o700)
            _store(one, place / name, names=names, stored=stored)
        elif id(one) in stored:
            (place / name).hardlink_to(stored[id(one)])
        else:
            stored[id(one)] = place / name
            (place / name).write_bytes(one.durable.ljust(len(one.data), b"\0")[: len(one.data)] if names else one.durable)

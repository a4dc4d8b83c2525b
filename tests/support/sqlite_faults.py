"""SQLite's writes, watched from inside the process: to be killed at any of them, or to have one fail.

SQLite's way to files (its "unix" VFS) lets its system calls be replaced (`xSetSystemCall`), which its own tests use for the same.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_POINTER = ctypes.c_void_p
_WRITE = ctypes.CFUNCTYPE(ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64, use_errno=True)
_CUT = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_int64, use_errno=True)
_UNLINK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, use_errno=True)
_CALLS = {b"pwrite": _WRITE, b"pwrite64": _WRITE, b"ftruncate": _CUT, b"unlink": _UNLINK}


class _Vfs(ctypes.Structure):
    _fields_ = (
        ("iVersion", ctypes.c_int),
        ("szOsFile", ctypes.c_int),
        ("mxPathname", ctypes.c_int),
        ("between", _POINTER * 16),  # functions that stay as they are
        ("xSetSystemCall", ctypes.CFUNCTYPE(ctypes.c_int, _POINTER, ctypes.c_char_p, _POINTER)),
        ("xGetSystemCall", ctypes.CFUNCTYPE(_POINTER, _POINTER, ctypes.c_char_p)),
    )


def _vfs() -> ctypes._Pointer[_Vfs] | None:
    import _sqlite3

    try:
        # Its own symbols, or those of the library that it was linked with.
        find = ctypes.CDLL(_sqlite3.__file__).sqlite3_vfs_find
    except (AttributeError, OSError):
        return None
    find.restype, find.argtypes = ctypes.POINTER(_Vfs), [ctypes.c_char_p]
    found = find(None)
    return found if found and found.contents.iVersion >= 3 else None


AVAILABLE = sys.platform == "linux" and _vfs() is not None


@contextmanager
def watched(see: Callable[[str, Callable[[], int], Callable[[], None]], int]) -> Iterator[None]:
    """Calls `see` for every change that SQLite makes to a file: (name of the call, the call, half of it) -> its result."""
    vfs = _vfs()
    assert vfs is not None
    plain: dict[bytes, int | None] = {}
    kept = []
    for name, kind in _CALLS.items():
        pointer = vfs.contents.xGetSystemCall(vfs, name)
        if not pointer:
            continue
        plain[name] = pointer
        real = kind(pointer)

        def replacement(*args: object, name: bytes = name, real: Callable[..., int] = real, write: bool = kind is _WRITE) -> int:
            def half() -> None:
                if write:
                    real(args[0], args[1], int(args[2]) // 2, args[3])  # type: ignore[call-overload]

            return see(name.decode(), lambda: real(*args), half)

        callback = kind(replacement)
        kept.append(callback)
        assert vfs.contents.xSetSystemCall(vfs, name, ctypes.cast(callback, _POINTER)) == 0
    try:
        yield
    finally:
        for name, pointer in plain.items():
            vfs.contents.xSetSystemCall(vfs, name, pointer)
        kept.clear()


def counted(work: Callable[[], object]) -> int:
    """How many changes `work` makes."""
    count = 0

    def see(name: str, call: Callable[[], int], half: Callable[[], None]) -> int:
        nonlocal count
        count += 1
        return call()

    with watched(see):
        work()
    return count


def killed(point: int, work: Callable[[], object], *, torn: bool, errors: Path) -> None:
    """Does `work` in a child process, which is killed before SQLite's change number `point`; torn: in its middle.

    errors: where it writes what goes wrong before that.
    """
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), errors.read_text() if errors.exists() else "the child ended by itself"
        return
    number = 0

    def see(name: str, call: Callable[[], int], half: Callable[[], None]) -> int:
        nonlocal number
        number += 1
        if number > point:
            if torn:
                half()
            os.kill(os.getpid(), signal.SIGKILL)
        return call()

    try:
        with watched(see):
            work()
    except BaseException as error:
        errors.write_text(f"{type(error).__name__}: {error}")
    finally:
        os._exit(1)


@contextmanager
def full_disk(point: int, *, ever_after: bool) -> Iterator[None]:
    """The disk is full at SQLite's write number `point`: at that alone, or from there on."""
    number = 0

    def see(name: str, call: Callable[[], int], half: Callable[[], None]) -> int:
        nonlocal number
        if name.startswith("pwrite"):
            number += 1
            if number > point if ever_after else number == point + 1:
                ctypes.set_errno(errno.ENOSPC)
                return -1
        return call()

    with watched(see):
        yield

"""Files that are whole or not there: atomic writes, files and folders built aside and published by a rename, locks, checked names, disk space.

Unfinished work lies beside what it is to become, locked by its maker, under a name of its own:

    .qwen2-0123456789abcdef        what is being made, or deleted
    .qwen2-old-0123456789abcdef    holds a folder while another takes its place
    .qwen2-partial-NAME            what is being made of NAME, and kept to go on with after a crash

`sweep` deletes the first kind and puts back what the second holds, once nobody holds them any more; the third kind when it is a week old. So
it may be used in any folder.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import stat
import time
import unicodedata
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import BinaryIO

from qwen2_local.errors import BadFile, DoesNotFit, UsageError

_UNFINISHED = ".qwen2-"
_REPLACED = ".qwen2-old-"
_PARTIAL = ".qwen2-partial-"
_LEFTOVER = re.compile(r"\.qwen2-(old-)?[0-9a-f]{16}")
_OURS = re.compile(rf"{_LEFTOVER.pattern}|{re.escape(_PARTIAL)}.")
_PARTIAL_LOCK = "lock"
_KEEP_PARTIAL_S = 7 * 86400.0
_LONGEST_NAME = 200
_COPY = 1 << 20
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)
_LOCK_PAUSE = 0.05
_TELL_AGAIN = 1.0
_GET_AGAIN = "Get the files from their original source."
_EXISTS = "Delete it first, or choose another name."


# Names


def safe_name(name: str, where: str = "a listing") -> str:
    """`name` if it is one plain file name on every platform; else raises BadFile. `where` says who gave the name."""
    reason = ""
    if not name or name in (".", ".."):
        reason = "it is no file name"
    elif "/" in name or "\\" in name:
        reason = "it holds a path separator"
    elif any(unicodedata.category(c) in ("Cc", "Cs", "Cf") for c in name):
        reason = "it holds a control character"
    elif ":" in name or any(c in '<>"|?*' for c in name) or name[-1] in ". " or _RESERVED.fullmatch(name):
        reason = "it means something else on some systems"
    elif len(name.encode()) > 255:
        reason = "it is longer than 255 bytes"
    if reason:
        raise BadFile(f"{where} names the file {name[:100]!r}, which is refused: {reason}.", hint=_GET_AGAIN)
    return name


def refuse_clashes(names: Iterable[str], where: str = "a listing") -> None:
    """Raises BadFile if two of `names` are one file on a file system that ignores case or normalizes Unicode."""
    seen: dict[str, str] = {}
    for name in names:
        folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
        if folded in seen:
            raise BadFile(f"{where} names both {seen[folded]!r} and {name!r}: one file on some systems.", hint=_GET_AGAIN)
        seen[folded] = name


def inside(root: Path, path: Path) -> Path:
    """`path` with every symbolic link resolved, if that lies in `root`; else raises BadFile."""
    resolved = path.resolve()
    if not resolved.is_relative_to(root.resolve()):
        raise BadFile(f"{path} is a link out of its folder, to {resolved}.", hint="Put the file itself there.")
    return resolved


# Disk


def free_bytes(path: Path) -> int:
    """Bytes free for this user where `path` is or would be."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def require_free(path: Path, needed: int) -> None:
    """Raises DoesNotFit unless `needed` bytes are free where `path` is or would be."""
    free = free_bytes(path)
    if free < needed:
        raise _disk_full(path, needed, free)


@contextmanager
def disk_errors(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turns a full disk (ENOSPC, EDQUOT) inside the block into DoesNotFit. `needed`: bytes that the block writes below `path`, if known.

    Other OSErrors about unfinished work name `path` instead, which is the name that somebody knows.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(path, needed, free_bytes(path)) from error
        if _OURS.search(str(error.filename)):
            error.filename = str(path)
        raise


def _disk_full(path: Path, needed: int | None, free: int) -> DoesNotFit:
    need = "" if needed is None else f"{needed / 1e9:.2f} GB are needed, "
    hint = "Free some space (`qwen2-local ls` shows what is installed)."
    return DoesNotFit(f"The disk is full at {path}: {need}{free / 1e9:.2f} GB are free.", hint=hint)


# Locks


@contextmanager
def lock(path: Path, *, what: str = "", wait_s: float = 0.0, on_wait: Callable[[str], None] | None = None) -> Iterator[int]:
    """Holds the lock file `path` for the block: one process, one thread at a time. The file stays. `what` it guards is for the message.

    Gives the file's handle.

    Waits up to `wait_s` seconds, and tells `on_wait` every second who holds it ("process 123"); then raises UsageError that names the holder.
    The system lets go of the lock when its process ends, however it ends.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + wait_s
        tell = time.monotonic()
        while not _try_lock(handle):
            holder = _holder(handle)
            if time.monotonic() >= deadline:
                raise UsageError(f"{what or path.name} is in use by {holder}.", hint="Wait until it is done, or end it.")
            if on_wait and time.monotonic() >= tell:
                on_wait(holder)
                tell = time.monotonic() + _TELL_AGAIN
            time.sleep(_LOCK_PAUSE)
        os.ftruncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)
        yield handle
    finally:
        os.close(handle)


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def _hold(handle: int) -> None:
    # NFS cannot lock a folder. Then it is not locked, and `sweep`, which cannot lock it either, leaves it alone.
    with suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_EX)


def _holder(handle: int) -> str:
    number = os.pread(handle, 20, 0).decode("ascii", "replace").strip()
    return f"process {number}" if number.isdigit() else "another process"


# Whole files and folders


def write_atomic(path: Path, data: bytes | str) -> None:
    """Writes `path`, mode 0600, so that a reader or a crash sees the old content or the new, never a part. Text is UTF-8.

    Raises DoesNotFit on a full disk, OSError otherwise; the old file is then as before.
    """
    raw = data.encode() if isinstance(data, str) else data
    with staging_file(path, overwrite=True, needed=len(raw)) as temporary:
        write_file(temporary, raw)


def write_file(path: Path, data: bytes | str | BinaryIO) -> None:
    """Writes `path`, mode 0600 if it is new, over what is there. For folders that are published later: a reader or a crash may see a part."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        if isinstance(data, (bytes, str)):
            write_all(handle, data.encode() if isinstance(data, str) else data)
        else:
            while chunk := data.read(_COPY):
                write_all(handle, chunk)
    finally:
        os.close(handle)


def write_all(handle: int, data: bytes | memoryview, offset: int | None = None) -> None:
    """Writes all of `data`, at its place in the file or from `offset` on. The system may take a part at a time."""
    view = memoryview(data)
    while view:
        count = os.write(handle, view) if offset is None else os.pwrite(handle, view, offset)
        view = view[count:]
        offset = None if offset is None else offset + count


@contextmanager
def staging_file(final: Path, *, overwrite: bool = False, needed: int | None = None, durable: bool = True) -> Iterator[Path]:
    """An empty file, mode 0600, to write: it becomes `final` when the block ends well, and is deleted when it does not.

    Raises UsageError if `final` exists (before the block, or because somebody else was faster), unless `overwrite`; DoesNotFit on a
    full disk, which says how many bytes are `needed`. durable: do not wait for the disk if not; after a power cut it may then be there in part.
    """
    if not overwrite:
        refuse_existing(final)
    with disk_errors(final, needed):
        temporary, handle = _claim_file(final.parent)
        try:
            yield temporary
            if durable:
                os.fsync(handle)
            publish(temporary, final, overwrite=overwrite, durable=durable)
        finally:
            with suppress(OSError):
                temporary.unlink()
            os.close(handle)


@contextmanager
def staging(final: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """The same for a folder, mode 0700. With `overwrite`, what a crash between the old one and the new one takes away, `sweep` puts back.

    Whoever lists finished folders by a manifest writes it as the last file of the block.
    """
    if not overwrite:
        refuse_existing(final)
    with disk_errors(final):
        folder, handle = _claim(final.parent)
        try:
            yield folder
            sync_tree(folder)
            publish(folder, final, overwrite=overwrite)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            os.close(handle)


@contextmanager
def partial(final: Path) -> Iterator[Path]:
    """A folder, mode 0700, to make `final` in, which is the same after a crash. Nobody else gets it during the block.

    It stays until `remove_folder`, or until it is forgotten for a week. Raises UsageError that names who holds it; OSError.
    """
    folder = partial_of(final)
    with disk_errors(final), ExitStack() as stack:
        while True:
            with suppress(FileExistsError):
                folder.mkdir(mode=0o700)
            state = folder.lstat()
            if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.geteuid():
                raise UsageError(f"{folder} is in the way: it is not a folder of yours.", hint="Delete it, or choose another place.")
            # Its last holder may delete it before letting go of the lock.
            with suppress(FileNotFoundError):
                handle = stack.enter_context(lock(folder / _PARTIAL_LOCK, what=str(final)))
                if os.path.samestat(os.fstat(handle), (folder / _PARTIAL_LOCK).stat()):
                    break
            stack.close()
        yield folder


def partial_of(final: Path) -> Path:
    """Where `partial` makes `final`, whether it is there or not."""
    name = final.name
    if len(os.fsencode(name)) > _LONGEST_NAME:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return final.parent / f"{_PARTIAL}{name}"


def final_of(folder: Path) -> Path:
    """What a folder of `partial` is to become. Of names that are too long for one, not the true one."""
    return folder.with_name(folder.name.removeprefix(_PARTIAL))


def used_bytes(folder: Path) -> int:
    """Bytes of disk that the files in `folder` take up; of sparse ones only what is written. 0 if it is not there."""
    return sum(path.lstat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def publish(made: Path, final: Path, *, overwrite: bool, durable: bool = True) -> None:
    """Moves a file or folder, whose content is on the disk, to its name in the same file system.

    Raises UsageError if there is something, unless `overwrite`. A file may then still have its old name, too.
    """
    if made.is_dir():
        with _set_aside(final) if overwrite else nullcontext():
            _publish(made, final)
    elif overwrite:
        made.replace(final)
    else:
        _publish_file(made, final)
    if durable:
        _sync_folder(final.parent)


def sync_tree(folder: Path) -> None:
    """Returns when all below `folder`, and its own entry, will survive a crash."""
    for path in folder.rglob("*"):
        (_sync_folder if path.is_dir() else _sync)(path)
    _sync_folder(folder)
    _sync_folder(folder.parent)


def refuse_existing(final: Path) -> None:
    """Raises UsageError if there is anything at `final`."""
    if os.path.lexists(final):
        raise UsageError(f"{final} exists.", hint=_EXISTS)


def _publish_file(temporary: Path, final: Path) -> None:
    """Unlike a rename, a link does not replace what somebody else has put there meanwhile."""
    try:
        os.link(temporary, final)
    except OSError:
        refuse_existing(final)
        # Some file systems, those of memory sticks say, have no links.
        temporary.rename(final)


def _publish(folder: Path, final: Path) -> None:
    try:
        folder.rename(final)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise UsageError(f"{final} exists: another process made it meanwhile.", hint=_EXISTS) from error
        raise


@contextmanager
def _set_aside(final: Path) -> Iterator[None]:
    """What is at `final`, if anything, is away in the block; for good if that ends well. If it does not, or crashes, it comes back."""
    holder, handle = _claim(final.parent, _REPLACED)
    try:
        with suppress(FileNotFoundError):
            final.rename(holder / final.name)
        yield
        remove_folder(holder)
    except BaseException:
        with suppress(OSError):
            _put_back(holder)
            holder.rmdir()
        raise
    finally:
        os.close(handle)


def _put_back(holder: Path) -> None:
    for old in list(holder.iterdir()):
        if not os.path.lexists(holder.parent / old.name):
            old.rename(holder.parent / old.name)


def remove_folder(folder: Path) -> None:
    """Deletes `folder` so that it is there whole or not at all: renamed away first. What a crash leaves, `sweep` deletes."""
    trash = _unfinished(folder.parent)
    folder.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)


def sweep(parent: Path, *, keep: Container[Path] = ()) -> int:
    """Deletes the unfinished files and folders in `parent` whose makers are gone, and puts back what they had replaced; how many.

    What `partial` keeps is deleted when nobody has touched it for a week, but for those in `keep`.

    Touches nothing else. Never raises OSError.
    """
    swept = 0
    with suppress(OSError):
        for leftover in list(parent.iterdir()):
            if _LEFTOVER.fullmatch(leftover.name):
                with suppress(OSError):
                    swept += _sweep(leftover)
            elif leftover.name.startswith(_PARTIAL) and leftover not in keep:
                with suppress(OSError):
                    swept += _sweep_partial(leftover)
    return swept


def _sweep_partial(folder: Path) -> bool:
    if not stat.S_ISDIR(folder.lstat().st_mode):
        return False
    touched = max(path.lstat().st_mtime for path in [folder, *folder.iterdir()])
    if time.time() - touched < _KEEP_PARTIAL_S:
        return False
    handle = os.open(folder / _PARTIAL_LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        if not _try_lock(handle):
            return False
        remove_folder(folder)
        return True
    finally:
        os.close(handle)


def _sweep(leftover: Path) -> bool:
    handle = os.open(leftover, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not _try_lock(handle):
            return False
        if leftover.is_dir():
            if leftover.name.startswith(_REPLACED):
                _put_back(leftover)
            remove_folder(leftover)
        else:
            leftover.unlink()
        return True
    finally:
        os.close(handle)


def _unfinished(parent: Path, start: str = _UNFINISHED) -> Path:
    return parent / f"{start}{secrets.token_hex(8)}"


def _claim_file(parent: Path) -> tuple[Path, int]:
    """A new locked file in `parent`, and the handle that holds its lock."""
    while True:
        file = _unfinished(parent)
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        _hold(handle)
        if file.exists():
            return file, handle
        os.close(handle)  # Swept before the lock.


def _claim(parent: Path, start: str = _UNFINISHED) -> tuple[Path, int]:
    """A new locked folder in `parent`, and the handle that holds its lock."""
    while True:
        folder = _unfinished(parent, start)
        folder.mkdir(mode=0o700)
        try:
            handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # Swept between these two lines.
        _hold(handle)
        if folder.exists():
            return folder, handle
        os.close(handle)  # Swept before the lock.


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_folder(folder: Path) -> None:
    # Some file systems refuse to sync a folder; the rename is then as durable as they make it.
    with suppress(OSError):
        _sync(folder)


def sha256(path: Path, advance: Callable[[int], None] = lambda _: None) -> str:
    """The SHA-256 of a file, in hexadecimal. advance: gets the bytes that are done, now and then."""
    digest, done, buffer = hashlib.sha256(), 0, bytearray(_COPY)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
            done += count
            advance(done)
    return digest.hexdigest()

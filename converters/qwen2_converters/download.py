"""Fetches files into a folder: several at once, resumed to the byte, hashed on the way, renamed into place when right and not before."""

from __future__ import annotations

import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qwen2_converters import partial
from qwen2_converters.partial import Partial
from qwen2_converters.remote import Address, Phase, Progress, RemoteFile, Resolve
from qwen2_converters.retry import Patience, persist, stopped
from qwen2_converters.web import Timeouts, TryAgain, Web
from qwen2_local import files as disk
from qwen2_local.errors import BadFile, DoesNotFit, FetchFailed
from qwen2_local.formats.magic import not_a

if TYPE_CHECKING:
    import httpx2

MAX_RANGE = 64_000_000
"""Bytes that `read_range` gives at most."""

_HEAD = 512  # Bytes that tell a model file from a web page.
_REPORT_S = 0.05
_PAGES = (b"<!doctype", b"<html", b"version https://git-lfs")
_KEPT = "Run the same command again: what has come is kept."
_SOURCE = "It is not what its source announced. List what there is again, or use another source."


def download(
    files: Sequence[RemoteFile],
    folder: Path,
    *,
    progress: Callable[[Progress], None] | None = None,
    on_done: Callable[[RemoteFile, Path], None] | None = None,
    cancelled: threading.Event | None = None,
    parallel: int = 4,
    wait_s: float = 0.0,
    on_wait: Callable[[str], None] | None = None,
    patience: Patience | None = None,
    timeouts: Timeouts | None = None,
) -> dict[str, str]:
    """Fetches `files` into `folder`, which is made if need be, and gives the SHA-256 of each by its name.

    Files are begun in the order given, `parallel` at a time. One that is there already is hashed, and fetched only if it is wrong (or has
    neither hash nor ETag to tell). Half-fetched ones, NAME.part with its NAME.part.json, are resumed, also after a kill -9. A wrong one
    is set aside as NAME.bad and fetched once more.

    progress, on_done (a file is whole, verified and in place): called in the caller's thread. What they raise ends the download.
    cancelled: set it from any thread to end the download soon; Ctrl-C does the same. What had come stays for the next time.
    wait_s, on_wait: for another process that downloads into the same folder; as `files.lock` takes them.

    Raises FetchFailed (Offline) when retries are used up, BadFile for what is not the announced file or has an unsafe name, DoesNotFit on a
    full disk (half-fetched files are then deleted), UsageError while another process is at it, Cancelled.
    """
    _check_names(files)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with disk.lock(folder.with_name(f".{folder.name}.fetch.lock"), what=f"The download into {folder}", wait_s=wait_s, on_wait=on_wait):
        disk.sweep(folder)
        missing = sum(max(0, file.size - _there(folder / file.name)) for file in files)
        disk.require_free(folder, missing)
        with Web(timeouts) as web:
            job = _Job(folder, web, patience or Patience(), missing)
            try:
                hashes = job.run(files, parallel, progress or (lambda _: None), on_done or (lambda *_: None), cancelled or threading.Event())
            except DoesNotFit:
                _tidy(files, folder)
                raise
        _tidy(files, folder)
    return hashes


def read_range(file: RemoteFile, start: int, stop: int, *, patience: Patience | None = None, timeouts: Timeouts | None = None) -> bytes:
    """Bytes `start` to `stop` of a file on a server, unverified: the header of a safetensors file, say.

    Raises FetchFailed (Offline) when retries are used up, BadFile for a server that has another size; ValueError beyond MAX_RANGE or the file.
    """
    if not 0 <= start < stop <= file.size or stop - start > MAX_RANGE:
        raise ValueError(f"{start} to {stop} is no range of {file.name}, or too long")

    def attempt(address: Address) -> bytes:
        with web.get(file.name, address, {"Range": f"bytes={start}-{stop - 1}"}) as response:
            begin = _begin(file, response, start, stop)
            if begin != start and stop > MAX_RANGE:
                raise FetchFailed(f"{file.name}: {response.url.host} cannot send a part of a file.", hint="Use another source.")
            got = bytearray()
            for chunk in response.iter_raw():
                got += chunk
                if begin + len(got) >= stop:
                    return bytes(got[start - begin : stop - begin])
        raise TryAgain(f"the answer of {response.url.host} is too short")

    with Web(timeouts) as web:
        return persist(file.name, file.resolve, attempt, lambda: 0, patience=patience or Patience(), stop=threading.Event())


@dataclass(frozen=True, slots=True)
class _Moved:
    phase: Phase
    file: RemoteFile
    done: int


@dataclass(frozen=True, slots=True)
class _Done:
    file: RemoteFile
    sha256: str


class _Job:
    """Threads that fetch, and a queue on which they tell the caller's thread what has happened."""

    def __init__(self, folder: Path, web: Web, patience: Patience, needed: int) -> None:
        self._folder = folder
        self._web = web
        self._patience = patience
        self._needed = needed
        self._stop = threading.Event()
        self._events: queue.SimpleQueue[_Moved | _Done | BaseException] = queue.SimpleQueue()

    def run(
        self,
        files: Sequence[RemoteFile],
        parallel: int,
        progress: Callable[[Progress], None],
        on_done: Callable[[RemoteFile, Path], None],
        cancelled: threading.Event,
    ) -> dict[str, str]:
        """As `download`."""
        todo: queue.SimpleQueue[RemoteFile] = queue.SimpleQueue()
        for file in files:
            todo.put(file)
        # Daemons: one that is stuck in a library does not keep the program from ending.
        threads = [threading.Thread(target=self._work, args=(todo,), daemon=True) for _ in range(min(parallel, len(files)))]
        done, hashes, total = dict.fromkeys((file.name for file in files), 0), dict[str, str](), sum(file.size for file in files)
        try:
            for thread in threads:
                thread.start()
            while len(hashes) < len(files):
                if cancelled.is_set():
                    raise stopped()
                try:
                    event = self._events.get(timeout=0.1)
                except queue.Empty:
                    continue
                if isinstance(event, BaseException):
                    raise event
                if isinstance(event, _Done):
                    hashes[event.file.name] = event.sha256
                    on_done(event.file, self._folder / event.file.name)
                else:
                    done[event.file.name] = event.done
                    progress(Progress(event.phase, event.file.name, event.done, event.file.size, sum(done.values()), total))
            return hashes
        finally:
            self._stop.set()
            self._web.hang_up()
            for thread in threads:
                # One that waits for an answer may do so for long yet. It touches no file any more: it looks at `_stop` first.
                while thread.is_alive() and not self._web.waits(thread):
                    thread.join(0.02)

    def _work(self, todo: queue.SimpleQueue[RemoteFile]) -> None:
        try:
            while not self._stop.is_set():
                try:
                    file = todo.get_nowait()
                except queue.Empty:
                    return
                with disk.disk_errors(self._folder, self._needed):
                    self._events.put(_Done(file, self._fetch(file)))
        except BaseException as error:  # It goes to the caller, whatever it is.
            self._events.put(error)

    def _fetch(self, file: RemoteFile) -> str:
        """Has `file` in its place, and gives its SHA-256."""
        final = self._folder / file.name
        for path in (final, partial.bad_name(final), *partial.part_names(final)):
            partial.plain_or_none(path)
        with self._reporting(file, "verifying") as report:
            present = partial.finished(file, final, report)
            if present:
                return present
            part = Partial(file, self._folder, report)
        sources = [file.resolve, *file.mirrors]
        with part:
            for turn in range(2):
                self._complete(part, sources[turn:] + sources[:turn])
                if part.right():
                    return part.publish()
                part.set_aside()
        hint = f"It is kept as {partial.bad_name(final)}. Try another source."
        raise BadFile(f"{file.name} is damaged at its source: twice its {file.checked_by} was wrong.", hint=hint)

    def _complete(self, part: Partial, sources: Sequence[Resolve]) -> None:
        """Fetches what is missing, from the first source that gives it. Raises what went wrong with the first one if none does."""
        failure: FetchFailed | BadFile | None = None
        with self._reporting(part.file, "fetching") as report:
            for resolve in sources:
                try:
                    persist(part.file.name, resolve, lambda address: self._attempt(part, address, report), lambda: part.length,
                            patience=self._patience, stop=self._stop)  # fmt: skip
                    return
                except (FetchFailed, BadFile) as error:
                    failure = failure or error
        if failure:
            raise failure

    def _attempt(self, part: Partial, address: Address, report: Callable[[int], None]) -> None:
        """One request for all that is missing, written as it comes."""
        file, start = part.file, part.length
        if start == file.size:
            return
        with self._web.get(file.name, address, {"Range": f"bytes={start}-"} if start else {}) as response:
            self._check_stop()
            chunks = response.iter_raw()
            head = _head(chunks) if start == 0 or response.status_code == 200 else b""
            # Before anything is thrown away: a network's log-in page must not cost what has come.
            _check_head(file.name, head)
            begin = _begin(file, response, start, file.size)
            version, host = _version(response), response.url.netloc.decode("ascii", "replace")
            if begin and _changed(part, version, host):
                part.restart("", "")
                raise TryAgain(f"the file has changed at {host}")
            if not begin:
                part.restart(version, host)
            for chunk in _chain(head, chunks):
                self._check_stop()
                if part.length + len(chunk) > file.size:
                    part.restart("", "")
                    raise BadFile(f"{file.name} does not end: {host} sends more than its {file.size} bytes.", hint=_SOURCE)
                part.write(chunk)
                report(part.length)
        if part.length < file.size:
            raise TryAgain(f"{host} ended {file.size - part.length} bytes too early")

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise stopped()

    @contextmanager
    def _reporting(self, file: RemoteFile, phase: Phase) -> Iterator[Callable[[int], None]]:
        """Sends on how many bytes are there, not more often than anybody can look, and ends early when told to stop."""
        last, told = 0.0, -1

        def report(done: int) -> None:
            nonlocal last, told
            self._check_stop()
            now = time.monotonic()
            if (now - last >= _REPORT_S or done == file.size) and done != told:
                last, told = now, done
                self._events.put(_Moved(phase, file, done))

        yield report


def _check_names(files: Sequence[RemoteFile]) -> None:
    for file in files:
        disk.safe_name(file.name)
        disk.safe_name(f"{file.name}.part.json")
    disk.refuse_clashes(name for file in files for name in (file.name, f"{file.name}.part", f"{file.name}.part.json", f"{file.name}.bad"))


def _tidy(files: Sequence[RemoteFile], folder: Path) -> None:
    for file in files:
        partial.discard(folder / file.name)


def _there(final: Path) -> int:
    """Bytes of a file that need not be fetched, it seems."""
    sizes = [0]
    for path in (final, partial.part_names(final)[0]):
        with suppress(OSError):
            sizes.append(path.lstat().st_size)
    return max(sizes)


def _begin(file: RemoteFile, response: httpx2.Response, start: int, stop: int) -> int:
    """The offset that the body of `response` begins at: `start`, or 0 where the server ignores ranges. Checks all that it says of the size."""
    host = response.url.host
    length = response.headers.get("Content-Length", "")
    if response.status_code == 200:
        if length.isdecimal() and int(length[:20]) != file.size:
            raise BadFile(f"{file.name} has {length[:20]} bytes at {host}, {file.size} were announced.", hint=_SOURCE)
        return 0
    given = re.fullmatch(r"bytes (?:(\d{1,20})-(\d{1,20})|\*)/(\d{1,20}|\*)", response.headers.get("Content-Range", ""))
    if given and given[3] not in ("*", str(file.size)):
        raise BadFile(f"{file.name} has {given[3]} bytes at {host}, {file.size} were announced.", hint=_SOURCE)
    if response.status_code == 416 or not given or given[1] is None or (int(given[1]), int(given[2]) + 1) != (start, stop):
        raise TryAgain(f"{host} sends another part of the file than the one asked for")
    return start


def _version(response: httpx2.Response) -> str:
    """What tells one state of a file on a server from another. A weak ETag says nothing of the bytes."""
    etag = str(response.headers.get("ETag", ""))
    return (etag if etag and not etag.startswith("W/") else str(response.headers.get("Last-Modified", "")))[:1000]


def _changed(part: Partial, version: str, host: str) -> bool:
    """Whether the rest that `host` offers is of another file than the beginning. What has a hash is given the benefit of a doubt."""
    if part.file.checked_by == "size":
        return not version or version != part.version
    return host == part.host and bool(version and part.version) and version != part.version


def _head(chunks: Iterator[bytes]) -> bytes:
    head = b""
    for chunk in chunks:
        head += chunk
        if len(head) >= _HEAD:
            break
    return head


def _check_head(name: str, head: bytes) -> None:
    """Raises BadFile for what is no model file, by its first bytes, if there are any."""
    path = Path(name)
    if head and path.suffix == ".gguf" and not head.startswith(b"GGUF"):
        raise not_a("GGUF file", path, head)
    if head and path.suffix == ".safetensors" and head[8:9] != b"{":
        raise not_a("safetensors file", path, head)
    if head.lstrip().lower().startswith(_PAGES) and path.suffix not in (".md", ".html"):
        raise not_a("file of a model", path, head)


def _chain(head: bytes, chunks: Iterator[bytes]) -> Iterator[bytes]:
    if head:
        yield head
    yield from chunks

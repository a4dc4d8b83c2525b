"""`KvCache`: the links in RAM and on disk as one, for all models of a process."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qwen2_local.kvcache import chain
from qwen2_local.kvcache.chain import CHUNK, Link
from qwen2_local.kvcache.disk import Disk
from qwen2_local.kvcache.memory import Memory
from qwen2_local.kvcache.writer import Writer

if TYPE_CHECKING:  # it needs NumPy, which commands that only list or delete do not
    from qwen2_local.backends.base import Chunk

MEMORY = 512 << 20
"""Bytes that the links in RAM may take, by default."""

_WAITING = 256 << 20
_READERS = 4
_CLOSE_S = 5.0


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes that are kept: on disk (by all processes and models), and in this process's memory."""

    disk: int
    memory: int


@dataclass(frozen=True, slots=True)
class Hit:
    """A chunk to import. tokens: how many of its tokens are ours; fewer than the chunk's only in the last one: trim the sequence after it."""

    chunk: Chunk
    tokens: int


@dataclass(frozen=True, slots=True)
class _Known:
    """A link that was found. data: if it was in RAM. tokens: how many match."""

    link: Link
    data: bytes | None
    tokens: int


class Found:
    """What is known of a prompt: iterate for the chunks, in order, each read and checked when it is asked for.

    start: where the first begins; end: up to where tokens are known. A damaged file ends the iteration before that.
    """

    def __init__(self, start: int, known: Sequence[_Known], read: Callable[[Sequence[_Known], Sequence[_Known]], list[bytes | None]]) -> None:
        self.start = start
        self.end = start + sum(one.tokens for one in known)
        self._known = known
        self._read = read

    def __bool__(self) -> bool:
        return self.end > self.start

    def __iter__(self) -> Iterator[Hit]:
        from qwen2_local.backends.base import Chunk

        for first in range(0, len(self._known), _READERS):
            some = self._known[first : first + _READERS]
            for one, data in zip(some, self._read(some, self._known), strict=True):
                if data is None:
                    return
                yield Hit(Chunk(one.link.count, data), one.tokens)


class KvCache:
    """Chunks of KV by fingerprint and the tokens up to them. All methods may be called from any thread.

    folder: where they are stored; None: in RAM only. budget: bytes on disk, over all processes; None: 20 GB or a quarter of what is free.
    memory: bytes in RAM. model: what people call the model, for `cache` and `rm`. tell: gets a sentence, once, when the disk refuses; it is
    called from another thread and must not raise.

    Nothing that lies on the disk makes a method raise: it is a miss. A process that was forked off has no part in the cache: all is a miss.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        budget: int | None = None,
        memory: int = MEMORY,
        model: str = "",
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._process = os.getpid()
        self._closed = False
        self._lock = threading.Lock()
        self._memory = Memory(memory)
        self._disk = None if folder is None or budget == 0 else Disk(folder, budget)
        self._writer: Writer | None = None
        self._readers: ThreadPoolExecutor | None = None
        if self._disk is not None:
            self._writer = Writer(self._disk, limit=min(_WAITING, max(memory // 2, 64 << 20)), model=model, tell=tell)
            # At the interpreter's end, too: the thread is a daemon, so that a disk that hangs cannot keep the process.
            weakref.finalize(self, _finish, self._writer, self._process)

    def find(self, fingerprint: str, tokens: Sequence[int], start: int = 0) -> Found:
        """The longest beginning of `tokens` that is known, from `start` (a multiple of CHUNK) on; cheap, as it reads no KV.

        The last chunk may match in part: after an edit in the middle of a chunk all that is before the edit is still known.
        """
        if start % CHUNK:
            raise ValueError(f"{start} is not on a chunk's border")
        links = [] if self._is_out() else chain.links(fingerprint, tokens)
        known = self._known(links[start // CHUNK :])
        path = [*links[: start // CHUNK], *(one.link for one in known)]
        with self._lock:
            self._memory.use(path)
        if known and self._writer is not None:
            self._writer.use(path)
        return Found(start, known, self._read)

    def known(self, fingerprint: str, tokens: Sequence[int]) -> int:
        """How many of the first `tokens` `find` would find now; nothing counts as used by that."""
        return 0 if self._is_out() else sum(one.tokens for one in self._known(chain.links(fingerprint, tokens)))

    def missing(self, fingerprint: str, tokens: Sequence[int]) -> list[tuple[int, int]]:
        """The ranges of `tokens` (whole chunks, and the tail) that are neither in RAM nor on disk: what has to be exported for `save`."""
        if self._is_out():
            return []
        links = chain.links(fingerprint, tokens)
        with self._lock:
            absent = [link for link in links if link.name not in self._memory]
        return [(link.start, link.end) for link in absent if self._disk is None or not self._disk.has(link)]

    def save(
        self, fingerprint: str, tokens: Sequence[int], ranges: Sequence[tuple[int, int]], chunks: Iterable[Chunk], *, persist: bool = True
    ) -> tuple[str, ...]:
        """Keep the chunks of these ranges of `tokens` (as `missing` gave them), and all of `tokens` as just used. Returns their names.

        Those of the whole path, also of what was there already: who deletes the conversation deletes them all. Shorter tails that a new chunk
        begins with go. Storing is done later; what is too much for that is not stored. persist: else they stay in RAM.
        """
        if self._is_out():
            return ()
        links = chain.links(fingerprint, tokens)
        by_range = {(link.start, link.end): link for link in links}
        fresh = {}
        for place, chunk in zip(ranges, chunks, strict=True):
            link = by_range[place]
            if chunk.tokens != link.count:
                raise ValueError(f"a chunk of {chunk.tokens} tokens for {link.count}")
            fresh[link.name] = chunk.data if isinstance(chunk.data, bytes) else bytes(chunk.data)
        with self._lock:
            for link in reversed(links):  # so that the first ones stay where not all fit
                if link.name in fresh:
                    self._memory.put(link, fresh[link.name])
            self._memory.use(links)
            # What others have evicted from the disk meanwhile, or what was not to be stored until now.
            held = [(link, fresh.get(link.name) or self._memory.get(link.name)) for link in links]
        if persist and self._disk is not None and self._writer is not None:
            self._writer.store([(link, data) for link, data in held if data is not None and not self._disk.has(link)])
            self._writer.use(links)
        return tuple(link.name for link in links)

    def names(self, fingerprint: str, tokens: Sequence[int]) -> tuple[str, ...]:
        """The names of the chunks of `tokens`, as `save` gives them; whether they are kept or not."""
        return tuple(link.name for link in chain.links(fingerprint, tokens))

    def delete(self, names: Iterable[str]) -> None:
        """Delete chunks from RAM and disk; returns when they are gone. Those that are not there, and what is no name, are ignored.

        Raises OSError where files cannot be deleted.
        """
        names = frozenset(names)
        if self._is_out():
            return
        with self._lock:
            for name in names:
                self._memory.drop(name)
        if self._disk is not None and self._writer is not None:
            self._writer.forget(names)
            for name in names:
                self._disk.remove(name)

    def clear(self) -> None:
        """Delete everything, of all models. Raises OSError where files cannot be deleted."""
        if self._is_out():
            return
        with self._lock:
            self._memory.clear()
        if self._disk is not None and self._writer is not None:
            self._writer.forget(None)
            self._disk.clear()

    def sizes(self) -> Sizes:
        """What is kept now. Looks at every file."""
        return Sizes(0 if self._disk is None else self._disk.used(), self._memory.bytes)

    def flush(self, timeout: float = _CLOSE_S) -> bool:
        """Wait, at most so many seconds, until all that was saved is on disk (or refused). Is it?"""
        return self._writer is None or self._is_out() or self._writer.flush(timeout)

    def close(self, timeout: float = _CLOSE_S) -> None:
        """`flush`, and end the threads. Idempotent; after it all is a miss, and nothing is kept."""
        if self._is_out():
            return
        self._closed = True
        with self._lock:
            self._memory.clear()
            readers, self._readers = self._readers, None
        if readers is not None:
            readers.shutdown(wait=False)
        if self._writer is not None:
            self._writer.close(timeout)

    def _known(self, links: Sequence[Link]) -> list[_Known]:
        """The first of these links that are kept, and what of the next one is."""
        known: list[_Known] = []
        for link in links:
            with self._lock:
                data = self._memory.get(link.name)
            if data is not None or (self._disk is not None and self._disk.has(link)):
                known.append(_Known(link, data, link.count))
                continue
            known += self._closest(link)
            break
        return known

    def _closest(self, link: Link) -> list[_Known]:
        """The kept link that has the most tokens in common with one that is not kept, if there is any."""
        with self._lock:
            best = self._memory.closest(link)
            data = None if best is None else self._memory.get(best[0].name)
        if self._disk is not None and (other := self._disk.closest(link, best[1] if best else 0)) is not None:
            best, data = other, None
        return [] if best is None else [_Known(best[0], data, best[1])]

    def _read(self, known: Sequence[_Known], path: Sequence[_Known]) -> list[bytes | None]:
        """The data of some links of a path; None for those that are not there any more."""
        absent = [one.link for one in known if one.data is None]
        if self._disk is None or not absent:
            return [one.data for one in known]
        if len(absent) == 1:
            read = [self._disk.read(absent[0])]
        else:
            with self._lock:  # checksums take time, and the interpreter lets others go on meanwhile
                if self._closed:
                    return [None] * len(known)
                self._readers = self._readers or ThreadPoolExecutor(_READERS, "kv-reader")
                waiting = [self._readers.submit(self._disk.read, link) for link in absent]
            read = [one.result() for one in waiting]
        with self._lock:
            for link, data in zip(absent, read, strict=True):
                if data is not None:
                    self._memory.put(link, data)
            self._memory.use([one.link for one in path])
        fetched = iter(read)
        return [next(fetched) if one.data is None else one.data for one in known]

    def _is_out(self) -> bool:
        """Is it closed, or this a process that was forked off, in which locks may be held for ever?"""
        return self._closed or os.getpid() != self._process


def _finish(writer: Writer, process: int) -> None:
    if os.getpid() == process:
        writer.close(_CLOSE_S)

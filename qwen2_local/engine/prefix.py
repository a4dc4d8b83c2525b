"""What is known already of a prompt: by a sequence on the device, or by the KV cache. And what becomes of sequences whose requests are over."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence

from qwen2_local.backends.base import Chunk, Layout
from qwen2_local.engine.common import common
from qwen2_local.engine.device import Device, Held
from qwen2_local.engine.work import Work
from qwen2_local.kvcache import CHUNK, Hit, KvCache

_log = logging.getLogger("qwen2_local.engine")

_NEAR = 32
"""Tokens that are computed faster than they are fetched."""

_WORTH_FORKING = 64

_FETCHED = 16
"""Chunks of the KV cache that are in memory at once on their way to the device."""


class Prefixes:
    """Residents, which are sequences that no request uses now, and the KV cache. On the owner thread only."""

    def __init__(self, device: Device, kv: KvCache | None) -> None:
        self._device = device
        self._kv = kv
        self._residents: list[Held] = []
        """Least recently used first."""

    def place(self, work: Work, live: Iterable[Work]) -> None:
        """Give a work a sequence, with as much of its KV as is known. There has to be a slot, free or a resident's."""
        if work.parked is not None:
            self._free_slot()
            parked, work.parked = work.parked, None
            work.held = self._device.restore(parked, work.tokens, persist=work.persist)
        else:
            self._begin(work, [other.sequence for other in live])
        self._device.trim(work.sequence, work.reusable)

    def known(self, tokens: Sequence[int], live: Iterable[Work]) -> int:
        """How many of the first `tokens` `place` would not compute now. Changes nothing."""
        _, alike = _most_alike(tokens, [*(work.sequence for work in live), *self._residents])
        if self._kv is None or not self._device.exports:
            return alike
        return max(alike, self._kv.known(self._device.backend.fingerprint, tokens))

    def keep(self, held: Held) -> None:
        """The request of this sequence is over; it stays until its slot is needed."""
        if held.length:
            self._residents.append(held)
        else:
            self._device.free(held)

    def names(self, held: Held) -> tuple[str, ...]:
        """Under which names the KV cache keeps a sequence, or will."""
        if self._kv is None or not self._device.exports:
            return ()
        return self._kv.names(self._device.backend.fingerprint, held.tokens[: held.length])

    def parked_names(self, work: Work) -> tuple[str, ...]:
        """The same of one that waits: it may have been saved before its sequence left the device."""
        if self._kv is None or work.parked is None:
            return ()
        length = sum(chunk.tokens for chunk in work.parked.chunks)
        return self._kv.names(work.parked.fingerprint, work.tokens[:length])

    def save(self, held: Held, *, growing: bool = False) -> None:
        """Bring what is new of a sequence into the KV cache. growing: without its tail, which would soon be another."""
        end = held.length // CHUNK * CHUNK if growing else held.length
        if held.saved >= end:
            return
        held.saved = end
        if self._kv is None or not self._device.exports:
            return
        fingerprint, tokens = self._device.backend.fingerprint, held.tokens[:end]
        try:
            ranges = self._kv.missing(fingerprint, tokens)
            chunks = self._device.export(held, ranges)
            if len(chunks) == len(ranges):
                self._kv.save(fingerprint, tokens, ranges, chunks, persist=held.persist)
        except Exception:
            _log.exception("The KV cache failed; a sequence is not kept.")

    def save_next(self) -> bool:
        """Save a resident that has something new. Was there one?"""
        for held in self._residents:
            if held.saved < held.length:
                self.save(held)
                return True
        return False

    def to_move(self, layout: Layout, room: int) -> list[Held]:
        """Before another layout: the residents that go with it, at most `room`. The others are saved and given back."""
        fitting = [held for held in reversed(self._residents) if held.length <= layout.context]
        moving = fitting[: max(0, room)] if layout.yarn == self._device.layout.yarn and self._device.exports else []
        for held in list(self._residents):
            if held not in moving:
                self._give_up(held)
        return moving

    def forget_named(self, names: frozenset[str]) -> None:
        """Give back, and save no more, what would be kept under any of these names."""
        for held in [held for held in self._residents if not names.isdisjoint(self.names(held))]:
            self._residents.remove(held)
            self._device.free(held)

    def forget(self) -> None:
        """Nothing on the device is trusted any more."""
        self._residents.clear()

    def _begin(self, work: Work, live: Sequence[Held]) -> None:
        """A sequence for a new work: one that begins alike, or a fork of it, or an empty one; and behind that what the KV cache has."""
        wanted = work.tokens[: work.reusable]
        source, alike = _most_alike(wanted, [*live, *self._residents])
        resident = source is not None and source in self._residents
        alone = self._device.layout.sequences == 1
        if source is not None and resident and (alone or alike == source.length):
            self._take_over(source, work, alike)
        elif source is not None and alike >= _WORTH_FORKING and self._free_slot(spared=source):
            work.held = self._device.fork(source, alike, work.tokens, persist=work.persist)
        elif source is not None and resident and alike >= _WORTH_FORKING:
            self._take_over(source, work, alike)
        else:
            self._free_slot()
            work.held = self._device.open(work.tokens, persist=work.persist)
        self._fetch(work.sequence, wanted)

    def _take_over(self, held: Held, work: Work, length: int) -> None:
        self._residents.remove(held)
        work.held = held
        if length < held.length or not work.kept:
            self.save(held)
            self._device.trim(held, length)
        held.tokens, held.persist = work.tokens, work.persist

    def _fetch(self, held: Held, wanted: Sequence[int]) -> None:
        """Append what the KV cache has of a prompt, if that is more than the sequence has."""
        if self._kv is None or not self._device.exports or len(wanted) - held.length <= _NEAR:
            return
        known = start = held.length // CHUNK * CHUNK
        chunks: list[Chunk] = []
        for hit in self._found(wanted, start, held.length + _NEAR):
            # Side by side, sequences can only be put in as a whole.
            if len(chunks) == _FETCHED and self._device.layout.sequences == 1:
                self._device.trim(held, start)
                if not self._device.append(held, chunks):
                    return
                start, chunks = known, []
            chunks.append(hit.chunk)
            known += hit.tokens
        while chunks and start + sum(chunk.tokens for chunk in chunks) > self._device.layout.context:
            # The last one, which matches in part, is longer than the place that it would be cut to.
            chunks.pop()
            known = start + sum(chunk.tokens for chunk in chunks)
        if known <= held.length:
            return  # Its files were damaged.
        self._device.trim(held, start)
        if self._device.append(held, chunks):
            self._device.trim(held, known)
            held.saved = known

    def _found(self, wanted: Sequence[int], start: int, least: int) -> Iterator[Hit]:
        """What the KV cache has of a prompt from `start` on, if that is more than the first `least` tokens."""
        assert self._kv is not None
        try:
            found = self._kv.find(self._device.backend.fingerprint, wanted, start)
            if found.end > least:
                yield from found
        except Exception:
            _log.exception("The KV cache failed; what it has not given is computed again.")

    def _free_slot(self, *, spared: Held | None = None) -> bool:
        """Let the resident go that was used least recently, where all slots are taken. False if there is none but `spared`."""
        if self._device.free_slots:
            return True
        for held in self._residents:
            if held is not spared:
                self._give_up(held)
                return True
        return False

    def _give_up(self, held: Held) -> None:
        self._residents.remove(held)
        self.save(held)
        self._device.free(held)


def _most_alike(tokens: Sequence[int], sequences: Sequence[Held]) -> tuple[Held | None, int]:
    """The sequence that has the most of the first tokens in KV, the last one at a tie; and how many."""
    best, most = None, 0
    for held in sequences:
        alike = common(held.tokens[: min(held.length, len(tokens))], tokens)
        if alike >= most:
            best, most = held, alike
    return best, most

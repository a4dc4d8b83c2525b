"""The sequences on the device: opened, forked, moved from one layout to another, and given back."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from qwen2_local.backends.base import Backend, Chunk, Layout
from qwen2_local.errors import BackendError, DoesNotFit, Qwen2LocalError

_log = logging.getLogger("qwen2_local.engine")

_PARKED = 2048
"""Tokens whose KV is copied at once on its way out and in: that of a long sequence may take as much memory as there is."""


@dataclass(slots=True, eq=False)
class Held:
    """A sequence on the device.

    number: the backend's. tokens: of its text; the first `length` are in KV. persist: may it be kept on the disk? saved: how many of its
    tokens the KV cache has.
    """

    number: int
    tokens: list[int]
    length: int = 0
    persist: bool = True
    saved: int = 0


@dataclass(frozen=True, slots=True)
class Parked:
    """The KV of the first tokens of a sequence that left the device."""

    fingerprint: str
    chunks: Sequence[Chunk]


class Device:
    """A backend with its sequences counted. On the owner thread only."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.layout = backend.layout
        self.held = 0
        """Sequences that are open."""
        self.lost = False
        """Is there a slot that could not be freed or opened? `reset` then helps, once nobody is on the device."""
        self.exports = True
        """Can KV leave the device? Found out on the first try."""

    @property
    def free_slots(self) -> int:
        """How many sequences can still be opened."""
        return self.layout.sequences - self.held

    def open(self, tokens: list[int], *, persist: bool = True) -> Held:
        """An empty sequence for these tokens."""
        try:
            number = self.backend.open()
        except Exception:
            self.lost = True
            raise
        self.held += 1
        return Held(number, tokens, persist=persist)

    def fork(self, source: Held, length: int, tokens: list[int], *, persist: bool = True) -> Held:
        """A sequence that begins as another one does."""
        number = self.backend.fork(source.number, length)
        self.held += 1
        return Held(number, tokens, length, persist, min(source.saved, length))

    def trim(self, held: Held, length: int) -> None:
        """Keep the first `length` tokens."""
        if length < held.length:
            self.backend.trim(held.number, length)
            held.length = length
            held.saved = min(held.saved, length)

    def free(self, held: Held) -> None:
        """Give a sequence back. Where the backend fails at that, its slot is lost until `reset`."""
        try:
            self.backend.free(held.number)
            self.held -= 1
        except Exception:
            _log.exception("The backend failed to free a sequence.")
            self.lost = True

    def export(self, held: Held, ranges: Sequence[tuple[int, int]]) -> list[Chunk]:
        """The KV of some of its tokens; none where the backend cannot."""
        if not self.exports or not ranges:
            return []
        try:
            return self.backend.export_kv(held.number, ranges)
        except BackendError as error:
            _log.warning("KV cannot leave the device, so none is cached: %s", error)
            self.exports = False
            return []

    def append(self, held: Held, chunks: Sequence[Chunk]) -> bool:
        """Append KV that was exported behind the same tokens. False, and nothing changed, where the backend refuses it."""
        if not chunks:
            return True
        try:
            self.backend.import_kv(held.number, chunks)
        except Qwen2LocalError as error:
            _log.warning("KV was not taken back: %s", error)
            return False
        held.length += sum(chunk.tokens for chunk in chunks)
        return True

    def park(self, held: Held) -> Parked | None:
        """Take a sequence off the device with its KV; None where that cannot leave it."""
        chunks = self.export(held, [(start, min(start + _PARKED, held.length)) for start in range(0, held.length, _PARKED)])
        fingerprint = self.backend.fingerprint
        self.free(held)
        return Parked(fingerprint, chunks) if chunks else None

    def restore(self, parked: Parked | None, tokens: list[int], *, persist: bool = True) -> Held:
        """Bring a sequence back, with as much of its KV as can be taken."""
        held = self.open(tokens, persist=persist)
        try:
            if parked is not None and parked.fingerprint == self.backend.fingerprint:
                self.append(held, parked.chunks)
        except BaseException:
            self.free(held)
            raise
        return held

    def move(self, layout: Layout, moving: Sequence[Held]) -> None:
        """Lay the memory out anew, and bring these sequences into it: in order, with what KV can be moved. All others have to be free.

        Raises DoesNotFit where there is no memory for it; everything is then as before.
        """
        parked = [self.park(held) for held in moving]
        try:
            self.backend.arrange(layout)
            self.layout = layout
        except DoesNotFit:
            self._bring(moving, parked)
            raise
        self._bring(moving, parked)

    def reset(self) -> None:
        """After a failure nothing here is trusted: forget all sequences."""
        self.held, self.lost = 0, False
        try:
            self.backend.arrange(self.layout)
        except Exception as error:
            _log.warning("The device is not ready: %s", error)
            self.lost = True

    def _bring(self, moving: Sequence[Held], parked: Sequence[Parked | None]) -> None:
        self.held = 0
        for held, kv in zip(moving, parked, strict=True):
            back = self.restore(kv, held.tokens)
            held.number, held.length = back.number, back.length
            held.saved = min(held.saved, held.length)

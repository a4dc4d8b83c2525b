"""The loop on the owner thread: every turn takes what changed, admits who waits, and makes one step for all who are on the device."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qwen2_local.backends.base import Backend, Layout, RowResult
from qwen2_local.engine.common import common
from qwen2_local.engine.device import Device
from qwen2_local.engine.layout import Bounds
from qwen2_local.engine.prefix import Prefixes
from qwen2_local.engine.reply import Mailbox
from qwen2_local.engine.slices import Slices
from qwen2_local.engine.speculation import Speculator
from qwen2_local.engine.work import Work
from qwen2_local.errors import BackendError, Cancelled, DoesNotFit, Qwen2LocalError
from qwen2_local.kvcache import KvCache

_log = logging.getLogger("qwen2_local.engine")

_LINGER_S = 1.0
"""How long an idle engine keeps a layout for several requests."""

_SAVE_EVERY = 2048
"""Tokens of a long prompt after which what was read so far is saved."""


@dataclass(frozen=True, slots=True)
class _Part:
    """One work's part of a step: its next `count` tokens, and drafts behind them."""

    work: Work
    count: int
    drafts: Sequence[int] = ()


class Scheduler:
    """All requests of an engine. On the owner thread, except `breaks`."""

    def __init__(
        self,
        backend: Backend,
        kv: KvCache | None,
        speculator: Speculator,
        *,
        parallel: int,
        kv_memory: int | None,
        ended: Callable[[], None],
    ) -> None:
        """parallel, kv_memory: as in `Engine`. ended: called for each request that is over."""
        info = backend.info
        tokens = info.context if kv_memory is None else max(info.context, kv_memory // max(1, info.kv_bytes_per_token))
        # A step has room for all who decode, and a token of a prompt.
        parallel = max(1, min(parallel, backend.step_tokens - 1))
        self._bounds = Bounds(tokens, info.context, info.yarn_context, backend.layout.context, parallel)
        self._backend = backend
        self._name = info.name
        self.device = Device(backend)
        self._prefixes = Prefixes(self.device, kv)
        self._slices = Slices(backend.step_tokens)
        self._speculator = speculator
        self._ended = ended
        self._waiting: deque[Work] = deque()
        self._live: list[Work] = []
        self._turns = 0
        self._idle_since = 0.0
        self._stays = False
        """Could the layout not be changed back? Not tried again until there was another request."""
        self._stepping: Sequence[_Part] = ()
        self._breakable = False

    @property
    def busy(self) -> bool:
        """Is there any request?"""
        return bool(self._live or self._waiting)

    def breaks(self, mailbox: Mailbox[Any]) -> bool:
        """Is a step under way that a cancel of this caller should break off? From any thread."""
        return self._breakable and any(part.work.mailbox is mailbox for part in self._stepping)

    def add(self, work: Work) -> None:
        """One more request, behind those that wait."""
        self._waiting.append(work)

    def turn(self) -> None:
        """One step for all who are on the device, after letting in who can be."""
        if self._waiting:
            self._admit()
        self._settle_cancelled()
        if not self._live:
            return
        self._make_room()
        parts = self._parts()
        if parts:
            self._step(parts)

    def settle_cancelled(self) -> None:
        """End those who wait and were cancelled. Called when a caller said so, as looking at all of them takes time."""
        for work in [work for work in self._waiting if work.mailbox.cancelled]:
            self._waiting.remove(work)
            work.stop(self._prefixes.parked_names(work))
            self._ended()

    def chores(self) -> float | None:
        """What there is to do while nobody asks for anything. Seconds until there is more of it; None: nothing more."""
        if self._prefixes.save_next():
            return 0.0
        if self._stays or (self.device.layout.sequences == 1 and not self.device.layout.yarn):
            return None
        if not self._idle_since:
            self._idle_since = time.monotonic()
        left = self._idle_since + _LINGER_S - time.monotonic()
        if left > 0:
            return left
        self._idle_since = 0.0
        try:
            self._move(self._bounds.single(0), ())
        except DoesNotFit as error:
            _log.warning("The layout for several requests stays: %s", error)
            self._stays = True
        return 0.0

    def known(self, tokens: Sequence[int], *, yarn: bool) -> int:
        """How many of the first `tokens` need not be computed now; 0 where positions are stretched otherwise than they would have to be."""
        return self._prefixes.known(tokens, self._live) if yarn == self.device.layout.yarn else 0

    def forget(self, names: frozenset[str]) -> None:
        """Let the sequences of past requests go that would be kept under any of these names."""
        self._prefixes.forget_named(names)

    def stop_all(self) -> None:
        """End all requests as cancelled, and save what is worth it."""
        for work in [*self._live, *self._waiting]:
            work.mailbox.cancelled = True
        self.settle_cancelled()
        self._settle_cancelled()
        while self._prefixes.save_next():
            pass

    def fail_all(self, error: BaseException) -> None:
        """End all who are on the device with an error, and trust nothing that lies there."""
        self._fail(list(self._live), error)
        self._prefixes.forget()
        self.device.reset()

    def abandon(self, error: Qwen2LocalError) -> None:
        """Tell all who still wait that nothing comes any more; the device is left alone."""
        for work in [*self._live, *self._waiting]:
            work.fail(error)
            self._ended()
        self._live.clear()
        self._waiting.clear()

    # Who is on the device

    def _admit(self) -> None:
        self._idle_since, self._stays = 0.0, False
        while self._waiting:
            work = self._waiting[0]
            try:
                if not self._has_place(work):
                    return
                self._waiting.popleft()
                self._prefixes.place(work, self._live)
            except BaseException as error:
                if self._waiting and self._waiting[0] is work:
                    self._waiting.popleft()
                self._fail([work], error)
                continue
            self._live.append(work)
            work.placed()

    def _has_place(self, work: Work) -> bool:
        """Can it be placed now? Lays the memory out anew where that helps. Raises DoesNotFit where it can never be."""
        layout, live = self.device.layout, self._live
        if self.device.lost and not live:
            self._prefixes.forget()
            self.device.reset()
        if work.yarn == layout.yarn and work.need <= layout.context and len(live) < layout.sequences:
            return True
        if live and (work.yarn or layout.yarn):
            return False  # Stretched positions are for one at a time.
        if not work.yarn:
            needs = [other.need for other in live]
            needs.extend(other.need for other in self._waiting if not other.yarn)
            several = self._bounds.several(needs, len(live) + 1)
            if several is not None and several != layout and self._try_several(several):
                return True
        if live:
            return False
        self._move(self._bounds.single(work.need, yarn=work.yarn), ())
        return True

    def _try_several(self, layout: Layout) -> bool:
        try:
            self._move(layout, self._live)
        except DoesNotFit:
            _log.warning("There is no memory for %d sequences of %d tokens.", layout.sequences, layout.context)
            self._bounds = replace(self._bounds, parallel=max(1, layout.sequences // 2))
            return False
        return True

    def _make_room(self) -> None:
        """A sequence that has come to the end of its place gets a longer one; the youngest others wait where they no longer fit."""
        for work in self._live:
            if work.sequence.length < self.device.layout.context:
                continue
            order = [work, *(other for other in self._live if other is not work)]
            layout = self._bounds.several([other.need for other in order], 2) or self._bounds.single(work.need, yarn=work.yarn)
            for other in reversed(order[layout.sequences :]):
                self._park(other)
            try:
                self._move(layout, order[: layout.sequences])
            except DoesNotFit as error:
                self._fail([work], error)
            return

    def _park(self, work: Work) -> None:
        """Back to the front of those who wait."""
        self._live.remove(work)
        work.parked, work.held = self.device.park(work.sequence), None
        self._waiting.appendleft(work)

    def _move(self, layout: Layout, live: Sequence[Work]) -> None:
        """Raises DoesNotFit; all is then as before. Any other failure ends those who are on the device."""
        moving = [work.sequence for work in live]
        moving += self._prefixes.to_move(layout, layout.sequences - len(moving))
        try:
            self.device.move(layout, moving)
        except DoesNotFit:
            raise
        except BaseException as error:
            self.fail_all(error)
            raise

    # A step

    def _parts(self) -> list[_Part]:
        """Everyone who decodes; and slices of prompts, in turn."""
        live = self._live
        if len(live) == 1 and live[0].pending == 1:
            return [_Part(live[0], 1, self._drafts(live[0]))]
        parts = [_Part(work, 1) for work in live if work.pending == 1]
        readers = [work for work in live if work.pending > 1]
        left = self._slices.budget(len(parts))
        self._turns += 1
        for index in range(len(readers)):
            work = readers[(self._turns + index) % len(readers)]
            count = min(left, work.pending)
            if count:
                parts.append(_Part(work, count))
                left -= count
        return parts

    def _drafts(self, work: Work) -> Sequence[int]:
        """Tokens drafted for one who decodes alone: where several do, a step has no time to spare."""
        if work.speculation is None:
            return ()
        room = min(self.device.layout.context - len(work.tokens), self._backend.step_tokens - 1, work.most_drafts)
        return work.drafts(self._speculator.drafts(work.speculation, work.tokens, room))

    def _step(self, parts: Sequence[_Part]) -> None:
        read = sum(part.count for part in parts if part.count > 1)
        # A step in which others decode is short, and breaking it off would cost them their tokens.
        self._breakable = len(parts) == 1 or all(part.count > 1 for part in parts)
        self._stepping = parts
        results: Sequence[RowResult] | None = None
        started = time.perf_counter()
        try:
            rows = []
            for part in parts:
                try:
                    rows.append(part.work.row(part.count, part.drafts))
                except BaseException as error:  # a constraint's, that concerns nobody else
                    self._fail([part.work], error)
                    return
            # Looked at behind the line that lets a cancel break the step off, so that none falls between.
            if any(part.work.mailbox.cancelled for part in parts):
                return
            results = self._backend.step(rows)
        except Cancelled:
            return  # Nothing was appended; who is cancelled is settled in the next turn.
        except BaseException as error:
            if len(parts) == 1:
                self._fail([parts[0].work], error)
                return
            _log.warning("A step of %d requests failed; it is made again, one by one: %s", len(parts), error)
        finally:
            self._stepping = ()
        if results is None:
            # The sequences are as they were, so that only those fail whose fault it is.
            for part in parts:
                self._step([part])
            return
        seconds = time.perf_counter() - started
        if read:
            self._slices.took(read, seconds)
        for part, result in zip(parts, results, strict=True):
            try:
                self._deliver(part, result, seconds if len(parts) == 1 else None)
            except BaseException as error:
                self._fail([part.work], error)

    def _deliver(self, part: _Part, result: RowResult, seconds: float | None) -> None:
        """seconds: that the step took, if it was for this one alone."""
        work, drafts, held = part.work, part.drafts, part.work.sequence
        known = len(work.tokens)
        held.length += part.count
        over = work.take(result, drafts)
        if drafts:
            stood = common(drafts, work.tokens[known:])
            held.length += len(drafts)
            self.device.trim(held, known + stood)
        if work.speculation is not None and part.count == 1 and seconds is not None:
            self._speculator.took(work.speculation, len(drafts), stood if drafts else 0, seconds)
        if over:
            self._end(work)
        elif part.count > 1 and work.kept and held.length - held.saved >= _SAVE_EVERY:
            self._prefixes.save(held, growing=True)

    # How a request ends

    def _end(self, work: Work) -> None:
        work.finish(self._leave(work))
        self._ended()

    def _settle_cancelled(self) -> None:
        for work in [work for work in self._live if work.mailbox.cancelled]:
            work.stop(self._leave(work))
            self._ended()

    def _leave(self, work: Work) -> tuple[str, ...]:
        """Its sequence stays on the device, if it is worth it. The names of the chunks that it is kept under."""
        self._live.remove(work)
        held, work.held = work.sequence, None
        if not work.kept:
            self.device.free(held)
            return ()
        names = self._prefixes.names(held)
        self._prefixes.keep(held)
        return names

    def _fail(self, works: Sequence[Work], error: BaseException) -> None:
        """Nothing of the sequences of these requests is trusted any more."""
        told = error if isinstance(error, Qwen2LocalError) else failure(f"{self._name} failed", error)
        for work in works:
            if work in self._live:
                self._live.remove(work)
            if work.held is not None:
                self.device.free(work.held)
                work.held = None
            work.fail(told)
            self._ended()


def failure(what: str, error: BaseException) -> BackendError:
    """An error of a library as one of ours, with the first as its cause."""
    said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    failed = BackendError(f"{what}: {said}", hint="Run `qwen2-local doctor`, and attach what it says to a bug report.")
    failed.__cause__ = error
    return failed

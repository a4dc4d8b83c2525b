"""llama.cpp as a backend, through its C functions alone: its high-level class holds one sequence and silences the whole process's output."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen2_local.backends import llamalib
from qwen2_local.backends.base import BackendInfo, Chosen, Chunk, Layout, LoadOptions, Row, RowResult, Scores
from qwen2_local.backends.llama_batch import Batch
from qwen2_local.backends.llama_memory import Memory
from qwen2_local.backends.llama_native import MOST_OUTPUTS, STEP_TOKENS, describe, open_adapter, open_context, open_model, state_format
from qwen2_local.errors import BackendError, Cancelled, ContextOverflow, DoesNotFit
from qwen2_local.sampling import choose, score

_KV_FORM = 1
"""Counts up when the meaning of an exported chunk changes."""
_NO_SLOT, _ABORTED, _NO_MEMORY = 1, 2, -2
_REPORT = "Try again; if it stays, run `qwen2-local doctor`."
_NOTHING = RowResult()
_Span = tuple[int, int, int]
"""Which row, its first row of logits in the batch, and how many it has."""


class LlamaCpp:
    """A loaded GGUF model; implements `base.Backend`. A failed or cancelled step leaves every sequence as it was."""

    def __init__(self, model: Any, info: BackendInfo, layout: Layout, options: LoadOptions, *, adapter: Any, threads: int | None, safe: bool) -> None:
        """Take ownership of a llama.cpp model, whose adapter is its own; `load` makes them. Raises DoesNotFit, BackendError."""
        self._lib = llamalib.library()
        self._model, self._info, self._options = model, info, options
        self._adapter, self._threads, self._safe = adapter, threads, safe
        self._context: Any = None
        self._stop = (ctypes.c_char * 2)()
        self._batch = Batch(self._lib, STEP_TOKENS)
        self._lengths: list[int | None] = []
        self._make(layout)

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        layout: Layout,
        options: LoadOptions | None = None,
        threads: int | None = None,
        safe: bool = False,
        notes: tuple[str, ...] = (),
        cancelled: Callable[[], bool] | None = None,
    ) -> LlamaCpp:
        """Load the GGUF file at `path`, which the caller has validated.

        options: None is a model of no known origin, whose KV is not to be shared. threads: None is the cores of this machine, fewer where a
        small model decodes. safe: without the CPU's special matrix code (AMX, repacked weights). cancelled: asked again and again while it
        loads. Raises BadFile, UnsupportedModel, DoesNotFit, BackendError, BackendUnavailable, Cancelled.
        """
        options = options or LoadOptions("", layout.context)
        lib = llamalib.library()
        llamalib.last_errors()
        model = open_model(lib, path, safe=safe, cancelled=cancelled)
        try:
            adapter = open_adapter(lib, model, options.adapter) if options.adapter else None
            return cls(model, describe(lib, model, options, notes), layout, options, adapter=adapter, threads=threads, safe=safe)
        except BaseException:
            lib.llama_model_free(model)
            raise

    @property
    def info(self) -> BackendInfo:
        """What was loaded."""
        return self._info

    @property
    def layout(self) -> Layout:
        """How the KV memory is laid out now."""
        return self._layout

    @property
    def fingerprint(self) -> str:
        """Hexadecimal; see `base.Backend.fingerprint`."""
        return self._fingerprint

    @property
    def step_tokens(self) -> int:
        """The most tokens that one `step` takes, all rows together."""
        return STEP_TOKENS

    def arrange(self, layout: Layout) -> None:
        """Forget all sequences, and lay the KV memory out anew. Raises DoesNotFit, BackendError; the layout is then as before."""
        if self._model is None:
            raise _closed()
        before = self._layout
        if layout == before and self._context is not None:
            self._memory.clear()
            self._lengths = [None] * layout.sequences
            return
        self._drop_context()
        try:
            self._make(layout)
        except (DoesNotFit, BackendError):
            # Where there is no memory for that any more either, nothing can be opened until another `arrange` finds some.
            with contextlib.suppress(DoesNotFit, BackendError):
                self._make(before)
            raise

    def open(self) -> int:
        """A new empty sequence. Raises BackendError when all are in use."""
        self._check_open()
        if None not in self._lengths:
            raise BackendError(f"All {len(self._lengths)} sequences are in use.", hint="Free one first, or arrange for more.")
        sequence = self._lengths.index(None)
        self._lengths[sequence] = 0
        return sequence

    def step(self, rows: Sequence[Row]) -> list[RowResult]:
        """Append each row's tokens to its sequence, in one batch.

        Raises ContextOverflow, Cancelled, DoesNotFit, BackendError; every sequence is then as it was.
        """
        try:
            return self._step(rows)
        finally:
            # At the end, so that a `cancel` just before a step ends that step; nothing of it is left for the next.
            self._stop[0] = b"\0"

    def _step(self, rows: Sequence[Row]) -> list[RowResult]:
        self._check_open()
        places = {row.sequence: place for place, row in enumerate(rows)}
        if not rows or len(places) < len(rows):
            raise BackendError("A step needs tokens, and one row for each sequence.", hint=_REPORT)
        fillers = self._fillers(rows, places) if len(rows) > 1 else ()
        count = outputs = 0
        spans: list[_Span] = []
        for sequence in sorted((*places, *fillers)):  # llama.cpp computes neighbouring streams together
            place = places.get(sequence)
            start, count = count, count + (1 if place is None else len(rows[place].tokens))
            if place is None:
                self._put(start, 0, self._lengths[sequence] or 0, sequence, wanted=False)
                continue
            width = self._fill(rows[place], start, count)
            if width:
                spans.append((place, outputs, width))
                outputs += width
        try:
            results = self._compute(rows, spans, count, outputs)
        except BaseException:
            self._cut_to_lengths(places)
            raise
        finally:
            self._cut_to_lengths(fillers)
        for row in rows:
            self._lengths[row.sequence] += len(row.tokens)  # type: ignore[operator]  # _fill has checked that it is open
        return results

    def fork(self, sequence: int, length: int) -> int:
        """A new sequence that begins with the first `length` tokens of another. Raises BackendError when all are in use."""
        present = self._length(sequence)
        if not 0 <= length <= present:
            raise BackendError(f"Sequence {sequence} has {present} tokens and cannot be forked at {length}.", hint=_REPORT)
        fork = self.open()
        try:
            # Through memory of ours: llama.cpp's copy between streams waits for the next step, and takes the whole stream.
            if length:
                self._memory.append(fork, 0, list(self._memory.read(sequence, present, [(0, length)])))
        except BaseException:
            self.free(fork)
            raise
        self._lengths[fork] = length
        return fork

    def trim(self, sequence: int, length: int) -> None:
        """Forget all but the first `length` tokens of a sequence."""
        present = self._length(sequence)
        if not 0 <= length <= present:
            raise BackendError(f"Sequence {sequence} has {present} tokens and cannot be cut to {length}.", hint=_REPORT)
        if length < present:
            self._memory.cut(sequence, length)
            self._lengths[sequence] = length

    def free(self, sequence: int) -> None:
        """Give a sequence and its KV back."""
        self._length(sequence)
        self._memory.cut(sequence, 0)
        self._lengths[sequence] = None

    def export_kv(self, sequence: int, ranges: Sequence[tuple[int, int]]) -> list[Chunk]:
        """The KV of ranges (from, up to) of a sequence's tokens, exact. Ascending, none overlapping.

        The bytes of a chunk: for the K of each layer, then for the V of each layer, a row for each token. Raises BackendError.
        """
        length, end = self._length(sequence), 0
        for start, stop in ranges:
            if not end <= start < stop <= length:
                raise BackendError(f"Tokens {start} to {stop} of a sequence of {length} cannot be exported.", hint=_REPORT)
            end = stop
        parts = self._memory.read(sequence, length, ranges)
        return [Chunk(stop - start, memoryview(part.tobytes())) for part, (start, stop) in zip(parts, ranges, strict=True)]

    def import_kv(self, sequence: int, chunks: Sequence[Chunk]) -> None:
        """Append the KV of tokens that were exported behind the same tokens, under the same fingerprint.

        Raises ContextOverflow if it finds no room, BackendError for data of a wrong size or form; the sequence is then as before.
        """
        present = self._length(sequence)
        parts = [self._memory.form.rows(chunk.data, chunk.tokens) for chunk in chunks]
        after = present + sum(chunk.tokens for chunk in chunks)
        self._check_room(after)
        if parts:
            self._memory.append(sequence, present, parts)
        self._lengths[sequence] = after

    def cancel(self) -> None:
        """Stop the step under way, else the next. Callable from any thread."""
        self._stop[0] = b"\1"

    def close(self) -> None:
        """Give everything back. Idempotent."""
        self._drop_context()
        model, self._model = self._model, None
        if model:
            self._lib.llama_model_free(model)

    def _make(self, layout: Layout) -> None:
        """A context of this layout, and all that depends on it."""
        self._context = open_context(self._lib, self._model, layout, self._options, adapter=self._adapter, threads=self._threads)
        self._layout = layout
        self._memory = Memory(self._lib, self._context, state_format(self._lib, self._model, layout, self._options))
        self._lengths = [None] * layout.sequences
        self._fingerprint = self._make_fingerprint()
        self._logits = np.empty((0, self._info.vocabulary), np.float32)
        self._logits_at = 0
        llamalib.stop_when_set(self._context, self._stop)

    def _drop_context(self) -> None:
        context, self._context = self._context, None
        if context:
            self._logits = np.empty((0, 0), np.float32)  # a view of memory that goes now
            self._lib.llama_free(context)

    def _make_fingerprint(self) -> str:
        form = self._memory.form
        yarn = (self._options.yarn_factor, self._options.yarn_original) if self._layout.yarn else None
        facts = {
            "backend": [self._info.name, self._info.version, _KV_FORM, self._safe],
            "model": [self._options.identity, self._options.adapter_identity, self._info.architecture],
            "kv": [form.layers, form.row, form.kind, os.environ.get("LLAMA_ATTN_ROT_DISABLE", "")],  # llama.cpp's own variable
            "yarn": yarn,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def _fillers(self, rows: Sequence[Row], places: dict[int, int]) -> Sequence[int]:
        """Streams between those of the rows that should compute a token which nobody wants.

        llama.cpp computes streams together only if there is no gap between them; a second pass over the weights costs far more than a token.
        """
        lowest, highest = min(places), max(places)
        if self._memory.form.streams == 1 or highest - lowest < len(rows) or not 0 <= lowest <= highest < len(self._lengths):
            return ()
        gaps = [sequence for sequence in range(lowest, highest) if sequence not in places]
        one_each = all(len(row.tokens) == 1 for row in rows)
        return gaps if one_each and all((self._lengths[gap] or 0) < self._layout.context for gap in gaps) else ()

    def _fill(self, row: Row, start: int, stop: int) -> int:
        """Write a row into the batch, checked: what reaches llama.cpp is in range. The number of its tokens whose logits are wanted."""
        length = self._length(row.sequence)
        count = stop - start
        if stop > STEP_TOKENS or count == 0:
            raise BackendError(f"A row of {count} tokens; a step takes 1 to {STEP_TOKENS} in all.", hint=_REPORT)
        self._check_room(length + count)
        width = self._check_wishes(row, count)
        if count == 1:
            token = row.tokens[0]
            self._check_tokens(token, token)
            self._put(start, token, length, row.sequence, wanted=width == 1)
            return width
        try:
            tokens = np.asarray(row.tokens, np.int64)
        except OverflowError:
            raise BackendError("A token id is too large for a number of 64 bits.", hint=_REPORT) from None
        self._check_tokens(int(tokens.min()), int(tokens.max()))
        batch = self._batch
        batch.tokens[start:stop] = tokens
        batch.positions[start:stop] = np.arange(length, length + count)
        batch.owners[start:stop] = row.sequence
        batch.wanted[start:stop] = 0
        batch.wanted[stop - width : stop] = 1
        return width

    def _put(self, at: int, token: int, position: int, sequence: int, *, wanted: bool) -> None:
        batch = self._batch
        batch.tokens[at], batch.positions[at], batch.owners[at], batch.wanted[at] = token, position, sequence, wanted

    def _check_wishes(self, row: Row, count: int) -> int:
        """How many of the last tokens' logits a row of `count` tokens asks for."""
        width = len(row.choose)
        if width > count or any(choice.limit < 1 for choice in row.choose):
            raise BackendError(f"{width} choices after {count} tokens, each of at least one id.", hint=_REPORT)
        if row.targets:
            within = 1 <= row.limit <= self._info.vocabulary and min(row.targets) >= 0 and max(row.targets) < row.limit
            if len(row.targets) != count or not within:
                raise BackendError(f"{len(row.targets)} targets for {count} tokens, each an id below {row.limit}.", hint=_REPORT)
            return count
        return count if row.logits == "all" else max(width, 1) if row.logits else width

    def _compute(self, rows: Sequence[Row], spans: Sequence[_Span], count: int, outputs: int) -> list[RowResult]:
        """Decode the batch of `count` tokens, in parts of at most MOST_OUTPUTS rows of logits; the results of all rows."""
        results = [_NOTHING] * len(rows)
        start = done = 0
        for stop in (count,) if outputs <= MOST_OUTPUTS else self._cuts(count):
            code = self._lib.llama_decode(self._context, self._batch.part(start, stop))
            if code or self._stop[0] != b"\0":
                raise self._failure(code, count)
            wanted = outputs if stop - start == count else int(np.count_nonzero(self._batch.wanted[start:stop]))
            logits = self._view(wanted) if wanted else self._logits
            for place, first, width in spans:
                low, high = max(first, done), min(first + width, done + wanted)
                if low < high:
                    result = self._result(rows[place], logits[low - done : high - done], low - first, width)
                    results[place] = result if low == first else _joined(results[place], result)
            start, done = stop, done + wanted
        return results

    def _cuts(self, count: int) -> list[int]:
        """Where to end the parts of a batch."""
        wanted = np.cumsum(self._batch.wanted[:count])
        cuts = [int(np.searchsorted(wanted, most, side="right")) for most in range(MOST_OUTPUTS, int(wanted[-1]), MOST_OUTPUTS)]
        return [*cuts, count]

    def _result(self, row: Row, logits: npt.NDArray[np.float32], first: int, width: int) -> RowResult:
        """What a row asks of these logits: those of its wanted tokens from number `first` on, of `width`."""
        count = len(logits)
        chosen: list[Chosen] = []
        skipped = width - len(row.choose)  # tokens whose logits are wanted, though nothing is chosen after them
        for place in range(max(first, skipped), first + count):
            chosen.append(choose(logits[place - first], row.choose[place - skipped]))
            if chosen[-1].token < 0:
                raise self._no_choice(row, logits[place - first], row.choose[place - skipped].limit, place - width)
        if not row.targets and not row.logits:
            return RowResult(tuple(chosen))
        kept = logits if row.logits == "all" else logits[-1:] if row.logits and first + count == width else logits[:0]
        if not np.isfinite(kept).all() or (row.targets and not np.isfinite(logits[:, : row.limit].max())):
            raise self._no_numbers(row, first + count - width)
        return RowResult(
            tuple(chosen),
            score(logits, row.targets[first : first + count], row.limit) if row.targets else None,
            kept.copy() if row.logits else None,
        )

    def _no_choice(self, row: Row, logits: npt.NDArray[np.float32], limit: int, behind: int) -> BackendError:
        """Why nothing was chosen after the token that lies so far from the row's end (below zero)."""
        if not np.isfinite(logits[:limit].max()):
            return self._no_numbers(row, behind + 1)
        return BackendError("No token may come next: the mask, or the biases, rule out all of them.", hint="Loosen the schema or the biases.")

    def _no_numbers(self, row: Row, behind: int) -> BackendError:
        return BackendError(
            f"The model computed values that are no numbers, at token {self._length(row.sequence) + len(row.tokens) + behind}.",
            hint="Its file may be damaged: fetch or convert it again. If that does not help, run `qwen2-local doctor`.",
        )

    def _view(self, outputs: int) -> npt.NDArray[np.float32]:
        """llama.cpp's logits [outputs or more, vocabulary] where they lie; making the view costs more than looking whether it still holds."""
        address = ctypes.addressof(self._lib.llama_get_logits(self._context).contents)
        if address != self._logits_at or outputs > len(self._logits):
            raw = (ctypes.c_float * (outputs * self._info.vocabulary)).from_address(address)
            self._logits = np.ctypeslib.as_array(raw).reshape(outputs, -1)
            self._logits_at = address
        return self._logits

    def _failure(self, code: int, count: int) -> Exception:
        """What a failed step of `count` tokens means."""
        said = llamalib.last_errors()
        if code in (0, _ABORTED):
            return Cancelled("Stopped.")
        if code == _NO_SLOT:
            used = sum(length or 0 for length in self._lengths)
            return ContextOverflow(
                f"{count} more tokens find no room in the KV cache, which holds {used}.",
                hint="Free a sequence, or load the model with a larger context.",
            )
        if code == _NO_MEMORY:
            return DoesNotFit(f"llama.cpp ran out of memory in a step: {said}", hint="Choose a smaller context (--context) or a smaller model.")
        return BackendError(f"llama.cpp failed in a step with code {code}: {said}", hint=_REPORT)

    def _cut_to_lengths(self, sequences: Iterable[int]) -> None:
        """Take away what a step appended."""
        for sequence in sequences:
            self._memory.cut(sequence, self._lengths[sequence] or 0)

    def _check_open(self) -> None:
        if self._model is None:
            raise _closed()
        if self._context is None:
            raise BackendError("There is no memory left for the model's context.", hint="Close other programs, or choose a smaller --context.")

    def _check_room(self, after: int) -> None:
        if after > self._layout.context:
            raise ContextOverflow(
                f"{after} tokens do not fit into a context of {self._layout.context}.",
                hint="Shorten the text, start a new chat, or load the model with a larger context.",
            )

    def _check_tokens(self, lowest: int, highest: int) -> None:
        if lowest < 0 or highest >= self._info.vocabulary:
            wrong = lowest if lowest < 0 else highest
            raise BackendError(
                f"Token id {wrong} is outside the vocabulary of {self._info.vocabulary}.",
                hint="Tokenizer and model may not belong together: fetch the model again.",
            )

    def _length(self, sequence: int) -> int:
        length = self._lengths[sequence] if 0 <= sequence < len(self._lengths) else None
        if length is None or self._context is None:
            raise BackendError(f"Sequence {sequence} is not open.", hint=_REPORT)
        return length


def _closed() -> BackendError:
    return BackendError("The model is closed.", hint="Load it again.")


def _joined(first: RowResult, second: RowResult) -> RowResult:
    """The results of two parts of a row."""
    scores = [one.scores for one in (first, second) if one.scores is not None]
    logits = [one.logits for one in (first, second) if one.logits is not None]
    return RowResult(
        first.chosen + second.chosen,
        Scores(np.concatenate([one.logprobs for one in scores]), np.concatenate([one.greedy for one in scores])) if scores else None,
        np.concatenate(logits) if logits else None,
    )

"""llama.cpp as a backend, through its C functions alone: its high-level class holds one sequence and silences the whole process's output."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen2_local import cpu
from qwen2_local.backends import llamalib
from qwen2_local.backends.base import BackendInfo, Row, RowResult
from qwen2_local.errors import BackendError, BadFile, Cancelled, ContextOverflow, DoesNotFit, UnsupportedModel
from qwen2_local.sampling import choose

STEP_TOKENS = 512
MOST_SEQUENCES = 256
"""llama.cpp's own limit (LLAMA_MAX_SEQ)."""

_BYTES_PER_THREAD = 8 << 20
"""Of weights. Below it threads wait for each other longer than they compute (ran: 9 MB decode no faster on two threads than on one)."""

_NO_SLOT, _ABORTED, _NO_MEMORY = 1, 2, -2
_REPORT = "Try again; if it stays, run `qwen2-local doctor`."


class LlamaCpp:
    """A loaded GGUF model; implements `base.Backend`. A failed or cancelled step leaves every sequence as it was."""

    def __init__(self, model: Any, context: Any, info: BackendInfo, sequences: int) -> None:
        """Take ownership of a llama.cpp model and context; `load` makes them."""
        self._lib = llamalib.library()
        self._model, self._context, self._info = model, context, info
        self._memory = self._lib.llama_get_memory(context)
        self._lengths: list[int | None] = [None] * sequences
        self._stop = (ctypes.c_char * 2)()
        llamalib.stop_when_set(context, self._stop)
        self._tokens, self._positions, self._owners = (np.zeros(STEP_TOKENS, np.int32) for _ in range(3))
        self._wanted = np.zeros(STEP_TOKENS, np.int8)
        self._batch, self._kept_alive = _batch(self._lib, self._tokens, self._positions, self._owners, self._wanted)
        self._logits = np.empty((0, info.vocabulary), np.float32)
        self._logits_at = 0

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        context: int,
        sequences: int = 1,
        threads: int | None = None,
        safe: bool = False,
        notes: tuple[str, ...] = (),
    ) -> LlamaCpp:
        """Load the GGUF file at `path`, which the caller has validated.

        context: the most tokens of each sequence; the KV cache is made for all of them at once. threads: None is the cores of this
        machine, fewer where a small model decodes. safe: without the CPU's special matrix code (AMX, repacked weights).
        Raises BadFile, UnsupportedModel, DoesNotFit, BackendUnavailable.
        """
        if context < 1 or not 1 <= sequences <= MOST_SEQUENCES:
            raise BackendError(f"A context of {context} tokens for {sequences} sequences cannot be made.", hint=f"Ask for 1 to {MOST_SEQUENCES}.")
        lib = llamalib.library()
        llamalib.last_errors()
        model = _open_model(lib, path, safe)
        params = lib.llama_context_default_params()
        params.n_ctx = context * sequences
        params.n_seq_max = sequences
        params.n_batch = params.n_ubatch = STEP_TOKENS
        params.n_threads_batch = threads or cpu.cores()
        params.n_threads = threads or min(cpu.cores(), max(1, lib.llama_model_size(model) // _BYTES_PER_THREAD))
        params.kv_unified = True
        native = lib.llama_init_from_model(model, params)
        if not native:
            lib.llama_model_free(model)
            raise DoesNotFit(
                f"llama.cpp could not make a context of {context} tokens x {sequences} for {path.name}: {llamalib.last_errors()}",
                hint="Choose a smaller context (--context) or a smaller model.",
            )
        return cls(model, native, _describe(lib, model, context, notes), sequences)

    @property
    def info(self) -> BackendInfo:
        """What was loaded."""
        return self._info

    @property
    def step_tokens(self) -> int:
        """The most tokens that one `step` takes, all rows together."""
        return STEP_TOKENS

    def open(self) -> int:
        """A new empty sequence. Raises BackendError when all are in use."""
        self._check_open()
        if None not in self._lengths:
            raise BackendError(f"All {len(self._lengths)} sequences are in use.", hint="Free one first, or load with more.")
        sequence = self._lengths.index(None)
        self._lengths[sequence] = 0
        return sequence

    def step(self, rows: Sequence[Row]) -> list[RowResult]:
        """Append each row's tokens to its sequence, in one batch.

        `cancel` counts from here on: this line clears the flag, so one that came before found no step under way and is forgotten, and
        one that comes before the results are read ends this step with Cancelled.
        Raises ContextOverflow, Cancelled, BackendError.
        """
        self._stop[0] = b"\0"
        self._check_open()
        count = outputs = 0
        for row in rows:
            start, count = count, count + len(row.tokens)
            outputs += self._fill(row, start, count)
        if count == 0 or (len(rows) > 1 and len({row.sequence for row in rows}) < len(rows)):
            raise BackendError("A step needs tokens, and one row for each sequence.", hint=_REPORT)
        self._batch.n_tokens = count
        code = self._lib.llama_decode(self._context, self._batch)
        if code or self._stop[0] != b"\0":
            raise self._undone(rows, code)
        results = self._results(rows, outputs)
        for row in rows:
            self._lengths[row.sequence] += len(row.tokens)  # type: ignore[operator]  # _fill has checked that it is open
        return results

    def trim(self, sequence: int, length: int) -> None:
        """Forget all but the first `length` tokens of a sequence."""
        present = self._length(sequence)
        if not 0 <= length <= present:
            raise BackendError(f"Sequence {sequence} has {present} tokens and cannot be cut to {length}.", hint=_REPORT)
        if length < present:
            self._cut(sequence, length)
            self._lengths[sequence] = length

    def free(self, sequence: int) -> None:
        """Give a sequence and its KV back."""
        self._length(sequence)
        self._cut(sequence, 0)
        self._lengths[sequence] = None

    def cancel(self) -> None:
        """Stop the step under way, if any; see `step`. Callable from any thread."""
        self._stop[0] = b"\1"

    def close(self) -> None:
        """Give everything back. Idempotent."""
        context, self._context = self._context, None
        model, self._model = self._model, None
        if context:
            self._logits = np.empty((0, 0), np.float32)  # a view of memory that goes now
            self._lib.llama_free(context)
        if model:
            self._lib.llama_model_free(model)

    def _fill(self, row: Row, start: int, stop: int) -> int:
        """Write a row into the batch, checked: what reaches llama.cpp is in range. The number of its logit rows."""
        length = self._length(row.sequence)
        if stop > STEP_TOKENS or stop == start:
            raise BackendError(f"A row of {stop - start} tokens; a step takes 1 to {STEP_TOKENS} in all.", hint=_REPORT)
        after = length + stop - start
        if after > self._info.context:
            raise ContextOverflow(
                f"{after} tokens do not fit into a context of {self._info.context}.",
                hint="Shorten the text, start a new chat, or load the model with a larger context.",
            )
        if stop - start == 1:
            token = row.tokens[0]
            self._check_tokens(token, token)
            self._tokens[start], self._positions[start], self._owners[start] = token, length, row.sequence
            wanted = bool(row.logits) or row.choose is not None
            self._wanted[start] = wanted
            return int(wanted)
        try:
            tokens = np.asarray(row.tokens, np.int64)
        except OverflowError:
            raise BackendError("A token id is too large for a number of 64 bits.", hint=_REPORT) from None
        self._check_tokens(int(tokens.min()), int(tokens.max()))
        self._tokens[start:stop] = tokens
        self._positions[start:stop] = np.arange(length, after)
        self._owners[start:stop] = row.sequence
        self._wanted[start:stop] = row.logits == "all"
        if row.logits or row.choose is not None:
            self._wanted[stop - 1] = 1
        return int(np.count_nonzero(self._wanted[start:stop]))

    def _results(self, rows: Sequence[Row], outputs: int) -> list[RowResult]:
        """Sample and copy logits, which lie in the order of the batch."""
        logits = self._view(outputs) if outputs else self._logits
        results, at = [], 0
        for row in rows:
            if row.choose is None and not row.logits:
                results.append(RowResult())
                continue
            start, at = at, at + (len(row.tokens) if row.logits == "all" else 1)
            token = None if row.choose is None else choose(logits[at - 1], row.choose)
            copied = logits[start:at].copy() if row.logits else None
            if token == -1 or (copied is not None and not np.isfinite(copied).all()):
                self._restore(rows)
                raise BackendError(
                    f"The model computed values that are no numbers, at token {self._length(row.sequence) + len(row.tokens)}.",
                    hint="Its file may be damaged: fetch or convert it again. If that does not help, run `qwen2-local doctor`.",
                )
            results.append(RowResult(token, copied))
        return results

    def _view(self, outputs: int) -> npt.NDArray[np.float32]:
        """llama.cpp's logits [outputs or more, vocabulary] where they lie; making the view costs more than looking whether it still holds."""
        address = ctypes.addressof(self._lib.llama_get_logits(self._context).contents)
        if address != self._logits_at or outputs > len(self._logits):
            raw = (ctypes.c_float * (outputs * self._info.vocabulary)).from_address(address)
            self._logits = np.ctypeslib.as_array(raw).reshape(outputs, -1)
            self._logits_at = address
        return self._logits

    def _undone(self, rows: Sequence[Row], code: int) -> Exception:
        """Restore the sequences after a failed step, and say what happened."""
        self._restore(rows)
        said = llamalib.last_errors()
        if code in (0, _ABORTED):
            return Cancelled("Stopped.")
        if code == _NO_SLOT:
            used = sum(length or 0 for length in self._lengths)
            return ContextOverflow(
                f"{sum(len(row.tokens) for row in rows)} more tokens find no room in the KV cache, which holds {used}.",
                hint="Free a sequence, or load the model with a larger context.",
            )
        if code == _NO_MEMORY:
            return DoesNotFit(f"llama.cpp ran out of memory in a step: {said}", hint="Choose a smaller context (--context) or a smaller model.")
        return BackendError(f"llama.cpp failed in a step with code {code}: {said}", hint=_REPORT)

    def _restore(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._cut(row.sequence, self._length(row.sequence))

    def _cut(self, sequence: int, length: int) -> None:
        if not self._lib.llama_memory_seq_rm(self._memory, sequence, length, -1):
            raise BackendError(f"llama.cpp could not cut sequence {sequence} to {length} tokens.", hint=_REPORT)

    def _check_open(self) -> None:
        if self._context is None:
            raise BackendError("The model is closed.", hint="Load it again.")

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


def _open_model(lib: Any, path: Path, safe: bool) -> Any:
    if not path.is_file():
        raise BadFile(f"{path} is not a file.", hint="Give a GGUF file.")
    params = lib.llama_model_default_params()
    params.load_mode = lib.LLAMA_LOAD_MODE_MMAP
    params.use_extra_bufts = not safe
    model = lib.llama_model_load_from_file(os.fsencode(path), params)
    if model:
        return model
    said = llamalib.last_errors()
    if "unknown model architecture" in said:
        raise UnsupportedModel(f"{path.name}: {said}", hint="This program runs Qwen2 models.")
    if "allocate" in said:
        raise DoesNotFit(f"{path.name} does not fit into memory: {said}", hint="Choose a smaller model or quantization.")
    raise BadFile(
        f"llama.cpp cannot load {path.name}: {said or 'it does not say why'}",
        hint="Fetch or convert it again.",
    )


def _describe(lib: Any, model: Any, context: int, notes: tuple[str, ...]) -> BackendInfo:
    buffer = ctypes.create_string_buffer(128)
    lib.llama_model_meta_val_str(model, b"general.architecture", buffer, len(buffer))
    layers = lib.llama_model_n_layer(model)
    head = lib.llama_model_n_embd(model) // lib.llama_model_n_head(model)
    return BackendInfo(
        name="llama.cpp",
        version=llamalib.version(),
        architecture=buffer.value.decode("utf-8", "replace"),
        context=context,
        vocabulary=lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model)),
        layers=layers,
        kv_bytes_per_token=layers * lib.llama_model_n_head_kv(model) * head * 2 * 2,  # keys and values, 16 bit each
        notes=notes,
    )


def _batch(
    lib: Any,
    tokens: npt.NDArray[np.int32],
    positions: npt.NDArray[np.int32],
    owners: npt.NDArray[np.int32],
    wanted: npt.NDArray[np.int8],
) -> tuple[Any, list[object]]:
    """A llama_batch over these arrays, each token in one sequence; and what has to live as long as it."""
    counts = np.ones(len(tokens), np.int32)
    # llama.cpp wants a pointer to each token's list of sequences: here, to its one entry in `owners`.
    pointers = (owners.ctypes.data + 4 * np.arange(len(tokens))).astype(np.uintp)
    fields: dict[str, npt.NDArray[Any]] = {"token": tokens, "pos": positions, "n_seq_id": counts, "seq_id": pointers, "logits": wanted}
    batch = lib.llama_batch()
    for name, array in fields.items():
        kind = next(field[1] for field in lib.llama_batch._fields_ if field[0] == name)
        setattr(batch, name, ctypes.cast(ctypes.c_void_p(array.ctypes.data), kind))
    return batch, [counts, pointers, tokens, positions, owners, wanted]

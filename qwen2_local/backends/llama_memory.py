"""The KV memory of a llama.cpp context: forget tokens, take their KV out, put it in.

One sequence lies in a unified cache, with a second, empty one as a scratch: a range of it is copied there, which moves no data, and written
out alone. Several lie in streams of their own, so that none attends over the cells of another; there a copy of a range kills the process,
and what is put in replaces what was there. So only whole sequences go out and in there.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from qwen2_local.backends import llamalib
from qwen2_local.backends.llama_state import Bytes, StateFormat
from qwen2_local.errors import BackendError

SCRATCH = 1
"""The sequence beside number 0 of a unified cache."""

_BYTE = ctypes.POINTER(ctypes.c_uint8)


class Memory:
    """The cells of a context. KV goes in and out as rows [2 layers, tokens x bytes of a row]; see `StateFormat`."""

    def __init__(self, lib: Any, context: Any, form: StateFormat) -> None:
        """lib: llama.cpp's C functions. The context has to outlive this."""
        self._lib, self._context, self.form = lib, context, form
        self._cells = lib.llama_get_memory(context)
        self._form_is_known = False

    def clear(self) -> None:
        """Forget everything, and overwrite it: a cell that holds no numbers harms those who only pass over it."""
        self._lib.llama_memory_clear(self._cells, True)

    def cut(self, sequence: int, length: int) -> None:
        """Forget all of a sequence but its first tokens."""
        if not self._lib.llama_memory_seq_rm(self._cells, sequence, length, -1):
            raise BackendError(
                f"llama.cpp could not cut sequence {sequence} to {length} tokens.", hint="Try again; if it stays, run `qwen2-local doctor`."
            )

    def read(self, sequence: int, length: int, ranges: Sequence[tuple[int, int]]) -> Iterator[Bytes]:
        """The rows of ranges of a sequence of `length` tokens, one after the other: together they may take as much as the cells.

        Raises BackendError if llama.cpp writes them in a form that is unknown here.
        """
        if self.form.streams == 1:
            for start, stop in ranges:
                yield self._read_range(sequence, start, stop)
        elif ranges:
            whole, row = self._read_all(sequence, 0, length), self.form.row
            for start, stop in ranges:
                yield whole[:, start * row : stop * row]

    def append(self, sequence: int, length: int, parts: Sequence[Bytes]) -> None:
        """Put rows behind the `length` tokens of a sequence. Raises BackendError; the sequence is then as before."""
        before = list(self.read(sequence, length, [(0, length)])) if self.form.streams > 1 and length else []
        try:
            if self.form.streams > 1:
                self._write(sequence, [*before, *parts], 0)
                return
            at = length
            for part in parts:
                try:
                    self._write(SCRATCH, [part], at)
                    self._lib.llama_memory_seq_cp(self._cells, SCRATCH, sequence, -1, -1)
                finally:
                    self.cut(SCRATCH, 0)
                at += part.shape[1] // self.form.row
        except BaseException:
            self.cut(sequence, 0 if before else length)
            if before:
                self._write(sequence, before, 0)
            raise

    def _read_range(self, sequence: int, start: int, stop: int) -> Bytes:
        self._lib.llama_memory_seq_cp(self._cells, sequence, SCRATCH, start, stop)
        try:
            return self._read_all(SCRATCH, start, stop - start)
        finally:
            self.cut(SCRATCH, 0)

    def _read_all(self, sequence: int, first: int, tokens: int) -> Bytes:
        """All rows of a sequence, which holds so many tokens from position `first` on."""
        state = np.empty(self.form.size(tokens) + 1, np.uint8)  # a byte more than it should need, to see whether it does
        written = self._lib.llama_state_seq_get_data(self._context, state.ctypes.data_as(_BYTE), state.size, sequence)
        return self.form.read(state[:written], first, tokens, sequence)

    def _write(self, sequence: int, parts: Sequence[Bytes], first: int) -> None:
        """Replace all of a sequence by these rows, at the positions from `first` on. Raises BackendError; what it holds is then undefined."""
        state = self.form.write(parts, first, sequence)
        taken = self._lib.llama_state_seq_set_data(self._context, state.ctypes.data_as(_BYTE), state.size, sequence)
        if taken != state.size:
            raise BackendError(f"llama.cpp does not take {state.size} bytes of KV: {llamalib.last_errors()}", hint="Compute its tokens anew.")
        if self._form_is_known:
            return
        # Once, see that this means to llama.cpp what it does here.
        tokens = sum(part.shape[1] for part in parts) // self.form.row
        if not np.array_equal(self._read_all(sequence, first, tokens), np.concatenate(parts, axis=1)):
            raise BackendError("llama.cpp does not give KV back as it was put in.", hint="Nothing can be cached with this version of it.")
        self._form_is_known = True

"""The tokens of a step, in arrays of ours that llama.cpp reads where they lie."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt


class Batch:
    """Arrays of one entry per token, each token in one sequence: its id, position and sequence, and whether its logits are wanted."""

    def __init__(self, lib: Any, size: int) -> None:
        """lib: llama.cpp's C functions. size: the most tokens."""
        self.tokens, self.positions, self.owners = (np.zeros(size, np.int32) for _ in range(3))
        self.wanted = np.zeros(size, np.int8)
        # llama.cpp wants a pointer to each token's list of sequences: here, to its one entry in `owners`.
        pointers = (self.owners.ctypes.data + 4 * np.arange(size)).astype(np.uintp)
        self._kind = lib.llama_batch
        self._fields: dict[str, npt.NDArray[Any]] = {
            "token": self.tokens,
            "pos": self.positions,
            "n_seq_id": np.ones(size, np.int32),
            "seq_id": pointers,
            "logits": self.wanted,
        }
        self._from_start = self._native(0)

    def part(self, start: int, stop: int) -> Any:
        """A llama_batch of these entries, valid while this object is, and until the next call from the same start."""
        native = self._native(start) if start else self._from_start
        native.n_tokens = stop - start
        return native

    def _native(self, start: int) -> Any:
        native = self._kind()
        types = dict(field[:2] for field in self._kind._fields_)
        for name, array in self._fields.items():
            setattr(native, name, ctypes.cast(ctypes.c_void_p(array[start:].ctypes.data), types[name]))
        return native

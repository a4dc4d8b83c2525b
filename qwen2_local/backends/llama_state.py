"""How llama.cpp writes down the KV of one sequence (`llama_state_seq_get_data`), to the byte, and the same KV without what is around it.

    u32 magic, i32 sequence, u32 streams
    for each stream: u32 cells; where there are none, nothing more. Else
        for each cell: i32 position, u32 1, i32 sequence
        u32 0 (V is not transposed: flash attention wants it so), u32 layers
        for the K of each layer, then for the V of each layer: i32 type, u64 bytes of a row, and a row for each cell

What leaves this module are the rows alone, in the order of their positions: they mean the same however the memory is laid out.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qwen2_local.errors import BackendError

Bytes = npt.NDArray[np.uint8]

_MAGIC = 0xAF143CD8
_CELL = 12
_MATRIX_HEAD = 12


@dataclass(frozen=True, slots=True)
class StateFormat:
    """The form for one model and one layout. row: bytes of a token in the K, or V, of a layer; kind: the ggml type of both."""

    layers: int
    row: int
    kind: int
    streams: int

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's rows."""
        return 2 * self.layers * self.row

    def size(self, tokens: int) -> int:
        """Bytes of the state of so many tokens."""
        return 12 + 4 * self.streams + _CELL * tokens + 8 + 2 * self.layers * (_MATRIX_HEAD + tokens * self.row)

    def rows(self, data: bytes | memoryview, tokens: int) -> Bytes:
        """The rows [2 layers, tokens x row] of a chunk, where they lie. Raises BackendError if it is of another size."""
        try:
            raw = np.frombuffer(data, np.uint8)
        except (TypeError, ValueError, AttributeError, BufferError) as error:
            raise BackendError(f"A chunk of KV is no plain bytes ({error}).", hint="Compute its tokens anew.") from None
        if tokens < 1 or raw.size != tokens * self.token_bytes:
            raise BackendError(f"A chunk of KV of {tokens} tokens has {raw.size} bytes.", hint="Compute its tokens anew.")
        return raw.reshape(2 * self.layers, -1)

    def write(self, parts: Sequence[Bytes], first: int, sequence: int) -> Bytes:
        """The state of a sequence whose tokens, from position `first` on, have these rows; each part is [2 layers, tokens x row]."""
        tokens = sum(part.shape[1] for part in parts) // self.row
        state = np.empty(self.size(tokens), np.uint8)
        head, cells, middle, matrices, tail = self._divide(state, tokens, sequence)
        head[:], middle[:], tail[:] = self._head(tokens, sequence), (0, self.layers), 0
        cells[:, 0] = np.arange(first, first + tokens)
        cells[:, 1:] = 1, sequence
        matrices[:, :_MATRIX_HEAD] = self._matrix_head()
        at = _MATRIX_HEAD
        for part in parts:
            matrices[:, at : at + part.shape[1]] = part
            at += part.shape[1]
        return state

    def read(self, state: Bytes, first: int, tokens: int, sequence: int) -> Bytes:
        """The rows [2 layers, tokens x row] of a state that has to hold these positions of this sequence, and nothing else.

        They may be a view of it. Raises BackendError if it is not of this form.
        """
        if state.size != self.size(tokens):
            raise _unknown(f"{state.size} bytes instead of {self.size(tokens)}")
        head, cells, middle, matrices, tail = self._divide(state, tokens, sequence)
        if not np.array_equal(head, self._head(tokens, sequence)) or tuple(middle) != (0, self.layers) or tail.any():
            raise _unknown("another head")
        if (cells[:, 1] != 1).any() or (cells[:, 2] != sequence).any():
            raise _unknown("other owners of the cells")
        if (matrices[:, :_MATRIX_HEAD] != self._matrix_head()).any():
            raise _unknown("other types, or rows of another size")
        rows, positions, wanted = matrices[:, _MATRIX_HEAD:], cells[:, 0], np.arange(first, first + tokens)
        if np.array_equal(positions, wanted):
            return rows
        order = np.argsort(positions)  # cells are taken where there is room
        if not np.array_equal(positions[order], wanted):
            raise _unknown("other positions")
        return rows.reshape(2 * self.layers, tokens, self.row)[:, order].reshape(2 * self.layers, -1)

    def _divide(
        self, state: Bytes, tokens: int, sequence: int
    ) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int32], npt.NDArray[np.uint32], Bytes, npt.NDArray[np.uint32]]:
        """Views of a state: the head up to the number of cells, the cells [tokens, 3], (transposed, layers), the matrices, the empty streams."""
        stream = self._stream(sequence)
        cells = 12 + 4 * (stream + 1)
        middle = cells + _CELL * tokens
        end = state.size - 4 * (self.streams - 1 - stream)
        return (
            state[:cells].view(np.uint32),
            state[cells:middle].view(np.int32).reshape(tokens, 3),
            state[middle : middle + 8].view(np.uint32),
            state[middle + 8 : end].reshape(2 * self.layers, -1),
            state[end:].view(np.uint32),
        )

    def _head(self, tokens: int, sequence: int) -> npt.NDArray[np.uint32]:
        return np.array([_MAGIC, sequence, self.streams, *[0] * self._stream(sequence), tokens], np.uint32)

    def _matrix_head(self) -> Bytes:
        return np.frombuffer(struct.pack("=iQ", self.kind, self.row), np.uint8)

    def _stream(self, sequence: int) -> int:
        return sequence if self.streams > 1 else 0


def _unknown(difference: str) -> BackendError:
    return BackendError(f"llama.cpp writes KV in a form that is unknown here ({difference}).", hint="Nothing can be cached with this version of it.")

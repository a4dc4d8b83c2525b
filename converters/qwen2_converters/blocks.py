"""Moves weights from the checkpoint to the outputs, a block of rows at a time: read once, encoded for each output.

Every block knows where it comes from and where it goes before anything is read, so blocks may be done in any order, and memory is bounded
by their size and the number of threads, however large a tensor is. They are done shard by shard: a shard that has been read is not needed again.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Protocol, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from qwen2_converters.arriving import Arrivals
from qwen2_converters.job import Block, Buffer, Output
from qwen2_converters.packed import PackedMatrix
from qwen2_converters.planned import PlannedTensor, Rows
from qwen2_local.errors import BadFile
from qwen2_local.files import write_all
from qwen2_local.formats.checkpoint import Checkpoint, Located

_T = TypeVar("_T")


class Delta(Protocol):
    """Something to add to the weights while they are converted: a LoRA adapter to merge."""

    def add(self, source_name: str, first_row: int, weights: npt.NDArray[np.float32]) -> None:
        """Adds in place to `weights` [rows, columns], the rows of the checkpoint's tensor `source_name` from `first_row` on. From any thread."""


Advance: TypeAlias = Callable[[str, int], None]
"""Called on the calling thread after each block, for each output: the tensor's name, and the bytes written."""


def convert_blocks(
    checkpoint: Checkpoint,
    outputs: Sequence[Output],
    advance: Advance,
    *,
    threads: int,
    arrivals: Arrivals | None = None,
    delta: Delta | None = None,
) -> None:
    """Reads, encodes and writes all that is not finished yet.

    Raises what `encode` raises, BadFile for a checkpoint that ends early, OSError, and what `arrivals` raises.
    """
    pieces = _pieces(checkpoint, outputs)
    if arrivals and pieces and checkpoint.config.packed:
        # A packed matrix may lie in several shards.
        for shard in checkpoint.shards:
            arrivals.wait(shard)
        convert_blocks(checkpoint, outputs, advance, threads=threads)
        for output in outputs:
            output.ledger.sync()
        for shard in checkpoint.shards:
            arrivals.consumed(shard)
        return
    if arrivals:
        for shard in sorted({located.file for located in checkpoint.tensors.values()} - {piece.file for piece in pieces}):
            arrivals.consumed(shard)
    for file, group in groupby(pieces, key=lambda piece: piece.file):
        if arrivals and file != _NOWHERE:
            arrivals.wait(file)
        _convert_file(list(group), advance, delta, threads)
        if arrivals and file != _NOWHERE:
            for output in outputs:
                output.ledger.sync()
            arrivals.consumed(file)


# What to read


_NOWHERE = Path(os.devnull)
"""Where rows of zeros come from."""


@dataclass(frozen=True, slots=True)
class _Use:
    """What an output makes of a piece. first: its first row in `tensor`. number: among the output's pieces."""

    output: Output
    tensor: PlannedTensor
    first: int
    number: int

    def nbytes(self, rows: int) -> int:
        return self.tensor.nbytes // self.tensor.row_count * rows


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows that lie one after the other in one shard, and all that is made of them. packed: the matrix that they are, if GPTQ or AWQ packed it."""

    rows: Rows
    located: Located | None
    packed: PackedMatrix | None
    uses: list[_Use]

    @property
    def file(self) -> Path:
        return self.located.file if self.located else _NOWHERE

    @property
    def dtype(self) -> str:
        return self.located.entry.dtype if self.located else "F32"

    @property
    def row_bytes(self) -> int:
        if self.located is None:
            return 4 * self.uses[0].tensor.shape[-1]
        entry = self.located.entry
        return (entry.end - entry.begin) // math.prod(entry.shape[:-1])

    @property
    def begin(self) -> int:
        return self.located.entry.begin + self.rows.first * self.row_bytes if self.located else 0


@dataclass(frozen=True, slots=True)
class _Read:
    """Rows of a piece that are read at once. start: the first, within the piece."""

    piece: _Piece
    start: int
    count: int


def _pieces(checkpoint: Checkpoint, outputs: Sequence[Output]) -> list[_Piece]:
    """All that is to be read, in the order of the shards' names and within them."""
    found: dict[tuple[Rows, int], _Piece] = {}
    for output in outputs:
        number = 0
        for tensor in output.job.plan.tensors:
            first = 0
            for rows in tensor.rows:
                if number not in output.ledger.finished:
                    key = rows, 0 if rows.source else tensor.shape[-1]
                    if key not in found:
                        found[key] = _piece(checkpoint, rows)
                    found[key].uses.append(_Use(output, tensor, first, number))
                first += rows.count
                number += 1
    return sorted(found.values(), key=lambda piece: (piece.located is not None, piece.file, piece.begin))


def _piece(checkpoint: Checkpoint, rows: Rows) -> _Piece:
    if rows.source is None:
        return _Piece(rows, None, None, [])
    packed = PackedMatrix.of(checkpoint, rows.source) if rows.source.endswith(".qweight") else None
    return _Piece(rows, checkpoint.tensors[rows.source], packed, [])


# One shard


def _convert_file(pieces: Sequence[_Piece], advance: Advance, delta: Delta | None, threads: int) -> None:
    weights = min(use.output.job.weights for piece in pieces for use in piece.uses)
    left = {id(piece): piece.rows.count for piece in pieces}
    with _opened(pieces[0].file) as handle:

        def work(read: _Read) -> None:
            packed = read.piece.packed
            dtype, raw = ("", packed.fetch(read.start, read.count)) if packed else _merged(read, _fetch(handle, read), delta)
            for use in read.piece.uses:
                _write(use, read, packed.encode(use.tensor, read.count, raw) if packed else _encode(use, read, dtype, raw))

        with closing(_each(work, _reads(pieces, weights), threads)) as done:
            for read in done:
                for use in read.piece.uses:
                    advance(use.tensor.parts[0].name, use.nbytes(read.count))
                left[id(read.piece)] -= read.count
                if not left[id(read.piece)]:
                    for use in read.piece.uses:
                        use.output.ledger.note(use.number, use.nbytes(read.piece.rows.count))


def _reads(pieces: Iterable[_Piece], weights: int) -> Iterator[_Read]:
    for piece in pieces:
        step = piece.packed.rows_at_once if piece.packed else max(1, weights // piece.uses[0].tensor.shape[-1])
        for start in range(0, piece.rows.count, step):
            yield _Read(piece, start, min(step, piece.rows.count - start))


def _fetch(handle: int, read: _Read) -> Buffer:
    if read.piece.located is None:
        return np.zeros(read.count * read.piece.row_bytes, np.uint8)
    raw = np.empty(read.count * read.piece.row_bytes, np.uint8)
    view = raw.data
    begin = read.piece.begin + read.start * read.piece.row_bytes
    done = 0
    while done < raw.size:
        count = os.preadv(handle, [view[done:]], begin + done)
        if count == 0:
            fault = f"{read.piece.file} became shorter while it was converted: it ends at byte {begin + done}."
            raise BadFile(fault, hint="Fetch it again, and let nothing change it meanwhile.")
        done += count
    return raw


def _merged(read: _Read, raw: Buffer, delta: Delta | None) -> tuple[str, Buffer]:
    """The dtype and bytes of the rows with `delta` added to them."""
    source = read.piece.rows.source
    if delta is None or source is None:
        return read.piece.dtype, raw
    if read.piece.dtype == "BF16":
        weights = (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        weights = raw.view({"F16": np.float16, "F32": np.float32}[read.piece.dtype]).astype(np.float32)
    weights = weights.reshape(read.count, -1)
    delta.add(source, read.piece.rows.first + read.start, weights)
    return "F32", weights.reshape(-1).view(np.uint8)


def _encode(use: _Use, read: _Read, dtype: str, raw: Buffer) -> list[Buffer]:
    block = Block(use.tensor, use.first + read.start, read.count, read.piece.file, dtype)
    return use.output.job.encode(block, _widened(raw, read.count, use.tensor.shape[-1], dtype))


def _write(use: _Use, read: _Read, encoded: list[Buffer]) -> None:
    for part, data in zip(use.tensor.parts, encoded, strict=True):
        place = use.output.places[part.name]
        write_all(place.handle, data.data, place.offset + (use.first + read.start) * (part.nbytes // use.tensor.row_count))


def _widened(raw: Buffer, rows: int, columns: int, dtype: str) -> Buffer:
    """The rows with zeros to their right, up to `columns`. All bits 0 are the number 0 in every dtype."""
    row_bytes = columns * (4 if dtype == "F32" else 2)
    if raw.size == rows * row_bytes:
        return raw
    wide = np.zeros((rows, row_bytes), np.uint8)
    wide[:, : raw.size // rows] = raw.reshape(rows, -1)
    return wide.reshape(-1)


def _each(work: Callable[[_T], None], tasks: Iterable[_T], threads: int) -> Generator[_T, None, None]:
    """Does `work` for all tasks and gives each when it is done. Stops at the first error, after those under way."""
    pool = ThreadPoolExecutor(threads, "convert")
    running: dict[Future[None], _T] = {}
    try:
        for task in tasks:
            running[pool.submit(work, task)] = task
            if len(running) > 2 * threads:
                yield from _finished(running)
        while running:
            yield from _finished(running)
    finally:
        pool.shutdown(cancel_futures=True)


def _finished(running: dict[Future[None], _T]) -> Iterator[_T]:
    done, _ = wait(running, return_when=FIRST_COMPLETED)
    for future in done:
        future.result()
        yield running.pop(future)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield handle
    finally:
        os.close(handle)

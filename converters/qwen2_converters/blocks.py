"""Moves weights from the checkpoint to the output, a block of rows at a time.

Every block knows where it comes from and where it goes before anything is read, so blocks may be done in any order, and memory is
bounded by their size and the number of threads, however large a tensor is.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from qwen2_converters.planned import Plan, PlannedTensor
from qwen2_local.errors import BadFile
from qwen2_local.formats.checkpoint import Checkpoint

Buffer: TypeAlias = "npt.NDArray[np.uint8]"
Advance: TypeAlias = Callable[[str, int], None]
"""Called on the calling thread after each block: the tensor's name, and the bytes written."""


@dataclass(frozen=True, slots=True)
class Block:
    """Some whole rows of one tensor. first, rows: in the output. file, dtype, begin, nbytes: where they lie in the checkpoint."""

    tensor: PlannedTensor
    first: int
    rows: int
    file: Path
    dtype: str
    begin: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where a part of the output lies: an open file, and the offset in it in bytes."""

    handle: int
    offset: int


Encode: TypeAlias = Callable[[Block, Buffer], list[Buffer]]
"""From a block and its bytes in the checkpoint to its bytes in each part of the output. Raises BadFile."""


def convert_blocks(
    checkpoint: Checkpoint, plan: Plan, places: dict[str, Place], encode: Encode, advance: Advance, *, weights: int, threads: int
) -> None:
    """Reads, encodes and writes all of `plan`. places: of each part, by name. weights: how many a block may have; one row at least.

    With one thread everything runs on the calling thread. Raises what `encode` raises, BadFile for a checkpoint that ends early, OSError.
    """
    with _opened({located.file for located in checkpoint.tensors.values()}) as sources:

        def work(block: Block) -> None:
            for part, data in zip(block.tensor.parts, encode(block, _read(sources[block.file], block)), strict=True):
                place = places[part.name]
                _write(place.handle, data, place.offset + block.first * (part.nbytes // block.tensor.row_count))

        with closing(_each(work, _blocks(checkpoint, plan, weights), threads)) as done:
            for block in done:
                advance(block.tensor.parts[0].name, block.tensor.nbytes // block.tensor.row_count * block.rows)


def _blocks(checkpoint: Checkpoint, plan: Plan, weights: int) -> Iterator[Block]:
    for tensor in plan.tensors:
        first = 0
        step = max(1, weights // tensor.shape[-1])
        for rows in tensor.rows:
            located = checkpoint.tensors[rows.source]
            width = tensor.shape[-1] * (4 if located.entry.dtype == "F32" else 2)
            for start in range(rows.first, rows.first + rows.count, step):
                count = min(step, rows.first + rows.count - start)
                yield Block(tensor, first, count, located.file, located.entry.dtype, located.entry.begin + start * width, count * width)
                first += count


def _each(work: Callable[[Block], None], blocks: Iterable[Block], threads: int) -> Generator[Block, None, None]:
    """Does `work` for all blocks and gives each when it is done. Stops at the first error, after the blocks under way."""
    if threads <= 1:
        for block in blocks:
            work(block)
            yield block
        return
    pool = ThreadPoolExecutor(threads, "convert")
    running: dict[Future[None], Block] = {}
    try:
        for block in blocks:
            running[pool.submit(work, block)] = block
            if len(running) > 2 * threads:
                yield from _finished(running)
        while running:
            yield from _finished(running)
    finally:
        pool.shutdown(cancel_futures=True)


def _finished(running: dict[Future[None], Block]) -> Iterator[Block]:
    done, _ = wait(running, return_when=FIRST_COMPLETED)
    for future in done:
        future.result()
        yield running.pop(future)


@contextmanager
def _opened(paths: Iterable[Path]) -> Iterator[dict[Path, int]]:
    with ExitStack() as stack:
        handles = {}
        for path in paths:
            handles[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, handles[path])
        yield handles


def _read(handle: int, block: Block) -> Buffer:
    raw = np.empty(block.nbytes, np.uint8)
    view = raw.data
    done = 0
    while done < block.nbytes:
        count = os.preadv(handle, [view[done:]], block.begin + done)
        if count == 0:
            fault = f"{block.file} became shorter while it was converted: it ends at byte {block.begin + done}."
            raise BadFile(fault, hint="Fetch it again, and let nothing change it meanwhile.")
        done += count
    return raw


def _write(handle: int, data: Buffer, offset: int) -> None:
    view = data.data
    done = 0
    while done < len(view):
        done += os.pwrite(handle, view[done:], offset + done)

"""An importance matrix: how strongly each column of each matrix is driven by real text, so that quantizing keeps those exact that matter.

llama.cpp's llama-imatrix makes them: GGUF files with the tensors NAME.in_sum2 and NAME.counts, or, until 2025, a plain format (.dat). Either
is held against the model's shape before any number is read, and numbers are read for this model's matrices alone.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt

from qwen2_converters.plan_gguf import gguf_name
from qwen2_local.errors import BadFile
from qwen2_local.formats.checkpoint import expected_tensors
from qwen2_local.formats.config import Qwen2Config
from qwen2_local.formats.gguf import GgufHeader, read_gguf
from qwen2_local.formats.magic import open_regular

Floats: TypeAlias = "npt.NDArray[np.float32]"
_Shapes: TypeAlias = dict[str, tuple[int, int]]
"""By the GGUF name of a matrix: experts (1 without), columns."""

_SUMS, _COUNTS = ".in_sum2", ".counts"
_MAX_TEXT = 1 << 16
_HINT = "Take one that llama-imatrix made of this very model, or make it anew."


@dataclass(frozen=True, slots=True, eq=False)
class Importance:
    """What a file says. columns: by the GGUF name of a matrix, an array [experts, columns], 1 expert without; all finite, none negative.

    chunks: how many pieces of text were counted. dataset: the name of the text. Both as the file says, 0 and "" where it does not.
    """

    path: Path
    columns: Mapping[str, Floats] = field(repr=False)
    chunks: int = 0
    dataset: str = ""

    def of(self, name: str, expert: int, width: int) -> Floats | None:
        """The importance of the columns of one matrix; None where the file is silent. Columns up to `width` that pad a matrix have none."""
        known = self.columns.get(name)
        if known is None:
            return None
        row = known[expert]
        return row if row.size == width else np.pad(row, (0, width - row.size))


def read_importance(path: Path, config: Qwen2Config) -> Importance:
    """The importance matrix in the file `path`, for a model of the shape `config`.

    Raises BadFile: a damaged file, one of another model, numbers that are not finite or negative.
    """
    try:
        with open_regular(path) as file:
            magic = file.read(4)
            file.seek(0)
            made = _from_gguf(path, file, _shapes(config)) if magic == b"GGUF" else _from_dat(path, file, _shapes(config))
    except OSError as error:
        raise BadFile(f"{path} cannot be read: {error.strerror}.", hint="Check the name and its permissions.") from error
    if not made.columns:
        raise _bad(path, "it holds no matrix")
    return made


def _shapes(config: Qwen2Config) -> _Shapes:
    # llama.cpp may know a tied head by its own name.
    expected = expected_tensors(replace(config, tied=False), "switch")
    return {gguf_name(name): (math.prod(shape[:-2]), shape[-1]) for name, shape in expected if name.endswith(".weight") and len(shape) > 1}


# GGUF


def _from_gguf(path: Path, file: BinaryIO, shapes: _Shapes) -> Importance:
    header = read_gguf(path)
    kind = header.text("general.type")
    if kind != "imatrix":
        raise _bad(path, f"it is a GGUF of type {str(kind)[:40]!r}, and no importance matrix")
    names = sorted({name.removesuffix(_SUMS).removesuffix(_COUNTS) for name in header.tensors})
    for name in names:
        _check_gguf(path, header, name, shapes)
    columns = {}
    for name in names:
        experts, width = shapes[name]
        sums = _numbers(path, file, header.tensors[name + _SUMS].offset, experts * width, name).reshape(experts, width)
        counts = np.floor(_numbers(path, file, header.tensors[name + _COUNTS].offset, experts, name) + 0.5).reshape(experts, 1)
        # An expert that no text reached: all its columns alike, as llama.cpp has it.
        columns[name] = np.divide(sums, counts, out=np.ones_like(sums), where=counts > 0)
    chunks, datasets = header.keys.get("imatrix.chunk_count"), header.keys.get("imatrix.datasets")
    dataset = datasets[0] if isinstance(datasets, list) and datasets else ""
    return Importance(path, columns, chunks if type(chunks) is int else 0, dataset[:_MAX_TEXT])


def _check_gguf(path: Path, header: GgufHeader, name: str, shapes: _Shapes) -> None:
    experts, width = _known(path, name, shapes)
    for ending, rows in ((_SUMS, (width, experts)), (_COUNTS, (1, experts))):
        tensor = header.tensors.get(name + ending)
        if tensor is None:
            raise _bad(path, f"it lacks {name}{ending}")
        if tensor.type.name != "F32":
            raise _bad(path, f"{name}{ending} is {tensor.type.name}, not F32")
        shape = (*tensor.shape, 1)[:2] if len(tensor.shape) < 3 else tensor.shape
        if shape != rows:
            raise _bad(path, f"{name}{ending} has the shape {list(tensor.shape)}; this model's has {list(rows)}")


# The plain format: a count; then name, calls and sums of each matrix; then, perhaps, the number of chunks and the name of the text.


def _from_dat(path: Path, file: BinaryIO, shapes: _Shapes) -> Importance:
    size = os.fstat(file.fileno()).st_size
    count = _integer(path, file)
    if not 1 <= count <= len(shapes):
        raise _bad(path, f"it is neither a GGUF nor the plain format, or it claims {count} matrices where this model has {len(shapes)}")
    columns = dict(_dat_entry(path, file, shapes) for _ in range(count))
    if len(columns) != count:
        raise _bad(path, "it holds a matrix twice")
    if file.tell() == size:
        return Importance(path, columns)
    chunks = _integer(path, file)
    dataset = _text(path, file) if file.tell() < size else ""
    return Importance(path, columns, max(chunks, 0), dataset)


def _dat_entry(path: Path, file: BinaryIO, shapes: _Shapes) -> tuple[str, Floats]:
    name = _text(path, file)
    experts, width = _known(path, name, shapes)
    calls, values = _integer(path, file), _integer(path, file)
    if values != experts * width:
        raise _bad(path, f"{name} has {values} columns; this model's has {experts * width}")
    sums = _numbers(path, file, file.tell(), values, name).reshape(experts, width)
    return name, sums / np.float32(calls) if calls > 0 else sums


def _integer(path: Path, file: BinaryIO) -> int:
    raw = file.read(4)
    if len(raw) < 4:
        raise _bad(path, "it is truncated")
    return int(struct.unpack("<i", raw)[0])


def _text(path: Path, file: BinaryIO) -> str:
    length = _integer(path, file)
    raw = file.read(length) if 0 <= length <= _MAX_TEXT else b""
    if len(raw) != length:
        raise _bad(path, "it is truncated, or neither a GGUF nor the plain format")
    return raw.decode("utf-8", "replace")


# Both


def _known(path: Path, name: str, shapes: _Shapes) -> tuple[int, int]:
    if name not in shapes:
        raise _bad(path, f"it is of another model: this one has no matrix {name[:100]!r}")
    return shapes[name]


def _numbers(path: Path, file: BinaryIO, offset: int, count: int, name: str) -> Floats:
    file.seek(offset)
    raw = file.read(4 * count)
    if len(raw) < 4 * count:
        raise _bad(path, "it is truncated")
    numbers = np.frombuffer(raw, "<f4").astype(np.float32)
    # NaN is not less than infinity.
    if not (numbers >= 0).all() or not (numbers < np.inf).all():
        raise _bad(path, f"{name} holds numbers that are negative or not finite")
    return numbers


def _bad(path: Path, fault: str) -> BadFile:
    return BadFile(f"{path} is no importance matrix of use here: {fault}.", hint=_HINT)

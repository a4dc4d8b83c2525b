"""The safetensors format: eight bytes of length, a JSON header, tensors without gaps. https://github.com/huggingface/safetensors

Validated as strictly as the reference implementation does. One difference: the reference allows headers of 100 MB; the largest of a Qwen2
(57B-A14B in one file) has 1 MB, and we stop at 8, which bounds the memory that a hostile header can take.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen2_local.errors import BadFile
from qwen2_local.formats.magic import not_a, open_regular
from qwen2_local.formats.strict_json import parse_object

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

MAX_HEADER = 8_000_000
"""Bytes of header that are read at most."""

_MAX_CONTAINERS = 400_000
_READ = 1 << 30  # macOS refuses larger reads.

# Bits of an element, and the NumPy type that holds it. BF16 has none: its bits, as uint16. The 4- and 6-bit types cannot be read.
_DTYPES: dict[str, tuple[int, str]] = {
    "BOOL": (8, "?"), "U8": (8, "u1"), "I8": (8, "i1"), "U16": (16, "<u2"), "I16": (16, "<i2"), "U32": (32, "<u4"), "I32": (32, "<i4"),
    "U64": (64, "<u8"), "I64": (64, "<i8"), "F16": (16, "<f2"), "BF16": (16, "<u2"), "F32": (32, "<f4"), "F64": (64, "<f8"), "C64": (64, "<c8"),
    "F8_E4M3": (8, "u1"), "F8_E5M2": (8, "u1"), "F8_E8M0": (8, "u1"), "F4": (4, ""), "F6_E2M3": (6, ""), "F6_E3M2": (6, ""),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies. dtype: as in the file ("BF16"). begin, end: offsets in bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """A validated header. `tensors` in the order of their data."""

    path: Path
    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]


def read_header(path: Path) -> SafetensorsHeader:
    """Reads and checks the header of `path`. Raises BadFile that says what is wrong; no tensor is read."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(64)
            length = struct.unpack_from("<Q", head)[0] if len(head) >= 8 else 0
            # A length of 640 begins like a pickle: look for impostors only where the header does not begin.
            if len(head) < 10 or head[8:9] != b"{":
                raise not_a("safetensors file", path, head)
            if length > size - 8:
                raise _bad(path, f"it is truncated: its header needs {length + 8} bytes, it has {size}")
            if length > MAX_HEADER:
                raise _bad(path, f"its header of {length} bytes is larger than {MAX_HEADER}")
            file.seek(8)
            raw = file.read(length)
    except OSError as error:
        raise BadFile(f"{path} cannot be read: {error.strerror}.", hint="Check that the folder is complete.") from error
    if len(raw) != length:
        raise _bad(path, "it changed while it was read")
    if raw.count(b"{") + raw.count(b"[") > _MAX_CONTAINERS:
        raise _bad(path, "its header lists too many tensors")
    header = parse_object(raw, f"The header of {path}")
    metadata = header.pop("__metadata__", None)
    if metadata is None:  # MLX writes null
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _bad(path, "__metadata__ is no table of strings")
    start = 8 + length
    entries = sorted(((name, _entry(path, name, value, start)) for name, value in header.items()), key=lambda item: (item[1].begin, item[1].end))
    _check_layout(path, entries, start, size)
    return SafetensorsHeader(path, dict(entries), metadata)


def read_tensor(path: Path, entry: TensorEntry) -> npt.NDArray[Any]:
    """The tensor as a new array of entry.shape; BF16 as its bits in uint16. Raises BadFile if the file is shorter than its header said.

    Read, not mapped: a file that shrinks meanwhile is an error here, and the end of the process there.
    """
    import numpy as np

    kind = _DTYPES[entry.dtype][1]
    if not kind:
        raise _bad(path, f"{entry.dtype} tensors are not supported")
    array: npt.NDArray[np.generic] = np.empty(entry.shape, dtype=kind)
    view = array.reshape(-1).view("u1").data
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        done = 0
        while done < len(view):
            count = os.preadv(handle, [view[done : done + _READ]], entry.begin + done)
            if count == 0:
                raise _bad(path, f"it ends at byte {entry.begin + done}, before byte {entry.end}")
            done += count
    finally:
        os.close(handle)
    return array


def _entry(path: Path, name: str, value: object, start: int) -> TensorEntry:
    where = f"the tensor {name[:100]!r}"
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise _bad(path, f"{where} has no dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise _bad(path, f"{where} has the unknown dtype {str(dtype)[:40]!r}")
    if not isinstance(shape, list) or len(shape) > 8 or not all(_is_count(n) for n in shape):
        raise _bad(path, f"{where} has the impossible shape {str(shape)[:80]}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(n) for n in offsets):
        raise _bad(path, f"{where} has the impossible data_offsets {str(offsets)[:80]}")
    # Python's integers do not overflow; eight factors below 2**63 stay small.
    bits = math.prod(shape) * _DTYPES[dtype][0]
    if bits % 8 or bits // 8 != offsets[1] - offsets[0]:
        raise _bad(path, f"{where} of {dtype} {shape} needs {bits / 8:g} bytes, its data_offsets give {offsets[1] - offsets[0]}")
    return TensorEntry(dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _check_layout(path: Path, entries: list[tuple[str, TensorEntry]], start: int, size: int) -> None:
    end = start
    for name, entry in entries:
        if entry.begin != end:
            fault = "overlaps the one before it" if entry.begin < end else f"leaves a gap of {entry.begin - end} bytes before it"
            raise _bad(path, f"the tensor {name[:100]!r} {fault}")
        end = entry.end
    if size < end:
        raise _bad(path, f"it is truncated: {end} bytes are expected, it has {size}")
    if size > end:
        raise _bad(path, f"{size - end} bytes follow its last tensor")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _bad(path: Path, fault: str) -> BadFile:
    return BadFile(f"{path} is damaged: {fault}.", hint="Fetch it again from its original source.")

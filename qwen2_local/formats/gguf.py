"""The GGUF format: keys and values, tensor infos, aligned tensors. https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

Every count, length, type, shape and offset is checked before it is used, as strictly as llama.cpp's gguf.cpp and then some: parsers of
this format have a long list of CVEs, and what passes here goes to one. The header is read (never mapped) up to 16 MB; limits on counts
keep the memory that a hostile header can take below 200 MB.
"""

from __future__ import annotations

import math
import os
import struct
import sys
from array import array
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, TypeAlias

from qwen2_local.errors import BadFile, UnsupportedModel
from qwen2_local.formats.ggml_types import BY_NUMBER, GgmlType
from qwen2_local.formats.magic import not_a, open_regular

MAX_HEADER = 16_000_000
"""Bytes of header that are read at most. Qwen2's vocabulary takes 6 MB."""

_MAX_KEYS = 16_384
_MAX_TENSORS = 65_536
_MAX_STRINGS = 1_000_000  # in all arrays together: 152 k tokens and 151 k merges
_MAX_NAME = 63  # GGML_MAX_NAME, less its zero
_MAX_ELEMENTS = 2**63 - 1

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 10: "<Q", 11: "<q", 12: "<d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_UINT32 = 4

# Types that llama.cpp wrote in the autumn of 2024 and has dropped since: it repacks Q4_0 and IQ4_NL as it loads them.
_RETIRED = {31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8"}

GgufValue: TypeAlias = "int | float | bool | str | list[str] | array[int] | array[float]"
"""The value of a key."""


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor. shape: as in the file, the row's length first. offset, nbytes: in bytes, from the start of the file."""

    type: GgmlType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """A validated header. Arrays in `keys` are lists of str, or arrays of numbers whose typecode is their type ("i": int32, "f": float32)."""

    path: Path
    version: int
    keys: dict[str, GgufValue]
    tensors: dict[str, GgufTensor]
    alignment: int
    data_offset: int

    def text(self, key: str) -> str | None:
        """The string under `key`; None without it. Raises BadFile for another type."""
        value = self.keys.get(key)
        if value is None or isinstance(value, str):
            return value
        raise _bad(self.path, f"the key {key} is no string")

    def strings(self, key: str) -> list[str] | None:
        """The list of strings under `key`; None without it. Raises BadFile for another type."""
        value = self.keys.get(key)
        if value is None or isinstance(value, list):
            return value
        raise _bad(self.path, f"the key {key} is no list of strings")


def read_gguf(path: Path) -> GgufHeader:
    """Reads and checks the header of `path` (GGUF version 2 or 3, little endian).

    Raises BadFile that says what is wrong, UnsupportedModel for tensors of a type that llama.cpp has dropped.
    """
    header, fault = salvage_gguf(path)
    if fault is not None:
        raise fault
    return header


def salvage_gguf(path: Path) -> tuple[GgufHeader, BadFile | None]:
    """What of the header of `path` is sound, up to the first fault, and that fault, or None. For looking at a file, never for loading it.

    After a fault, `tensors` lie where the file says, unchecked; and counted from the start of the tensors, if where that is was not reached
    (`data_offset` is 0). Raises BadFile where nothing can be read: for what is no GGUF file, of an unknown version, or claims absurd counts.
    """
    try:
        with open_regular(path) as file:
            return _read(path, file)
    except OSError as error:
        raise BadFile(f"{path} cannot be read: {error.strerror}.", hint="Check the name and the folder.") from error


def _read(path: Path, file: BinaryIO) -> tuple[GgufHeader, BadFile | None]:
    size = os.fstat(file.fileno()).st_size
    head = file.read(64)
    if head[:4] != b"GGUF":
        raise not_a("GGUF file", path, head)
    cursor = _Cursor(path, file, head, size)
    cursor.at = 4
    version = cursor.number("<I")
    if version and not version & 0xFFFF:
        raise _bad(path, "it is big-endian, which no Qwen2 backend here reads")
    if version not in (2, 3):
        raise _bad(path, f"its GGUF version is {version}; 2 and 3 are known")
    tensor_count = cursor.count("tensors", _MAX_TENSORS)
    key_count = cursor.count("keys", _MAX_KEYS)
    keys: dict[str, GgufValue] = {}
    tensors: dict[str, GgufTensor] = {}
    alignment, data_offset = 32, 0
    fault: BadFile | None = None
    try:
        alignment = _read_keys(cursor, key_count, keys)
        _read_infos(cursor, tensor_count, tensors)
        data_offset = -(-cursor.at // alignment) * alignment
        _check_places(path, tensors, alignment, data_offset, size)
    except BadFile as error:
        fault = error
    placed = {name: replace(tensor, offset=data_offset + tensor.offset) for name, tensor in tensors.items()}
    return GgufHeader(path, version, keys, placed, alignment, data_offset), fault


class _Cursor:
    """Reads the header forwards. No read goes past the file or MAX_HEADER."""

    def __init__(self, path: Path, file: BinaryIO, head: bytes, size: int) -> None:
        self.path = path
        self.at = 0
        self.strings_left = _MAX_STRINGS
        self._file = file
        self._size = size
        self.buffer = head

    def need(self, count: int) -> int:
        """Makes sure that `count` bytes are in the buffer from `at` on, and steps over them. Gives the old `at`."""
        start, end = self.at, self.at + count
        if end > len(self.buffer):
            if end > self._size:
                raise _bad(self.path, f"it is truncated or its header lies: the header needs at least {end} bytes, the file has {self._size}")
            if end > MAX_HEADER:
                raise _bad(self.path, f"its header is larger than {MAX_HEADER} bytes")
            # Twice as much each time, so that the copies stay few.
            more = max(end, min(max(2 * len(self.buffer), 1 << 23), MAX_HEADER, self._size)) - len(self.buffer)
            self.buffer += self._file.read(more)
            if end > len(self.buffer):
                raise _bad(self.path, "it changed while it was read")
        self.at = end
        return start

    def number(self, code: str) -> int:
        start = self.need(struct.calcsize(code))
        value: int = struct.unpack_from(code, self.buffer, start)[0]
        return value

    def count(self, what: str, most: int) -> int:
        value = self.number("<Q")
        if value > most:
            raise _bad(self.path, f"it claims {value} {what}; more than {most} are not believed")
        return value

    def string(self, what: str) -> str:
        start = self.need(self.number("<Q"))
        try:
            return self.buffer[start : self.at].decode("utf-8")
        except UnicodeDecodeError as error:
            raise _bad(self.path, f"{what} is not UTF-8 text") from error

    def strings(self, count: int, what: str) -> list[str]:
        """`count` strings. The same as calling `string`, but a token costs a third of a microsecond."""
        self.strings_left -= count
        if self.strings_left < 0:
            raise _bad(self.path, f"its lists hold more than {_MAX_STRINGS} strings")
        values: list[str] = []
        unpack, at, buffer, end = struct.Struct("<Q").unpack_from, self.at, self.buffer, len(self.buffer)
        try:
            for _ in range(count):
                if at + 8 > end or (stop := at + 8 + unpack(buffer, at)[0]) > end:
                    self.at = at
                    # Buffers more, or raises.
                    self.need(self.number("<Q"))
                    stop, buffer, end = self.at, self.buffer, len(self.buffer)
                values.append(buffer[at + 8 : stop].decode("utf-8"))
                at = stop
        except UnicodeDecodeError as error:
            raise _bad(self.path, f"{what} holds text that is not UTF-8") from error
        # llama.cpp reads C strings: two texts that differ behind a zero are one to it.
        if any("\0" in value for value in values):
            raise _bad(self.path, f"{what} holds text with a zero")
        self.at = at
        return values


def _read_keys(cursor: _Cursor, count: int, keys: dict[str, GgufValue]) -> int:
    """Fills `keys`; gives the alignment."""
    alignment = 32
    for number in range(count):
        key = cursor.string(f"key {number}")
        # A zero would end the key for llama.cpp, so that it is another than the one checked here.
        if not key or len(key) > 65_535 or "\0" in key:
            raise _bad(cursor.path, f"key {number} is empty, longer than 65535, or holds a zero")
        if key in keys:
            raise _bad(cursor.path, f"the key {key[:100]!r} appears twice")
        kind = cursor.number("<I")
        keys[key] = _read_array(cursor, key) if kind == _ARRAY else _read_value(cursor, key, kind)
        if key == "general.alignment":
            # ggml aborts the process on another type, and on tensors that lie closer than its own alignment of 32.
            value = keys[key]
            if kind != _UINT32 or not isinstance(value, int) or value & (value - 1) or not 32 <= value <= 1 << 16:
                raise _bad(cursor.path, f"general.alignment is {str(value)[:40]}, but has to be a uint32 power of two from 32 to 65536")
            alignment = value
    return alignment


def _read_value(cursor: _Cursor, key: str, kind: int) -> int | float | bool | str:
    if kind == _STRING:
        return cursor.string(f"the value of {key[:100]!r}")
    if kind == _BOOL:
        value = cursor.number("<B")
        if value > 1:
            raise _bad(cursor.path, f"the key {key[:100]!r} is neither true nor false")
        return bool(value)
    if kind not in _SCALARS:
        raise _bad(cursor.path, f"the key {key[:100]!r} has the unknown type {kind}")
    return cursor.number(_SCALARS[kind])


def _read_array(cursor: _Cursor, key: str) -> list[str] | array[int] | array[float]:
    kind = cursor.number("<I")
    count = cursor.number("<Q")
    if kind == _STRING:
        return cursor.strings(count, f"the list {key[:100]!r}")
    if kind == _ARRAY:
        raise _bad(cursor.path, f"the key {key[:100]!r} is an array of arrays")
    code = "<B" if kind == _BOOL else _SCALARS.get(kind)
    if code is None:
        raise _bad(cursor.path, f"the key {key[:100]!r} is an array of the unknown type {kind}")
    start = cursor.need(count * struct.calcsize(code))
    # array("Q") and ("q") have 8 bytes, ("I") and ("i") 4, on every platform that we run on.
    values: array[int] | array[float] = array(code[1])
    values.frombytes(memoryview(cursor.buffer)[start : cursor.at])
    if sys.byteorder == "big":
        values.byteswap()
    if kind == _BOOL and count and max(values) > 1:
        raise _bad(cursor.path, f"the key {key[:100]!r} holds what is neither true nor false")
    return values


def _read_infos(cursor: _Cursor, count: int, tensors: dict[str, GgufTensor]) -> None:
    """Fills `tensors`, whose offsets count from the start of the data."""
    for number in range(count):
        name = cursor.string(f"the name of tensor {number}")
        where = f"the tensor {name[:100]!r}"
        if not name or len(name.encode()) > _MAX_NAME or "\0" in name:
            raise _bad(cursor.path, f"the name of tensor {number} is empty, longer than {_MAX_NAME} bytes, or holds a zero")
        if name in tensors:
            raise _bad(cursor.path, f"{where} appears twice")
        dimensions = cursor.number("<I")
        if not 1 <= dimensions <= 4:
            raise _bad(cursor.path, f"{where} has {dimensions} dimensions; 1 to 4 are possible")
        shape = tuple(cursor.number("<Q") for _ in range(dimensions))
        elements = 1
        for length in shape:
            elements *= length
        if not 1 <= elements <= _MAX_ELEMENTS:
            raise _bad(cursor.path, f"{where} has the impossible shape {list(shape)}")
        type_number = cursor.number("<I")
        kind = BY_NUMBER.get(type_number)
        if kind is None and type_number in _RETIRED:
            fault = f"{cursor.path} is no longer supported: {where} is {_RETIRED[type_number]}, which llama.cpp has dropped."
            raise UnsupportedModel(fault, hint=f"Take the {_RETIRED[type_number].rsplit('_', 2)[0]} file instead.")
        if kind is None:
            raise _bad(cursor.path, f"{where} has the unknown type {type_number}")
        if shape[0] % kind.block:
            raise _bad(cursor.path, f"{where} has rows of {shape[0]}, which are no whole blocks of {kind.name} ({kind.block})")
        tensors[name] = GgufTensor(kind, shape, cursor.number("<Q"), kind.row_bytes(shape[0]) * math.prod(shape[1:]))


def _check_places(path: Path, tensors: dict[str, GgufTensor], alignment: int, data_offset: int, size: int) -> None:
    expected = end = 0
    for name, tensor in tensors.items():
        if tensor.offset % alignment:
            raise _bad(path, f"the tensor {name!r} lies at {tensor.offset}, which is not aligned to {alignment}")
        # llama.cpp demands the same: in the order of the header, without gap or overlap.
        if tensor.offset != expected:
            raise _bad(path, f"the tensor {name!r} lies at {tensor.offset}, but the one before it ends at {expected}")
        end = tensor.offset + tensor.nbytes
        expected = -(-end // alignment) * alignment
    if tensors and data_offset + end > size:
        raise _bad(path, f"it is truncated: {data_offset + end} bytes are expected, it has {size}")


def _bad(path: Path, fault: str) -> BadFile:
    return BadFile(f"{path} is damaged: {fault}.", hint="Fetch it again from its original source.")

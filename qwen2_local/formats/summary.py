"""What a model file or folder holds, as plain data: what `inspect` shows, without anything having been loaded."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeAlias

Fact: TypeAlias = "str | int | float | bool | dict[str, Fact] | list[Fact] | None"
"""A value that JSON can hold: no NaN, no infinity."""

MAX_TEMPLATE = 1_000_000
"""Characters of a chat template that are kept at most. Qwen2's has 300."""

_SHOWN = 200
_FIRST = 8
_KEYS = 1000
_ARRAYS = {
    "b": "int8", "B": "uint8", "h": "int16", "H": "uint16", "i": "int32", "I": "uint32", "q": "int64", "Q": "uint64", "f": "float32",
    "d": "float64",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorLine:
    """One tensor. shape: the row's length last. offset, nbytes: in bytes, from the start of the file."""

    name: str
    type: str
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int

    @property
    def elements(self) -> int:
        """How many numbers of its type it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Kind:
    """How many matrices and vectors are kept in one way ("Q4_K"; "4-bit, groups of 64"), and their bytes, scales included."""

    type: str
    tensors: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Summary:
    """What was found. format: "GGUF", "MLX folder" … size: bytes of the files looked at. parameters: None where it cannot be known.

    facts: architecture, context, tokenizer and the like, as far as the files tell. keys: all metadata, long values cut short.
    template: the chat template, or "". faults: what is damaged, each a sentence. note: why a sound model is not run here, or "".
    """

    format: str
    files: tuple[str, ...]
    size: int
    parameters: int | None
    kinds: tuple[Kind, ...]
    facts: dict[str, Fact] = field(default_factory=dict)
    keys: dict[str, Fact] = field(default_factory=dict)
    tensors: tuple[TensorLine, ...] = ()
    template: str = ""
    faults: tuple[str, ...] = ()
    note: str = ""

    @property
    def bits_per_weight(self) -> float | None:
        """Of the tensors' bytes, scales included; None where the number of weights is not known, or 0."""
        return 8 * sum(kind.nbytes for kind in self.kinds) / self.parameters if self.parameters else None


def histogram(tensors: Iterable[tuple[str, int]]) -> tuple[Kind, ...]:
    """From the type and the bytes of each tensor; the most bytes first."""
    counts: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for kind, nbytes in tensors:
        counts[kind] = counts.get(kind, 0) + 1
        sizes[kind] = sizes.get(kind, 0) + nbytes
    return tuple(Kind(kind, counts[kind], sizes[kind]) for kind in sorted(sizes, key=lambda kind: (-sizes[kind], kind)))


def abbreviated(value: object, depth: int = 3) -> Fact:
    """`value`, from a GGUF's keys or parsed JSON, with long texts, lists and tables cut short, so that JSON can hold it."""
    if isinstance(value, str):
        return cut(value)
    if value is None or isinstance(value, (bool, int)):
        return value if value is None or abs(value) < 1 << 64 else cut(f"{value:.3e}" if abs(value) < 1 << 1000 else "a huge number")
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        if not depth or len(value) > 64:
            return {"entries": len(value)}
        return {cut(str(key)): abbreviated(one, depth - 1) for key, one in value.items()}
    if isinstance(value, (list, array)):
        first: list[Fact] = [abbreviated(one, depth - 1) for one in value[:_FIRST]] if depth else []
        if len(value) <= _FIRST and depth:
            return first
        return {"count": len(value), "of": _ARRAYS[value.typecode] if isinstance(value, array) else _names(value), "first": first}
    return cut(str(value))


def abbreviated_table(table: Mapping[str, object]) -> dict[str, Fact]:
    """The same for the keys of a file, of which a thousand are enough."""
    shown = {cut(key): abbreviated(value, 2) for key, value in islice(table.items(), _KEYS)}
    return shown if len(table) <= _KEYS else shown | {"…": f"{len(table):,} keys in all"}


def cut(text: str) -> str:
    """`text`, or its beginning and how long it is."""
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}… ({len(text):,} characters)"


def _names(values: Sequence[object]) -> str:
    return " or ".join(sorted({type(one).__name__ for one in values[:_FIRST]}))

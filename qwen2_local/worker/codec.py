"""Plain dataclasses to JSON and back. What comes back is checked against the types of the fields; nothing else is ever made of it.

A dataclass becomes the list of its fields, in their order: both ends are of one version. Known are dataclasses, int, float, str, bool, None,
Path, `X | None`, tuple[X, ...], tuple[X, Y], frozenset[X], Mapping[X, Y] and Literal.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from qwen2_local.errors import Qwen2LocalError
from qwen2_local.worker.frames import FrameError

T = TypeVar("T")


def pack(value: object) -> object:
    """As JSON's lists and scalars."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if is_dataclass(value):
        kind: Any = type(value)
        return [pack(getattr(value, name)) for name in _names(kind)]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (tuple, list)):
        return [pack(one) for one in value]
    if isinstance(value, frozenset):
        return sorted(value)
    if isinstance(value, Mapping):
        return [[pack(key), pack(one)] for key, one in value.items()]
    raise TypeError(f"{type(value).__name__} is not sent to a worker")


@cache
def _names(kind: Any) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind))


def unpack(kind: type[T], value: object) -> T:
    """A `kind` of what `pack` gave. Raises FrameError for anything else, and as the dataclasses' own checks do."""
    known: Any = kind
    made: T = _unpacker(known)(value)
    return made


_Unpack = Callable[[object], Any]


@cache
def _unpacker(kind: Any) -> _Unpack:
    if kind in (int, str, bool, float):
        return _scalar(kind)
    if kind is type(None):
        return lambda value: value if value is None else _refuse(value, "nothing")
    if kind is Path:
        return lambda value: Path(value) if isinstance(value, str) else _refuse(value, "a path")
    if is_dataclass(kind):
        return _dataclass(kind)
    return _generic(kind)


def _scalar(kind: type) -> _Unpack:
    def unpack_scalar(value: object) -> Any:
        if type(value) is kind:
            return value
        # A float that is whole may be written as an int by its maker.
        return float(value) if kind is float and type(value) is int and abs(value) < 1 << 53 else _refuse(value, kind.__name__)

    return unpack_scalar


def _dataclass(kind: Any) -> _Unpack:
    hints = typing.get_type_hints(kind)
    parts = [_unpacker(hints[field.name]) for field in fields(kind)]

    def unpack_dataclass(value: object) -> Any:
        if not isinstance(value, list) or len(value) != len(parts):
            return _refuse(value, kind.__name__)
        made = [part(one) for part, one in zip(parts, value, strict=True)]
        try:
            return kind(*made)
        except Qwen2LocalError:
            raise
        except (TypeError, ValueError) as error:
            raise FrameError(f"a {kind.__name__} is impossible ({str(error)[:100]})") from error

    return unpack_dataclass


def _generic(kind: Any) -> _Unpack:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return lambda value: value if isinstance(value, str) and value in arguments else _refuse(value, str(kind))
    if origin in (typing.Union, types.UnionType) and arguments[1:] == (type(None),):
        inner = _unpacker(arguments[0])
        return lambda value: None if value is None else inner(value)
    if origin is frozenset:
        each = _unpacker(arguments[0])
        return lambda value: frozenset(each(one) for one in _list(value))
    if origin is Mapping:
        pair = tuple(_unpacker(one) for one in arguments)
        return lambda value: {pair[0](key): pair[1](one) for key, one in (_list(entry, 2) for entry in _list(value))}
    if origin is tuple and arguments[1:] == (...,):
        one_of = _unpacker(arguments[0])
        return lambda value: tuple([one_of(one) for one in _list(value)])
    if origin is tuple:
        members = [_unpacker(one) for one in arguments]
        return lambda value: tuple([part(one) for part, one in zip(members, _list(value, len(members)), strict=True)])
    raise TypeError(f"{kind} is not sent to a worker")


def _list(value: object, length: int | None = None) -> list[object]:
    if not isinstance(value, list) or (length is not None and len(value) != length):
        raise FrameError(f"{repr(value)[:60]} is no list{'' if length is None else f' of {length}'}")
    return value


def _refuse(value: object, wanted: str) -> Any:
    raise FrameError(f"{repr(value)[:60]} is no {wanted}")

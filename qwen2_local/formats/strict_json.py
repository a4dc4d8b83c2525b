"""JSON from strangers: no duplicate keys, no NaN, no deep nesting, no surprise exceptions."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NoReturn

from qwen2_local.errors import BadFile
from qwen2_local.formats.magic import open_regular

_HINT = "Fetch it again from its original source."


def parse_object(raw: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `raw`. Raises BadFile, naming `where`, for anything else. The caller bounds the length of `raw`."""
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_object, parse_constant=_constant)
    except UnicodeDecodeError as error:
        raise BadFile(f"{where} is not UTF-8 text.", hint=_HINT) from error
    except RecursionError as error:
        raise BadFile(f"{where} is nested too deeply.", hint=_HINT) from error
    except ValueError as error:
        raise BadFile(f"{where} is no valid JSON: {str(error)[:200]}.", hint=_HINT) from error
    if not isinstance(value, dict):
        raise BadFile(f"{where} is no JSON object.", hint=_HINT)
    return value


def read_object(path: Path, limit: int) -> dict[str, Any]:
    """The JSON object in the file `path`, of at most `limit` bytes and a value in every 32 of these.

    Raises BadFile, also where there is no such file. A value takes up to 250 bytes of memory: `limit` bounds that, too.
    """
    try:
        with open_regular(path) as file:
            # A read takes memory for all that it asks for.
            raw = file.read(min(os.fstat(file.fileno()).st_size, limit) + 1)
    except OSError as error:
        raise BadFile(f"{path} cannot be read: {error.strerror}.", hint="Check that the folder is complete.") from error
    if len(raw) > limit:
        raise BadFile(f"{path} is larger than {limit // 1_000_000} MB, too large for what it should hold.", hint=_HINT)
    if raw.count(b",") + raw.count(b"[") + raw.count(b"{") > limit // 32:
        raise BadFile(f"{path} holds more than {limit // 32:,} values, too many for what it should hold.", hint=_HINT)
    return parse_object(raw, str(path))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:100]!r} appears twice")
    return value


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")

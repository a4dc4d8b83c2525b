"""Constraints in the worker: made anew of what their grammars were made of, as grammars themselves do not go over a pipe."""

from __future__ import annotations

import json
import threading
from functools import cached_property
from pathlib import Path

from qwen2_local import grammar
from qwen2_local.errors import UsageError
from qwen2_local.formats.gguf import read_gguf
from qwen2_local.tokens import Tokenizer
from qwen2_local.worker.frames import FrameError

_KEPT = 16


class Constraints:
    """Compiles each grammar once, with the tokenizer in a file (tokenizer.json or GGUF)."""

    def __init__(self, tokenizer: Path | None) -> None:
        self._path = tokenizer
        self._lock = threading.Lock()
        self._grammars: dict[tuple[str, int, frozenset[int]], grammar.Grammar] = {}

    def start(self, plain: str, limit: int, stops: frozenset[int]) -> grammar.Constraint:
        """For one reply. plain: what `Spec.plain` gives, as a text of JSON. Raises UnsupportedSchema, BadFile for the tokenizer."""
        key = (plain, limit, stops)
        with self._lock:
            known = self._grammars.get(key)
            if known is None:
                known = grammar.compile(grammar.from_plain(_parsed(plain)), self._tokenizer, limit, stops)
                if len(self._grammars) >= _KEPT:
                    self._grammars.clear()
                self._grammars[key] = known
        return known.start()

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        if self._path is None:
            raise UsageError("This worker knows no tokenizer, so a reply cannot keep to a form.", hint="Name it in the setup.")
        if self._path.suffix == ".json":
            return Tokenizer.from_json(self._path)
        return Tokenizer.from_gguf(read_gguf(self._path).keys, where=str(self._path))


def _parsed(plain: str) -> object:
    try:
        return json.loads(plain)
    except (ValueError, RecursionError) as error:
        raise FrameError("a form for a reply is no JSON") from error

"""What a settings file says, as far as it can be understood, and notes on the rest. Never raises, whatever is in the file."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qwen2_local.sanitize import clean_line
from qwen2_tui.fields import CHAT, LOOK, MODEL, Field
from qwen2_tui.settings import ChatSettings, ModelSettings, Settings, preset_problem

_MOST_NOTES = 8
_MOST_LINES = 500


def understood(data: bytes, where: str) -> tuple[Settings, tuple[str, ...]]:
    """The settings in a file's bytes, and notes on what is wrong there. Never raises."""
    try:
        text = data.decode("utf-8-sig")
        tree = tomllib.loads(text)
    except UnicodeDecodeError as error:
        return Settings(), (f"{where} is no UTF-8 text (byte {error.start:,}): settings are those at the beginning.",)
    except (tomllib.TOMLDecodeError, RecursionError, ValueError) as error:
        return Settings(), (f"{where} is no TOML: {clean_line(str(error))[:200]}. Settings are those at the beginning.",)
    reader = _Reader()
    settings = reader.settings(tree)
    return settings, tuple(reader.told(text, where))


class _Reader:
    """Takes what can be taken, and writes down what cannot: where it is, and what is wrong."""

    def __init__(self) -> None:
        self._wrong: list[tuple[tuple[str, ...], str]] = []

    def told(self, text: str, where: str) -> Iterator[str]:
        """The notes, with lines, in the order of the file."""
        if not self._wrong:
            return
        lines = lines_of(text)
        ordered = sorted(self._wrong, key=lambda one: lines.get(one[0], 0))
        for path, words in ordered[:_MOST_NOTES]:
            line = f", line {lines[path]}" if path in lines else ""
            yield clean_line(f"{where}{line}: {words}")
        if len(ordered) > _MOST_NOTES:
            yield f"{where}: {len(ordered) - _MOST_NOTES} more."

    def settings(self, tree: Mapping[str, Any]) -> Settings:
        tables = ("chat", "model", "presets", "keys")
        self._unknown(tree, (), [*tables, *(one.name for one in LOOK)])
        presets = {}
        for name, table in self._table(tree, "presets").items():
            path = ("presets", name)
            if problem := preset_problem(name):
                self._wrong.append((path, problem))
            elif not isinstance(table, dict):
                self._wrong.append((path, f"The preset {name[:40]} is no table: write [presets.{name[:40]}], and its settings below."))
            else:
                presets[name] = ChatSettings(**self._fields(table, path, CHAT))
        bound = {}
        for id, wanted in self._table(tree, "keys").items():
            # A key's name is shown wherever the key is.
            if isinstance(wanted, str) and clean_line(wanted) == wanted and any(map(str.strip, wanted.split(","))):
                bound[id] = wanted
            else:
                self._wrong.append((("keys", id), f'The key {id[:40]} is not given as text: write "{id[:40]}" = "ctrl+j".'))
        return Settings(
            chat=ChatSettings(**self._fields(self._table(tree, "chat"), ("chat",), CHAT)),
            model=ModelSettings(**self._fields(self._table(tree, "model"), ("model",), MODEL)),
            presets=presets,
            keys=bound,
            **self._fields(tree, (), LOOK, closed=False),
        )

    def _table(self, tree: Mapping[str, Any], name: str) -> dict[str, Any]:
        table = tree.get(name, {})
        if isinstance(table, dict):
            return table
        self._wrong.append(((name,), f"{name} is no table: write [{name}], and its settings below."))
        return {}

    def _fields(self, table: Mapping[str, Any], path: tuple[str, ...], known: Sequence[Field], *, closed: bool = True) -> dict[str, Any]:
        """closed: other names in the table are mistakes."""
        taken = {}
        for one in known:
            if one.name not in table:
                continue
            value = table[one.name]
            if problem := one.problem(value):
                instead = f"{one.unset[0].upper()}{one.unset[1:]} is taken" if one.unset else "It is left out"
                self._wrong.append(((*path, one.name), f"{one.name} is {_shown(value)}, but {problem}. {instead}."))
            else:
                taken[one.name] = float(value) if one.kind == "number" else value
        if closed:
            self._unknown(table, path, [one.name for one in known])
        return taken

    def _unknown(self, table: Mapping[str, Any], path: tuple[str, ...], known: Sequence[str]) -> None:
        from difflib import get_close_matches  # most files have no such name

        for name in table:
            if name not in known:
                near = get_close_matches(name, known, 1)
                there = f"Did you mean {near[0]}?" if near else f"There are {', '.join(known)}."
                self._wrong.append(((*path, name), f"There is no setting {name[:40]!r}{' in [' + '.'.join(path) + ']' if path else ''}. {there}"))


def _shown(value: object) -> str:
    text = repr(value) if not isinstance(value, (dict, list)) else "a table" if isinstance(value, dict) else "a list"
    return text if len(text) <= 40 else f"{text[:39]}…"


def lines_of(text: str) -> dict[tuple[str, ...], int]:
    """In which line each key begins, by its path.

    By parsing ever more of the file: a key begins behind the last beginning of the file that was TOML without it.
    """
    lines = [f"{line}\n" for line in text.split("\n")]
    found: dict[tuple[str, ...], int] = {}
    before = 0
    if len(lines) > _MOST_LINES:
        return found
    for number in range(1, len(lines) + 1):
        try:
            tree = tomllib.loads("".join(lines[:number]))
        except (tomllib.TOMLDecodeError, RecursionError, ValueError):
            continue
        for path in _paths(tree):
            found.setdefault(path, before + 1)
        before = number
    return found


def _paths(tree: Mapping[str, Any], at: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, value in tree.items():
        path = (*at, name)
        yield path
        if isinstance(value, dict) and len(path) < 4:
            yield from _paths(value, path)

"""Changes in the text of a settings file: what was changed, and nothing else. Only loaded when there is something to write.

What comes out is read again by Python's own parser before it is taken: it has to hold what was there, with the changes, and no more.
"""

from __future__ import annotations

import copy
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any

import tomlkit
from tomlkit.container import Container
from tomlkit.items import Comment, Item, Table, Trivia

from qwen2_tui.fields import CHAT, LOOK, MODEL, Field
from qwen2_tui.settings import ChatSettings, Settings

Place = tuple[str, ...]
_GONE = object()

_HEAD = """\
# Settings of qwen2-local.
#
# The app reads this file when it starts, and writes here what you change in it (F2); all else in here stays as you wrote it.
# A line that begins with "#" is not read. What is not set is the model's own, or what suits this machine. What is wrong is left
# out: the app says so, with the line.
"""
_CHAT = """\
# Every new chat begins with these. A chat may have its own (F2, "this chat"), which are kept with the chat.
"""
_MODEL = """\
# The model, and how it is loaded.
"""
_KEYS = """\
# Other keys, by the names that F1 shows; several with commas between them.
# "write.send" = "ctrl+s"
"""
_PRESETS = """\
# Presets are settings of a chat under a name, to be chosen in the app. Any of those of [chat] may stand in one.
# [presets.precise]
# temperature = 0
# system = "Answer in one sentence. Say so if you do not know."
"""


def fresh(settings: Settings) -> str:
    """A new file that holds `settings`, and explains itself."""
    text = edited(template().encode(), Settings(), settings)
    assert text is not None
    return text


def template() -> str:
    """The file of somebody who has changed nothing."""
    look = "\n".join(f"# {one.words}\n{one.name} = {_literal(getattr(Settings(), one.name))}\n" for one in LOOK)
    chat = "\n".join(f"# {one.words}\n{_example(one)}\n" for one in CHAT)
    model = "\n".join(f"# {one.words}{_choices(one)}\n{_example(one)}\n" for one in MODEL)
    return f"{_HEAD}\n{look}\n[chat]\n{_CHAT}\n{chat}\n[model]\n{_MODEL}\n{model}\n{_PRESETS}\n[keys]\n{_KEYS}"


def edited(data: bytes, base: Settings, settings: Settings) -> str | None:
    """The file `data` with what `settings` has otherwise than `base`; None if it is no TOML, or cannot be changed for certain."""
    try:
        text = data.decode("utf-8-sig")
        tree = tomllib.loads(text)
    except (ValueError, RecursionError):
        return None
    wanted = dict(changes(base, settings))
    for path, value in wanted.items():
        _put(tree, path, value)
    if not wanted:
        return text
    try:
        document = tomlkit.parse(_uncommented(text, wanted))
        for path, value in wanted.items():
            _change(document, path, value)
        changed = document.as_string()
        return changed if _plain(tomllib.loads(changed)) == _plain(tree) else None
    except Exception:  # whatever a parser may raise over a file that a person wrote: it is kept aside, and a new one written
        return None


def changes(base: Settings, settings: Settings) -> Iterator[tuple[Place, Any]]:
    """What is to be set, by its path; `_GONE` for what is to be taken out."""
    for one in LOOK:
        yield from _changed((one.name,), one, getattr(base, one.name), getattr(settings, one.name))
    for table, known in (("chat", CHAT), ("model", MODEL)):
        before, after = getattr(base, table), getattr(settings, table)
        for one in known:
            yield from _changed((table, one.name), one, getattr(before, one.name), getattr(after, one.name))
    for id in base.keys.keys() | settings.keys.keys():
        if base.keys.get(id) != settings.keys.get(id):
            yield ("keys", id), settings.keys.get(id, _GONE)
    for name in sorted(base.presets.keys() | settings.presets.keys()):
        path = ("presets", name)
        if name not in settings.presets:
            yield path, _GONE
            continue
        if name not in base.presets:
            yield path, {}
        before, after = base.presets.get(name, ChatSettings()), settings.presets[name]
        for one in CHAT:
            yield from _changed((*path, one.name), one, getattr(before, one.name), getattr(after, one.name))


def _changed(path: Place, one: Field, before: Any, after: Any) -> Iterator[tuple[Place, Any]]:
    if before != after:
        yield path, _GONE if after is None else after


# The same on plain data, to compare with


def _put(tree: dict[str, Any], path: Place, value: Any) -> None:
    for name in path[:-1]:
        if not isinstance(tree.get(name), dict):
            if value is _GONE:
                return
            tree[name] = {}
        tree = tree[name]
    if value is _GONE:
        tree.pop(path[-1], None)
    elif not (value == {} and isinstance(tree.get(path[-1]), dict)):
        tree[path[-1]] = copy.copy(value)


def _plain(value: Any) -> str:
    """Comparable: numbers that are none are equal, and the order of keys does not matter, nor whether there is a table for no presets."""
    if isinstance(value, dict):
        value = {name: one for name, one in value.items() if not (name == "presets" and one == {})}
        return f"{{{', '.join(f'{name!r}: {_plain(value[name])}' for name in sorted(value))}}}"
    return f"[{', '.join(map(_plain, value))}]" if isinstance(value, list) else repr(value)


# In the document


def _change(document: Container, path: Place, value: Any) -> None:
    table: Any = document
    for name in path[:-1]:
        if not isinstance(table.get(name), Mapping):
            if value is _GONE:
                return
            table[name] = tomlkit.table(is_super_table=name == "presets")
        table = table[name]
    name = path[-1]
    if value is _GONE:
        _take_out(table, path)
    elif value == {}:
        if not isinstance(table.get(name), Mapping):
            table[name] = tomlkit.table()
    else:
        table[name] = _item(value)


def _item(value: Any) -> Item:
    if isinstance(value, str) and "\n" in value:
        text = tomlkit.string(value, multiline=True)
        if tomllib.loads(f"x = {text.as_string()}")["x"] == value:
            return text
    item: Item = tomlkit.item(value)
    return item


def _take_out(table: Any, path: Place) -> None:
    """A value becomes its example again, or a comment if a person wrote one beside it. A table leaves the comments below its last value."""
    name = path[-1]
    if name not in table:
        return
    if not isinstance(table, (Table, Container)):
        del table[name]  # one written in one line, or here and there
        return
    container = table.value if isinstance(table, Table) else table
    place = next(place for place, (key, _) in enumerate(container.body) if key is not None and key.key == name)
    item = container.body[place][1]
    table.remove(name)
    if isinstance(item, Table):
        left = _left_of(item)
    elif item.trivia.comment:
        commented = "\n# ".join(f"{name} = {item.as_string()}".splitlines())
        left = f"# {commented}{item.trivia.comment_ws}{item.trivia.comment}\n"
    else:
        known = {one.name: one for one in (CHAT if path[0] == "chat" else MODEL if path[0] == "model" else ())}
        left = f"{_example(known[name])}\n" if name in known else ""
    if left:
        container.body[place] = (None, Comment(Trivia(comment=left, trail="")))


def _left_of(table: Table) -> str:
    """The comments below a table's last value: they belong to what follows."""
    rest: list[str] = []
    for key, item in reversed(table.value.body):
        if key is not None:
            break
        rest.append(item.as_string())
    text = "".join(reversed(rest))
    return text if text.strip() else ""


def _uncommented(text: str, wanted: Mapping[Place, Any]) -> str:
    """With the examples of what is to be set as values, so that these stand where they are explained."""
    lines = text.split("\n")
    section = ""
    for number, line in enumerate(lines):
        if line.startswith("["):
            section = line.strip().strip("[]")
        for one in CHAT if section == "chat" else MODEL if section == "model" else ():
            if line.rstrip() == _example(one) and wanted.get((section, one.name), _GONE) is not _GONE:
                candidate = "\n".join([*lines[:number], line[2:], *lines[number + 1 :]])
                if _adds(text, candidate, section, one.name):
                    lines[number] = line[2:]
                    text = candidate
    return text


def _adds(text: str, candidate: str, section: str, name: str) -> bool:
    """Has `candidate` this one value more? It has not if the line is part of a long text, or the value stands elsewhere already."""
    try:
        tree = tomllib.loads(candidate)
    except ValueError:
        return False
    table = tree.get(section)
    if not isinstance(table, dict) or name not in table:
        return False
    del table[name]
    return _plain(tree) == _plain(tomllib.loads(text))


def _example(one: Field) -> str:
    return f"# {one.name} = {_literal(one.example)}"


def _literal(value: Any) -> str:
    return _item(value).as_string()


def _choices(one: Field) -> str:
    return f" {one.bounds}." if one.kind == "choice" else ""

"""`@path` in a message: which files are meant, what is in them, and how a path goes on.

A mention begins behind a space: @notes.txt, @~/notes.txt, @"with spaces.txt". Reading is for a thread. What does not look like a path and names
no file (@someone, a decorator in pasted code) is plain text.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen2_local.chats.attached import Attached
from qwen2_local.sanitize import clean_line

MOST_BYTES = 2 << 20
"""Of one file: some 500,000 tokens, more than any context holds."""
_MOST_FILES = 32
_MOST_NAMES = 20_000
_MENTION = re.compile(r'(?<![^\s([{\'])@(?:"([^"\n]+)"|([^\s"@][^\s"]*))')
_TRAILING = ".,;:!?)]}'"


@dataclass(frozen=True, slots=True)
class Mention:
    """A path in a message. said: as it was typed, without the @; quoted: in quotes, so it is meant as a path whatever it looks like."""

    said: str
    quoted: bool = False

    @property
    def path_like(self) -> bool:
        """Would a person be surprised if it were taken as plain text?"""
        return self.quoted or "/" in self.said or self.said.startswith("~") or bool(re.search(r"\w\.\w{1,8}$", self.said))


@dataclass(frozen=True, slots=True)
class Reading:
    """What came of the mentions of a message: files, and a sentence on each that cannot be attached."""

    files: tuple[Attached, ...] = ()
    problems: tuple[str, ...] = ()


def mentions(text: str) -> list[Mention]:
    """Those of a message, each once, in its order."""
    found = (Mention(match[1] or match[2], match[1] is not None) for match in _MENTION.finditer(text))
    return list(dict.fromkeys(found))


def read(text: str, count: Callable[[str], int], *, folder: Path | None = None, kept: Mapping[str, Attached] | None = None) -> Reading:
    """The files that `text` mentions. For a thread: disks may be slow, and so is counting.

    count: tokens of a text. folder: paths begin there; by default where the program was started. kept: files by the names that they were
    attached under before, when this message was written first: those are not read again, they may have changed.
    """
    folder = folder or Path.cwd()
    files: dict[str, Attached] = {}
    problems: list[str] = []
    for mention in mentions(text):
        names = [mention.said] if mention.quoted else _endings(mention.said)
        before = next((kept[name] for name in names if name in kept), None) if kept else None
        if before is not None:
            files.setdefault(before.name, before)
            continue
        name = next((one for one in names if _exists(_path(one, folder))), None)
        if name is None:
            if Mention(names[-1], mention.quoted).path_like:
                problems.append(f"There is no file {names[-1]}.")
        elif len(files) >= _MOST_FILES:
            problems.append(f"{name} is one too many: {_MOST_FILES} files at most.")
        elif name not in files:
            got = _text_of(_path(name, folder))
            if got.problem:
                problems.append(f"{name} {got.problem}")
            else:
                files[name] = Attached(name, got.text, count(got.text))
    return Reading(tuple(files.values()), tuple(problems))


@dataclass(frozen=True, slots=True)
class _Got:
    text: str = ""
    problem: str = ""


def _text_of(path: Path) -> _Got:
    """A file's text, or what is wrong with it, as the end of a sentence."""
    try:
        # A named pipe would wait for its writer for ever.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(descriptor, "rb") as file:
            about = os.fstat(descriptor)
            if stat.S_ISDIR(about.st_mode):
                return _Got(problem="is a folder: name a file in it.")
            if not stat.S_ISREG(about.st_mode):
                return _Got(problem="is no ordinary file.")
            data = file.read(MOST_BYTES + 1)
    except IsADirectoryError:
        return _Got(problem="is a folder: name a file in it.")
    except OSError as error:
        return _Got(problem=f"cannot be read: {error.strerror or error}.")
    if len(data) > MOST_BYTES:
        return _Got(problem=f"is too big: {about.st_size:,} bytes, of at most {MOST_BYTES:,}.")
    return _decoded(data)


def _decoded(data: bytes) -> _Got:
    utf16 = data[:2] in (b"\xff\xfe", b"\xfe\xff")
    try:
        text = data.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError:
        return _Got(problem="is no text: neither UTF-8 nor UTF-16.")
    if "\0" in text:
        return _Got(problem="is no text but binary.")
    return _Got(text.replace("\r\n", "\n").removesuffix("\n"))


def _endings(said: str) -> list[str]:
    """What may be meant: as it is, then without the marks of the sentence that it ends."""
    found = [said]
    while len(found[-1]) > 1 and found[-1][-1] in _TRAILING:
        found.append(found[-1][:-1])
    return found


def _path(name: str, folder: Path) -> Path:
    return folder / os.path.expanduser(name)  # noqa: PTH111 (Path's own raises for an unknown ~name)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


@dataclass(frozen=True, slots=True)
class Completion:
    """How an unfinished mention goes on. text: what is to stand instead of it, @ and quotes included; choices: the names, if there are several."""

    text: str
    choices: tuple[str, ...] = ()


def unfinished(line: str) -> str | None:
    """The mention that the text before the cursor ends with, from its @ on; None: there is none."""
    match = re.search(r'(?<![^\s([{\'])@(?:"[^"\n]*|[^\s"]*)$', line)
    return match[0] if match else None


def complete(mention: str, *, folder: Path | None = None) -> Completion | None:
    """`mention` as far as there is only one way to go on. None: nothing begins like that. For a thread."""
    said = mention.removeprefix("@").removeprefix('"')
    head, slash, start = said.rpartition("/")
    if said == "~":
        return Completion("@~/")
    parent = _path(head + slash, folder or Path.cwd())
    names = _beginning(parent, start)
    if not names:
        return None
    common = os.path.commonprefix(names)  # noqa: RUF071 (letter by letter is what is wanted)
    if common == start and len(names) > 1:
        return Completion(mention, tuple(names))
    return Completion(_written(head + slash + common, whole=len(names) == 1 and not common.endswith("/")), tuple(names) if len(names) > 1 else ())


def _beginning(parent: Path, start: str) -> list[str]:
    """Names in a folder, folders with a slash; hidden ones only where asked for."""
    found: list[str] = []
    try:
        with os.scandir(parent) as entries:
            for number, entry in enumerate(entries):
                if number >= _MOST_NAMES:
                    break
                hidden = entry.name.startswith(".") and not start.startswith(".")
                # What a terminal would obey, or cannot take, is not typed for anybody.
                if entry.name.startswith(start) and not hidden and clean_line(entry.name) == entry.name:
                    found.append(entry.name + "/" * entry.is_dir())
    except OSError:
        return []
    return sorted(found)


def _written(path: str, *, whole: bool) -> str:
    """As a mention. whole: it is a file's, and what is typed next is no part of it."""
    if re.search(r"\s", path):
        return f'@"{path}"' + " " * whole if whole else f'@"{path}'
    return f"@{path}" + " " * whole


def summary(reading: Reading) -> Sequence[str]:
    """What a person is told while they write."""
    return [*(f"@{file.name} {file.tokens:,} tokens" for file in reading.files), *reading.problems]

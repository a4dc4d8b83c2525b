"""The head of a README.md, where Hugging Face keeps what people say of a model: its licence, its languages, what it was made from."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path

from qwen2_local.errors import BadFile
from qwen2_local.formats.magic import open_regular

_MAX_HEAD = 65_536
_MAX_ITEMS = 100
_FIELDS = ("license", "license_name", "license_link")


def read_card(path: Path) -> dict[str, str]:
    """The fields license, license_name and license_link, as far as the head has them. Empty without such a file."""
    return {name: values[0] for name, values in _fields(path).items() if name in _FIELDS}


def read_card_lists(path: Path) -> dict[str, list[str]]:
    """All fields of the head that are a word or a list of words, such as language, tags and base_model, as lists. Empty without such a file."""
    return _fields(path)


def _fields(path: Path) -> dict[str, list[str]]:
    if not path.is_file():
        return {}
    try:
        with open_regular(path) as file:
            lines = file.read(_MAX_HEAD).decode("utf-8-sig", "replace").splitlines()
    except OSError as error:
        raise BadFile(f"{path} cannot be read: {error.strerror}.", hint="Check its permissions.") from error
    if not lines or lines[0] != "---" or "---" not in lines[1:]:
        return {}
    found: dict[str, list[str]] = {}
    name = ""
    for line in takewhile(lambda line: line != "---", lines[1:]):
        # No YAML, and no pattern that a line of blanks could keep busy.
        item = line.strip()
        if item.startswith("- "):
            values = [item[2:]]
        elif line[:1].isspace() or not item:
            continue
        else:
            name, _, value = line.partition(":")
            found.pop(name, None)
            value = value.strip()
            values = value[1:-1].split(",") if value.startswith("[") and value.endswith("]") else [value]
        for word in values:
            word = word.strip().strip("\"'")
            if 0 < len(word) <= 200 and word.isprintable() and len(found.get(name, ())) < _MAX_ITEMS:
                found.setdefault(name, []).append(word)
    return found

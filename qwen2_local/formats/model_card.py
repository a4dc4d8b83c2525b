"""The head of a README.md, where Hugging Face keeps a model's licence."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path

from qwen2_local.errors import BadFile
from qwen2_local.formats.magic import open_regular

_MAX_HEAD = 65_536
_FIELDS = ("license", "license_name", "license_link")


def read_card(path: Path) -> dict[str, str]:
    """The fields license, license_name and license_link, as far as the head has them. Empty without such a file."""
    if not path.is_file():
        return {}
    try:
        with open_regular(path) as file:
            lines = file.read(_MAX_HEAD).decode("utf-8-sig", "replace").splitlines()
    except OSError as error:
        raise BadFile(f"{path} cannot be read: {error.strerror}.", hint="Check its permissions.") from error
    if not lines or lines[0] != "---" or "---" not in lines[1:]:
        return {}
    found: dict[str, str] = {}
    for line in takewhile(lambda line: line != "---", lines[1:]):
        # No YAML, and no pattern that a line of blanks could keep busy.
        name, _, value = line.partition(":")
        value = value.strip().strip("\"'")
        if name in _FIELDS and 0 < len(value) <= 200:
            found[name] = value
    return found

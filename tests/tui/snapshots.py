"""What a screen looked like when somebody last looked at it and found it good, next to what it looks like now.

A snapshot is a text file to be read and compared by people: the screen's text, the same cells again with a letter for each style, and what
the letters mean. To accept what has changed, after looking at it (`git diff tests/tui/snapshots`):

    ACCEPT=1 python -m pytest tests/tui/test_snapshots.py
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.style import Style
from textual.pilot import Pilot
from textual.strip import Strip

FOLDER = Path(__file__).parent / "snapshots"
_LETTERS = ".abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


async def assert_looks_like(pilot: Pilot[Any], name: str) -> None:
    """Compares the screen with the snapshot `name`. Fails with what differs; with ACCEPT set it becomes the snapshot."""
    await pilot.pause()
    now = described(pilot.app.screen._compositor.render_strips())
    path = FOLDER / f"{name}.txt"
    if os.environ.get("ACCEPT"):
        FOLDER.mkdir(exist_ok=True)
        path.write_text(now, encoding="utf-8")
        return
    then = path.read_text(encoding="utf-8") if path.exists() else ""
    if now != then:
        differing = difflib.unified_diff(then.splitlines(), now.splitlines(), f"{path.name}, accepted", "now", n=1, lineterm="")
        raise AssertionError("\n".join(["the screen has changed; ACCEPT=1 accepts it:", *differing]))


def described(strips: Iterable[Strip]) -> str:
    """Text, letters, and their meaning."""
    text, letters = [], []
    styles: dict[str, str] = {}
    for strip in strips:
        text.append(strip.text.rstrip())
        line = ""
        for segment in strip:
            style = _words(segment.style or Style.null())
            letter = styles.setdefault(style, _LETTERS[len(styles)])
            line += letter * cell_len(segment.text)
        letters.append(line)
    meaning = [f"{letter}  {style}" for style, letter in styles.items()]
    return "\n".join([*text, "", *letters, "", *meaning, ""])


def _words(style: Style) -> str:
    """What of a style is seen: Textual's own notes in it (what a click does) are not."""
    seen = style.without_color
    kinds = [kind for kind in ("bold", "dim", "italic", "underline", "reverse", "strike") if getattr(seen, kind)]
    return " ".join([*kinds, style.color.name if style.color else "default", "on", style.bgcolor.name if style.bgcolor else "default"])

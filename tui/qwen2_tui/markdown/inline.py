"""What stands inside a paragraph, heading or cell: emphasis, code, links, as runs."""

from __future__ import annotations

import re
from functools import cache, lru_cache
from typing import TYPE_CHECKING

from qwen2_tui.markdown.ink import ADDRESS, BOLD, CODE, ITALIC, LINK, STRIKE, Ink, Kind, Run, ink

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.token import Token

# markdown-it looks for the end of every bracket, in time that grows with their square: past so many the text is shown as it is.
BRACKETS = 150
_PLAIN = re.compile(r"[^\\`*_\[\]<>&~!]*")
_BREAK = re.compile(r"<br\s*/?>", re.IGNORECASE)
_FLAGS = {"strong": BOLD, "em": ITALIC, "link": LINK, "s": STRIKE}


@cache
def parser() -> MarkdownIt:
    """markdown-it for what stands in a line. Made when it is first wanted: an empty chat needs none, and should be there at once."""
    from markdown_it import MarkdownIt

    made = MarkdownIt("commonmark").enable("strikethrough")
    # Addresses are shown, never opened: as they were written, whatever their scheme.
    made.normalizeLink = lambda url: url  # type: ignore[method-assign]
    made.validateLink = lambda url: True  # type: ignore[method-assign]
    return made


@lru_cache(2048)
def runs(text: str, kind: Kind = Kind.TEXT, flags: int = 0) -> tuple[Run, ...]:
    """`text` as runs of `kind`; every newline in it stays one (a model that begins a line means it). flags: what all of it has."""
    if _PLAIN.fullmatch(text) or text.count("[") > BRACKETS:
        return ((text, ink(kind, flags)),)
    tokens = parser().parseInline(text if text.isascii() else _set_off(text))
    made: list[Run] = []
    for token in tokens:
        _walk(token.children or (), kind, flags, made)
    return tuple(made)


_SPACE = "\u2006"  # for markdown-it alone: it is never shown
_PAIRED = re.compile(r"\\.|\n|\*\*(?!\*)", re.DOTALL)
_TICKS = re.compile("`+")


def _without_code(text: str) -> str:
    """`text`, as long as it is, with spaces in place of what stands between backticks. In one pass: a regular expression would take n³."""
    ticks = [match.span() for match in _TICKS.finditer(text)]
    ends: dict[int, int] = {}  # of the next run of backticks, by its length
    following = [0] * len(ticks)
    for number in range(len(ticks) - 1, -1, -1):
        start, end = ticks[number]
        following[number] = ends.get(end - start, 0)
        ends[end - start] = end
    parts: list[str] = []
    at = 0
    for (start, _), end in zip(ticks, following, strict=True):
        if end and start >= at:
            parts += [text[at:start], " " * (end - start)]
            at = end
    return "".join([*parts, text[at:]])


def _set_off(text: str) -> str:
    """Signs of bold set off from their neighbours: without spaces between words, as in Chinese, CommonMark takes `**重要：**请` for no bold."""
    if "**" not in text:
        return text
    parts: list[str] = []
    at, opened = 0, False
    for match in _PAIRED.finditer(_without_code(text)):
        if match[0] != "**":
            opened = opened and match[0] != "\n"
            continue
        start, end = match.span()
        neighbours = text[start - 1 : start] + text[end : end + 1]
        wide = not neighbours.isascii()
        parts += [text[at:start], _SPACE if wide and not opened else "", "**", _SPACE if wide and opened else ""]
        at, opened = end, not opened
    return "".join([*parts, text[at:]])


_OPEN_LINK = re.compile(r"\[[^\[\]]{1,200}\]\([^()\s]{0,400}$")
_SIGN = re.compile(r"(?<!\\)(?:\*\*|\*)")


def closed(text: str) -> str:
    """A text that is still written, with an end for what is open at its last line, so that signs do not show until their pair has come."""
    line = text[text.rfind("\n") + 1 :]
    bare = line.rstrip("*_`~[")  # what has just begun
    text, line = text[: len(text) - len(line) + len(bare)], bare
    line = _without_code(line)
    if "`" in line:
        return text + "`"
    if _OPEN_LINK.search(line):
        text += ")"
    pending: list[str] = []
    for match in _SIGN.finditer(line):
        start, end = match.span()
        if pending and pending[-1] == match[0] and not line[start - 1 : start].isspace():
            pending.pop()
        elif not line[end : end + 1].isspace():
            pending.append(match[0])
    return text.rstrip() + "".join(reversed(pending)) if pending else text


def _walk(tokens: list[Token] | tuple[Token, ...], kind: Kind, base: int, made: list[Run]) -> None:
    depth = dict.fromkeys(_FLAGS, 0)
    flags = base
    address = label = ""
    for token in tokens:
        name, _, side = token.type.rpartition("_")
        if side in ("open", "close") and name in _FLAGS:
            depth[name] += 1 if side == "open" else -1
            flags = base | sum(flag for one, flag in _FLAGS.items() if depth[one])
            if name == "link" and side == "open":
                address, label = str(token.attrGet("href") or ""), ""
            elif name == "link" and address not in ("", label, "mailto:" + label):
                made.append((f" ({address})", ink(kind, base | ADDRESS)))
            continue
        if token.type == "image":
            shown = token.content or "image"
            made.append((f"{shown} ({token.attrGet('src') or ''})", ink(kind, flags | ADDRESS)))
            continue
        if token.type in ("softbreak", "hardbreak") or (token.type == "html_inline" and _BREAK.fullmatch(token.content)):
            made.append(("\n", ink(kind, flags)))
            continue
        shown = token.content.replace(_SPACE, "")
        if address:
            label += shown
        if shown:
            made.append((shown, _ink(kind, flags, code=token.type == "code_inline")))


def _ink(kind: Kind, flags: int, *, code: bool) -> Ink:
    return ink(kind, flags | CODE if code else flags)

"""The one sanitiser for text on its way to a terminal: a model's output, names of files, errors, chats.

Every control character goes by itself, never a whole escape sequence: so `clean(a) + clean(b) == clean(a + b)`,
and a stream can be cleaned piece by piece, wherever it is cut. What is left of "\\x1b[31m" is a harmless "[31m".
"""

from __future__ import annotations

# C0 without tab and newline, DEL, C1; then what reorders the text around it (bidi embeddings, overrides, isolates): a name could
# pretend to be another. The marks that Hebrew, Arabic and Persian need (LRM, RLM, ZWNJ) and the joiner of emoji stay.
_DROPPED = [*range(0x20), 0x7F, *range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
_TABLE: dict[int, str | None] = dict.fromkeys(set(_DROPPED) - {0x09, 0x0A})
# Other line breaks, and half a surrogate pair, which no terminal's encoding can take.
_TABLE.update({0x2028: "\n", 0x2029: "\n"})
_TABLE.update(dict.fromkeys(range(0xD800, 0xE000), "\N{REPLACEMENT CHARACTER}"))


def clean(text: str) -> str:
    """`text` without anything that a terminal obeys, newline and tab excepted. Safe on any piece of a stream. Idempotent."""
    return text.translate(_TABLE)


def clean_line(text: str) -> str:
    """`clean`, in one line: for names and single-line messages. Newlines and tabs become spaces."""
    return clean(text).replace("\n", " ").replace("\t", " ")

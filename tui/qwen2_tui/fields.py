"""Each setting: what it is called, what it does in a line, what it may be. The settings file, its comments and the settings screen come from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from qwen2_local.sanitize import clean_line

Kind = Literal["text", "line", "number", "whole", "flag", "choice"]
Value = str | float | int | bool

_LONGEST_TEXT = 100_000
_LONGEST_LINE = 1_000
_INT64 = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Field:
    """A setting. unset: what holds where it is not set, for people; "" where it always is.

    kind: text has several lines, line one. low, high: of numbers; above: low itself is too little. choices: of a choice.
    example: what the settings file shows where it is not set.
    """

    name: str
    title: str
    words: str
    kind: Kind
    example: Value
    unset: str = "the model's own"
    low: float = 0
    high: float = 0
    above: bool = False
    choices: tuple[str | int, ...] = ()

    @property
    def bounds(self) -> str:
        """What it may be, in words."""
        if self.kind == "choice":
            return " or ".join(map(str, self.choices))
        if self.kind in ("number", "whole"):
            what = "a whole number" if self.kind == "whole" else "a number"
            return f"{what} {'above' if self.above else 'from'} {self.low:g} to {number(self.high)}"
        return {"flag": "true or false", "line": "a line of text", "text": "a text"}[self.kind]

    def problem(self, value: object) -> str:
        """What is wrong with a value, as the end of a sentence that begins with its name; "" if nothing is."""
        return "" if self._fits(value) else f"has to be {self.bounds}"

    def _fits(self, value: object) -> bool:
        match self.kind:
            case "flag":
                return isinstance(value, bool)
            case "choice":
                return not isinstance(value, (bool, float)) and value in self.choices
            case "text" | "line":
                return isinstance(value, str) and self._is_text(value)
        if isinstance(value, bool) or not isinstance(value, int if self.kind == "whole" else (int, float)):
            return False
        assert isinstance(value, (int, float))
        return math.isfinite(value) and self.low <= value <= self.high and not (self.above and value == self.low)

    def _is_text(self, value: str) -> bool:
        if any(0xD800 <= ord(one) < 0xE000 for one in value):
            return False  # half a character
        return (
            len(value) <= _LONGEST_TEXT if self.kind == "text" else bool(value.strip()) and len(value) <= _LONGEST_LINE and clean_line(value) == value
        )

    def parse(self, text: str) -> tuple[Value | None, str]:
        """The value that a person types, None for the model's own; and what is wrong with it, in a sentence."""
        typed = text if self.kind == "text" else text.strip()
        if not typed.strip():
            return None, ("" if self.unset else f"It {self.problem(None)}.")
        value = self._read(typed)
        problem = self.problem(value)
        return (None, f"It {problem}.") if problem else (value, "")

    def _read(self, typed: str) -> Value:
        """As it is meant; what cannot be read stays text, which is then no number."""
        if self.kind == "flag":
            return {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}.get(typed.lower(), typed)
        try:
            if self.kind == "number":
                return float(typed.replace(",", ".", 1) if "." not in typed else typed)
            if self.kind == "whole" or (self.kind == "choice" and all(isinstance(one, int) for one in self.choices)):
                return int(typed.replace(",", "").replace("_", "").replace(" ", ""))
        except ValueError:
            pass
        return typed

    def show(self, value: object) -> str:
        """A value as a person would type it."""
        if value is None:
            return ""
        if isinstance(value, bool):
            return "true" if value else "false"
        return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def number(value: float) -> str:
    """A bound, as people write it."""
    return f"{value:,.0f}" if value < 1e15 else "2^63"


CHAT: tuple[Field, ...] = (
    Field("system", "system prompt", "What the model is told before the first question: who it is, how to answer.", "text", "You are terse."),
    Field("temperature", "temperature", "0 always takes the likeliest token; the higher, the more varied the reply.", "number", 0.7, high=100),
    Field("top_p", "top-p", "Only the likeliest tokens that make up this probability; 1 is off.", "number", 0.8, high=1, above=True),
    Field("top_k", "top-k", "Only so many of the likeliest tokens; 0 is off.", "whole", 20, high=1_000_000),
    Field("min_p", "min-p", "Only tokens at least so likely, beside the likeliest one; 0 is off.", "number", 0.05, high=1),
    Field("repetition_penalty", "repetition penalty", "Makes tokens that came before less likely; 1 is off.", "number", 1.05, high=100, above=True),
    Field("seed", "seed", "The same seed gives the same reply.", "whole", 42, unset="another each time", high=_INT64),
    Field("max_tokens", "longest reply", "In tokens.", "whole", 1024, unset="what the context holds", low=1, high=10_000_000),
    Field("lookup", "lookup", "Drafts from the conversation itself: the same reply, faster where it repeats something.", "flag", True, unset=""),
)  # fmt: skip
"""What holds of a chat: of this one, of every new one, of a preset."""

MODEL: tuple[Field, ...] = (
    Field("model", "model", "Loaded when the app starts: a name, or the path of a file or folder.", "line", "7b", unset="the built-in guide"),
    Field("backend", "backend", "What computes.", "choice", "llama.cpp", unset="what suits this machine", choices=("mlx", "llama.cpp")),
    Field("context", "context", "Tokens of conversation and reply together, at most: the more, the more memory.", "whole", 8192,
          unset="what model and memory allow", low=256, high=10_000_000),
    Field("kv_bits", "KV bits", "Of the model's memory of the conversation; 8 takes half the space.", "choice", 8, unset="16", choices=(16, 8)),
    Field("draft", "draft model", "A smaller model whose guesses this one checks: the same replies, faster.", "line", "0.5b", unset="none"),
)  # fmt: skip
"""What holds of the model. It is loaded anew when one of them changes."""

LOOK: tuple[Field, ...] = (
    Field("theme", "theme", '"dark", "light", or the name of any theme in the command palette.', "line", "dark", unset=""),
    Field("sidebar", "list of chats", "Shown beside the conversation, where there is room.", "flag", True, unset=""),
)
"""How the app looks."""


def named(fields: Sequence[Field], name: str) -> Field:
    """The field of that name."""
    return next(one for one in fields if one.name == name)

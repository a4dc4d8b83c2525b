"""How many tokens of prompts go into a step.

A step that holds nothing but prompts may be long, as the backend breaks it off on a cancel. One that others decode in has to be short: they
wait for it, and breaking it off would cost them their tokens.
"""

from __future__ import annotations

_FIRST = 64
_SHARED_S = 0.15
_FAIREST = 8
"""Tokens of a slice at least, however slow they are: each step costs something of its own."""


class Slices:
    """Measures how long a token of a prompt takes."""

    def __init__(self, most: int) -> None:
        """most: tokens that a step takes."""
        self._most = most
        self._token_s = 0.0

    def budget(self, decoding: int) -> int:
        """Tokens of prompts for a step in which so many sequences decode."""
        room = self._most - decoding
        if not decoding:
            return room
        fitting = int(_SHARED_S / self._token_s) if self._token_s else _FIRST
        return max(1, min(room, max(fitting, _FAIREST)))

    def took(self, tokens: int, seconds: float) -> None:
        """A step with so many tokens of prompts is done."""
        measured = seconds / tokens
        self._token_s = (self._token_s + measured) / 2 if self._token_s else measured

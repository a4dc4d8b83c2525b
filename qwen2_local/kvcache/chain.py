"""From tokens to names. A sequence is cut into links of 256 tokens and a tail; each link's name depends on all tokens before it.

    root   = sha256("qwen2-local kv 1\\0" + fingerprint)
    own    = sha256(parent + the link's tokens as little-endian int32)       the parent of the first link is the root
    name   = root[:8] / parent[:16] - own[:16] - sketch                      in hexadecimal

The sketch has a byte for every 16 of the link's tokens, each hashing the link's tokens up to there: two links of one parent begin alike for
about as long as their sketches do, so the one that a prompt matches longest is found by names alone, among any number of conversations.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

CHUNK = 256
"""Tokens of a whole link."""

STEP = 16
"""Tokens for each byte of a sketch."""

_WIDTH = 4
_NAME = re.compile(r"([0-9a-f]{16})/([0-9a-f]{32})-([0-9a-f]{32})-((?:[0-9a-f]{2}){0,16})")


@dataclass(frozen=True, slots=True)
class Link:
    """A run of at most 256 tokens at its place in a sequence. packed: its tokens as bytes; root, parent: full hashes; start: tokens before it."""

    start: int
    packed: bytes
    root: bytes
    parent: bytes
    own: bytes
    name: str

    @property
    def count(self) -> int:
        """How many tokens it has."""
        return len(self.packed) // _WIDTH

    @property
    def end(self) -> int:
        """How many tokens the sequence has up to its end."""
        return self.start + self.count

    @property
    def family(self) -> str:
        """How the names of all links of the same parent begin."""
        return family(self.root, self.parent)

    @property
    def sketch(self) -> str:
        """The last part of its name."""
        return self.name.rpartition("-")[2]

    def beginnings(self) -> set[str]:
        """The names of all shorter links that this one begins with: what they hold, it holds as well."""
        found = set()
        digest = hashlib.sha256(self.parent)
        sketch = self.sketch
        for count in range(1, self.count):
            digest.update(self.packed[(count - 1) * _WIDTH : count * _WIDTH])
            found.add(f"{self.family}{digest.hexdigest()[:32]}-{sketch[: count // STEP * 2]}")
        return found


def root_of(fingerprint: str) -> bytes:
    """The root of all sequences of a fingerprint; the first 16 hexadecimal digits name its folder."""
    return hashlib.sha256(b"qwen2-local kv 1\0" + fingerprint.encode()).digest()


def family(root: bytes, parent: bytes) -> str:
    """How the names of all links of a parent begin."""
    return f"{root.hex()[:16]}/{parent.hex()[:32]}-"


def pack(tokens: Sequence[int]) -> bytes:
    """Token ids as little-endian int32."""
    return struct.pack(f"<{len(tokens)}i", *tokens)


def link(root: bytes, parent: bytes, start: int, packed: bytes) -> Link:
    """The link of these tokens after `parent`."""
    digest = hashlib.sha256(parent)
    sketch = []
    whole = len(packed) // (STEP * _WIDTH) * STEP * _WIDTH
    for begin in range(0, whole, STEP * _WIDTH):
        digest.update(packed[begin : begin + STEP * _WIDTH])
        sketch.append(digest.digest()[0])
    digest.update(packed[whole:])
    own = digest.digest()
    return Link(start, packed, root, parent, own, f"{family(root, parent)}{own.hex()[:32]}-{bytes(sketch).hex()}")


def links(fingerprint: str, tokens: Sequence[int]) -> list[Link]:
    """The whole links of a sequence, and its tail if it has one."""
    packed = pack(tokens)
    root = parent = root_of(fingerprint)
    found = []
    for start in range(0, len(tokens), CHUNK):
        one = link(root, parent, start, packed[start * _WIDTH : (start + CHUNK) * _WIDTH])
        found.append(one)
        parent = one.own
    return found


def is_name(name: str) -> bool:
    """Is it of the form of a link's name? Then it is a path of two parts, and safe."""
    return _NAME.fullmatch(name) is not None


def common(a: bytes, b: bytes) -> int:
    """How many tokens two runs of packed tokens have in common at their beginning."""
    low, high = 0, min(len(a), len(b)) // _WIDTH
    while low < high:
        middle = (low + high + 1) // 2
        if a[: middle * _WIDTH] == b[: middle * _WIDTH]:
            low = middle
        else:
            high = middle - 1
    return low


def closest(names: Iterable[str], wanted: Link) -> list[tuple[str, int]]:
    """`names` (of links of the same parent) with how many tokens each may at most have in common with `wanted`; the most promising first."""
    sketch = wanted.sketch
    rated = []
    for name in names:
        other = name.rpartition("-")[2]
        alike = 0
        for place in range(0, min(len(sketch), len(other)), 2):
            if sketch[place : place + 2] != other[place : place + 2]:
                break
            alike += 1
        rated.append((name, min(wanted.count, (alike + 1) * STEP - 1 if alike * STEP < CHUNK else CHUNK)))
    rated.sort(key=lambda one: -one[1])
    return rated

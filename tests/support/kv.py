"""KV that says of which tokens it is, so that a wrong chunk cannot look right."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from qwen2_local.backends.base import Chunk
from qwen2_local.kvcache import KvCache

PROMPT = [(i * i * 31 + i) % 151_000 for i in range(1200)]
"""Tokens that do not repeat soon."""


def data_of(tokens: Sequence[int], count: int, per_token: int = 32) -> bytes:
    """The KV of the last `count` of `tokens`: for each token a hash of all tokens up to it."""
    digest, rows = hashlib.sha256(), []
    for token in tokens:
        digest.update(token.to_bytes(4, "little"))
        rows.append(digest.digest() * (per_token // 32))
    return b"".join(rows[len(tokens) - count :])


def export(cache: KvCache, fingerprint: str, tokens: Sequence[int], per_token: int = 32) -> tuple[list[tuple[int, int]], list[Chunk]]:
    """What is missing of `tokens`, as a backend would give it."""
    ranges = cache.missing(fingerprint, tokens)
    return ranges, [Chunk(end - start, data_of(tokens[:end], end - start, per_token)) for start, end in ranges]


def save(
    cache: KvCache, fingerprint: str, tokens: Sequence[int], *, persist: bool = True, flush: bool = True, per_token: int = 32
) -> tuple[str, ...]:
    """What an engine does at the end of a turn."""
    ranges, chunks = export(cache, fingerprint, tokens, per_token)
    names = cache.save(fingerprint, tokens, ranges, chunks, persist=persist)
    assert not flush or cache.flush(30)
    return names


def known(cache: KvCache, fingerprint: str, tokens: Sequence[int], per_token: int = 32) -> int:
    """How many tokens are found, after checking every byte of them."""
    found = cache.find(fingerprint, tokens)
    at = 0
    for hit in found:
        expected = data_of(tokens[: at + hit.tokens], hit.tokens, per_token)
        assert bytes(hit.chunk.data[: len(expected)]) == expected, f"wrong KV from token {at} on"
        assert hit.tokens == hit.chunk.tokens or at + hit.tokens == found.end
        at += hit.tokens
    assert at <= found.end
    return at

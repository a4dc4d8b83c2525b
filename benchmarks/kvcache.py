"""What the KV cache costs by itself, without a model: saving, finding and reading a conversation, and finding one among many.

    python benchmarks/kvcache.py [--tokens 4000] [--per-token 12288] [--chats 10 100 1000]

12,288 bytes per token are Qwen2-0.5B's at 16 bits. Each of the other conversations is of 20 chunks (of little data, as no data is read to find
one), and they begin with the same 40 tokens. The system has the files in its memory. The last line is one JSON object: medians in
milliseconds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from qwen2_local.backends.base import Chunk
from qwen2_local.kvcache import CHUNK, Disk, KvCache, chain

FINGERPRINT = "ab" * 32


def milliseconds(work: Callable[[], object], repeat: int = 15) -> float:
    taken = []
    for _ in range(repeat):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return round(statistics.median(taken) * 1e3, 3)


def one(folder: Path, tokens: int, per_token: int) -> dict[str, float]:
    """Saving, finding and reading one conversation."""
    prompt = [random.randrange(151_000) for _ in range(tokens)]
    cache = KvCache(folder, budget=10**12, memory=0)
    ranges = cache.missing(FINGERPRINT, prompt)
    chunks = [Chunk(end - start, os.urandom((end - start) * per_token)) for start, end in ranges]
    began = time.perf_counter()
    cache.save(FINGERPRINT, prompt, ranges, chunks)
    called = time.perf_counter() - began
    assert cache.flush(600)
    stored = time.perf_counter() - began
    found = milliseconds(lambda: cache.find(FINGERPRINT, prompt))
    read = milliseconds(lambda: list(cache.find(FINGERPRINT, prompt)), 5)
    cache.close()
    size = tokens * per_token
    return {"MB": round(size / 1e6, 1), "save call": round(called * 1e3, 3), "stored": round(stored * 1e3, 1), "find": found, "read": read}


def among(folder: Path, chats: int) -> dict[str, float]:
    """Finding one conversation among many."""
    shared = [random.randrange(151_000) for _ in range(40)]
    disk = Disk(folder, 10**12)
    for _ in range(chats):
        prompt = [*shared, *(random.randrange(151_000) for _ in range(20 * CHUNK - 40))]
        for link in chain.links(FINGERPRINT, prompt):
            disk.write(link, bytes(100))
    cache = KvCache(folder, budget=10**12, memory=0)
    figures = {
        "known": milliseconds(lambda: cache.find(FINGERPRINT, prompt)),
        "edited": milliseconds(lambda: cache.find(FINGERPRINT, [*prompt[:1100], 1, *prompt[1100:]])),
        "new": milliseconds(lambda: cache.find(FINGERPRINT, [*shared, *range(1000)])),
        "missing": milliseconds(lambda: cache.missing(FINGERPRINT, prompt)),
        "measure all": milliseconds(Disk(folder).used, 3),
    }
    cache.close()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--per-token", type=int, default=12288)
    parser.add_argument("--chats", type=int, nargs="*", default=[10, 100, 1000])
    asked = parser.parse_args()
    random.seed(0)
    with tempfile.TemporaryDirectory() as place:
        results: dict[str, object] = {"one": one(Path(place) / "one", asked.tokens, asked.per_token)}
        for chats in asked.chats:
            results[f"among {chats}"] = among(Path(place) / str(chats), chats)
    print(json.dumps(results))


if __name__ == "__main__":
    main()

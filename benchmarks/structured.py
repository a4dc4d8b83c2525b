"""Replies that keep to a JSON schema against free ones: tokens per second, and what the first schema costs everybody else.

    python benchmarks/structured.py [--models guide q4_0] [--tokens 64] [--rounds 5] [--folder FOLDER] [--quick]

Rates are of decoding, in one process, in turns, free and constrained, of the same prompt with the same sampling (Qwen2's own, and greedy); the
ratio is constrained over free. q4_0 and the like are of the exact shape of Qwen2-0.5B, with its vocabulary of 151,646 ids, in random weights
(`--folder` keeps them). stall: a reply is under way while another thread compiles the first grammar of a tokenizer; the longest wait between two
tokens then, and of the same reply without it. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import spread
from benchmarks.decode import DEFAULTS, GREEDY, model_path
from qwen2_local import Message, Qwen2, grammar
from qwen2_local.chatml import render

TEXT = {"type": "string", "maxLength": 60}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": TEXT,
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["red", "green", "blue"]},
        "tags": {"type": "array", "items": TEXT, "minItems": 8, "maxItems": 8},
    },
    "required": ["name", "age", "kind", "tags"],
    "additionalProperties": False,
}


def rate(model: Qwen2, prompt: list[int], tokens: int, sampling: Any, schema: Any) -> float:
    """Tokens per second after the first. A reply that ends early counts as far as it came."""
    usage = model.write(prompt, sampling=sampling, max_tokens=tokens, schema=schema).finish().usage
    return usage.decode_tokens_per_s


def compare(model: Qwen2, tokens: int, rounds: int) -> dict[str, Any]:
    prompt = list(render(model.tokenizer, [Message("user", "Describe the person in the text as JSON.")], default_system=model.default_system))
    report: dict[str, Any] = {}
    for name, sampling in {"greedy": GREEDY, "sampled": DEFAULTS}.items():
        rates: dict[bool, list[float]] = {False: [], True: []}
        for number in range(-1, rounds):  # the first one warms up
            for constrained in (False, True) if number % 2 else (True, False):
                found = rate(model, prompt, tokens, sampling, SCHEMA if constrained else None)
                if number >= 0 and found:
                    rates[constrained].append(found)
        ratios = [kept / free for kept, free in zip(rates[True], rates[False], strict=True)]
        report[name] = {"free_tokens_per_s": round(statistics.median(rates[False]), 1), "ratio": spread(ratios)}
    return report


def stall(model: Qwen2, tokens: int) -> dict[str, float]:
    """How long a reply stands still, in milliseconds, while a tokenizer's first grammar is compiled."""
    took = 0.0

    def compile() -> None:
        nonlocal took
        began = time.perf_counter()
        grammar.compile(grammar.Regex("[a-z]{3}"), model.tokenizer, *ids)
        took = time.perf_counter() - began

    ids = min(model.tokenizer.size, model.info.vocabulary), frozenset({model.tokenizer.size - 2})  # a vocabulary that is not known yet
    prompt = model.tokenizer.encode("Once upon a time")
    longest = []
    for thread in (None, threading.Thread(target=compile)):
        stamps = []
        for piece in model.write(prompt, max_tokens=tokens, temperature=1.0, seed=1):
            stamps.append((time.perf_counter(), piece.token))
            if len(stamps) == 4 and thread is not None:
                thread.start()
        if thread is not None:
            thread.join()
        times = [stamp for stamp, _ in stamps]
        longest.append(max((b - a for a, b in itertools.pairwise(times[3:])), default=0.0))
    return {"compile_ms": round(1000 * took), "longest_wait_without_ms": round(1000 * longest[0], 1), "longest_wait_ms": round(1000 * longest[1], 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["guide", "q4_0"], help="guide, or a type of GGUF")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the models of random weights are, or will be made")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.models, options.rounds = ["guide"], 2
    report: dict[str, Any] = {"cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()}
    with tempfile.TemporaryDirectory() as place:
        for name in options.models:
            path = "guide" if name == "guide" else str(model_path(name, options.folder or Path(place)))
            with Qwen2(path, backend="llama.cpp", context=2048, kv_cache=False) as model:
                report[name] = {"stall": stall(model, options.tokens), **compare(model, options.tokens, options.rounds)}
            print(name, json.dumps(report[name]), flush=True)
    print(json.dumps(report))


if __name__ == "__main__":
    main()

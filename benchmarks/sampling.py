"""Choosing a token at Qwen2's vocabulary of 151,646 ids, and masks of structured output: milliseconds per token on the host.

    python benchmarks/sampling.py [--repeat 300]

Logits are random, with a few likely ones; the masks are those of a JSON reply that a schema constrains, token by token. The last line is one
JSON object: medians in milliseconds, and the largest for masks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from qwen2_local import grammar
from qwen2_local.backends.base import Choice
from qwen2_local.sampling import Window, choose
from qwen2_local.tokens import Tokenizer
from qwen2_local.types import Sampling
from tests.support.qwen2_vocabulary import CONTROL, EMBEDDINGS, TOKENS, write_real_tokenizer

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0},
        "price": {"type": "number"},
        "kind": {"enum": ["red", "green", "blue"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 20}},
        "id": {"type": "string", "pattern": "^[a-z]{2}-[0-9]{4}$"},
    },
    "required": ["name", "age", "price", "kind", "tags", "id"],
    "additionalProperties": False,
}
REPLY = '{"name": "Ada Lovelace", "age": 36, "price": 12.5, "kind": "green", "tags": ["mathematics", "poetry"], "id": "ab-1234"}'
QWEN2 = Sampling(0.7, 0.8, 20, 1.1)


def milliseconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=300)
    repeat = parser.parse_args().repeat
    random = np.random.default_rng(0)
    logits = (2.5 * random.standard_normal(EMBEDDINGS)).astype(np.float32)
    logits[random.integers(0, EMBEDDINGS, 50)] += 10
    prompt = random.integers(0, TOKENS, 3000).tolist()

    def median(choice: Choice) -> float:
        return round(statistics.median(milliseconds(lambda: choose(logits, choice)) for _ in range(repeat)), 3)

    found: dict[str, float] = {}
    for name, sampling in {"greedy": Sampling(), "qwen2": QWEN2, "temperature": Sampling(0.7), "top_p": Sampling(0.7, 0.8)}.items():
        found[name] = median(Window(prompt, sampling).choice(TOKENS, 0.6))
    found["greedy, 5 log-probabilities"] = median(Choice(TOKENS, top_logprobs=5))

    with tempfile.TemporaryDirectory() as folder:
        write_real_tokenizer(Path(folder))
        tokenizer = Tokenizer.from_json(Path(folder) / "tokenizer.json")
    stops = {CONTROL["<|im_end|>"]}
    found["vocabulary"] = milliseconds(lambda: grammar.compile(grammar.JsonSchema(SCHEMA), tokenizer, TOKENS, stops))
    found["compile"] = milliseconds(lambda: grammar.compile(grammar.JsonSchema(SCHEMA), tokenizer, TOKENS, stops))
    form = grammar.compile(grammar.JsonSchema(SCHEMA), tokenizer, TOKENS, stops)
    masks, chosen = [], []
    window = Window(prompt, QWEN2)
    for _ in range(10):
        constraint = form.start()
        for token in tokenizer.encode(REPLY):
            masks.append(milliseconds(constraint.mask))
            now = constraint.mask()
            choice = window.choice(TOKENS, 0.6, mask=lambda now=now: now)
            chosen.append(milliseconds(lambda choice=choice: choose(logits, choice)))
            constraint.accept(token)
    found |= {"mask": statistics.median(masks), "mask mean": statistics.mean(masks), "mask largest": max(masks)}
    window = Window(prompt, QWEN2)
    found["qwen2 with mask"] = statistics.median(chosen)
    found["window"] = statistics.median(milliseconds(lambda: (window.add(5), window.choice(TOKENS, 0.5))) for _ in range(repeat))
    for name, value in found.items():
        print(f"{name:30} {value:8.3f} ms")
    print(json.dumps({name: round(value, 4) for name, value in found.items()}))


if __name__ == "__main__":
    main()

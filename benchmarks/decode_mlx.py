"""Greedy decoding on MLX beside `mlx_lm.stream_generate`: the same weights, the same prompt, the same number of tokens, turn by turn.

    python benchmarks/decode_mlx.py [--model FOLDER] [--prompt 40] [--tokens 200] [--rounds 9]      in the project's environment

The model is an MLX folder; by default the guide, converted to 16 and to 32 bits. Each round runs one after the other, in one process, and gives a
ratio; medians are over the rounds, the first is not counted (mlx_lm compiles kernels). The last line is one JSON object; speeds are tokens
per second after the first token.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from qwen2_converters.convert import convert
from qwen2_converters.target import Target
from qwen2_local.backends import mlx
from qwen2_local.backends.base import Choice, Layout, LoadOptions, Row

GUIDE = next((Path(__file__).parents[1] / "qwen2_local" / "guide").rglob("config.json")).parent


def ours(folder: Path, prompt: list[int], tokens: int) -> Callable[[], float]:
    """A run of our backend, step by step as the engine asks for them."""
    context = len(prompt) + tokens
    backend = mlx.load(folder, layout=Layout(1, context), options=LoadOptions("benchmark", context))
    choice = Choice(backend.info.vocabulary)

    def run() -> float:
        sequence = backend.open()
        for start in range(0, len(prompt), backend.step_tokens):
            result = backend.step([Row(sequence, prompt[start : start + backend.step_tokens], [choice])])[0]
        token = result.chosen[0].token
        before = time.perf_counter()
        for _ in range(tokens - 1):
            token = backend.step([Row(sequence, [token], [choice])])[0].chosen[0].token
        took = time.perf_counter() - before
        backend.free(sequence)
        return (tokens - 1) / took

    return run


def theirs(folder: Path, prompt: list[int], tokens: int) -> Callable[[], float]:
    """A run of mlx_lm."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mlx_lm import load, stream_generate

    model, tokenizer = load(str(folder))
    tokenizer.eos_token_ids = set()

    def run() -> float:
        replies = stream_generate(model, tokenizer, prompt, max_tokens=tokens)
        next(replies)
        before = time.perf_counter()
        count = sum(1 for _ in replies)
        return count / (time.perf_counter() - before)

    return run


def measure(folder: Path, prompt: list[int], tokens: int, rounds: int) -> dict[str, float]:
    a, b = ours(folder, prompt, tokens), theirs(folder, prompt, tokens)
    pairs = [(a(), b()) for _ in range(rounds + 1)][1:]
    result = {
        "ours": statistics.median(x for x, _ in pairs),
        "mlx_lm": statistics.median(y for _, y in pairs),
        "ratio": statistics.median(x / y for x, y in pairs),
        "least": min(x / y for x, y in pairs),
    }
    speeds = f"ours {result['ours']:7.1f}   mlx_lm {result['mlx_lm']:7.1f}"
    print(f"{folder.name:<12} {speeds}   ratio {result['ratio']:.2f} (least {result['least']:.2f})")
    return {name: round(value, 3) for name, value in result.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--prompt", type=int, default=40, help="tokens before the reply")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as made:
        folders = [options.model] if options.model else []
        for weights in () if options.model else ("f32", "bf16"):
            folders.append(convert(GUIDE, Target.parse(f"mlx:{weights}"), Path(made) / f"guide-{weights}"))
        for folder in folders:
            results[folder.name] = measure(folder, [100 + at % 200 for at in range(options.prompt)], options.tokens, options.rounds)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(json.dumps({"prompt": options.prompt, "tokens": options.tokens, "rounds": options.rounds, "cores": cores, **results}))


if __name__ == "__main__":
    main()

"""What speculation brings: prompt lookup where a reply copies, and what it costs where it does not; the same for a draft model.

    python benchmarks/speculation.py [--parts lookup draft] [--backends llama.cpp mlx] [--models q8_0] [--rounds 3] [--folder FOLDER] [--quick]
        [--cpu-time]

Each figure is a ratio of seconds of decoding, plain over speculating, of the same prompts in one process, in turns; above 1 is faster. The guide
repeats texts of 80 bytes or more (lookup's best case) and answers the questions of its exam (training/exam; nothing to copy). Drafts: the guide
in 4 bits for the guide in 16, which is as large a share of the work as a draft can be; and, at the shape of Qwen2-0.5B in random weights
(`--folder` keeps them), a model of two layers of other random weights, which guesses nothing right: what is left of its cost once it is switched
off. `best` is the ratio of each prompt's fastest rounds; `--cpu-time` counts seconds of this process's processors instead, for a machine that
others use. Replies are compared; where one differs, `margin` is by how much the two likeliest tokens differed
there, in logarithms. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import spread
from benchmarks.decode import COMMAND, model_path, random_tokens
from benchmarks.random_checkpoint import write
from qwen2_local import Message, Qwen2, backends
from qwen2_local.catalog import SIZES
from qwen2_local.chatml import render
from qwen2_local.stream import Stream
from qwen2_local.types import Completion

ROOT = Path(__file__).parents[1]


def copies(count: int) -> list[str]:
    """Texts to repeat, as the guide's exam has them, but none of a few words."""
    sys.path.insert(0, str(ROOT / "training"))
    import corpus

    sampler = corpus.Sampler(corpus.load(0), 2_000_000)
    found: list[str] = []
    while len(found) < count:
        user, reply = sampler.repetition(corpus.LANGUAGES[len(found) % 2])
        if len(reply.encode()) >= 80:
            found.append(user)
    return found


def questions(count: int) -> list[str]:
    """Of the guide's exam, those of a single turn."""
    items = tomllib.loads((ROOT / "training/exam/blind.toml").read_text(encoding="utf-8"))["item"]
    asked = [item["ask"] for item in items if "ask" in item]
    return asked[:: max(1, len(asked) // count)][:count]


def prompts(model: Qwen2, asked: Sequence[str]) -> list[list[int]]:
    return [list(render(model.tokenizer, [Message("user", text)], default_system=model.default_system)) for text in asked]


Way = Callable[[Sequence[int]], tuple[Completion, float]]
"""Writes the reply to a prompt; the processors' seconds from its first token on."""


def written(stream: Stream) -> tuple[Completion, float]:
    next(stream, None)
    began = time.process_time()
    completion = stream.finish()
    return completion, time.process_time() - began


def compete(plain: Way, drafting: Way, asked: Sequence[Sequence[int]], options: argparse.Namespace) -> dict[str, Any]:
    """Every prompt in both ways, one after the other, each first in turn."""
    ratios, drafted, accepted, steps, differ = [], 0, 0, 0, []
    best = {way: [math.inf] * len(asked) for way in (plain, drafting)}
    for number in range(-1, options.rounds):  # the first one warms up
        seconds = {plain: 0.0, drafting: 0.0}
        for index, prompt in enumerate(asked[:3] if number < 0 else asked):
            replies: dict[Way, Completion] = {}
            for way in (plain, drafting) if (index + number) % 2 else (drafting, plain):
                replies[way], computed = way(prompt)
                took = computed if options.cpu_time else replies[way].usage.decode_s
                seconds[way] += took
                best[way][index] = min(best[way][index], took)
            if number == 0:
                usage = replies[drafting].usage
                drafted, accepted = drafted + usage.drafted_tokens, accepted + usage.accepted_tokens
                steps += usage.completion_tokens - usage.accepted_tokens
                if replies[plain].tokens != replies[drafting].tokens:
                    differ.append((prompt, replies[plain].tokens, replies[drafting].tokens))
        if number >= 0:
            ratios.append(seconds[plain] / seconds[drafting])
    return {
        "ratio": spread(ratios), "best": round(sum(best[plain]) / sum(best[drafting]), 3), "replies": len(asked), "differ": differ,
        "drafted": drafted, "accepted": accepted, "tokens_per_step": round((steps + accepted) / max(1, steps), 2),
    }  # fmt: skip


def explain(row: dict[str, Any], model: Qwen2) -> dict[str, Any]:
    """How near the two likeliest tokens were where replies differ."""
    margins = []
    for prompt, one, other in row["differ"]:
        at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
        reply = model.write([*prompt, *one[:at]], max_tokens=1, temperature=0.0, logprobs=2).finish()
        if reply.logprobs:
            (_, first), (_, second) = reply.logprobs[0][1][:2]
            margins.append(first - second)
    return row | {"differ": len(row["differ"]), "margin": round(max(margins, default=0.0), 5)}


def writing(model: Qwen2, most: int, *, lookup: bool) -> Way:
    return lambda prompt: written(model.write(prompt, max_tokens=most, temperature=0.0, repetition_penalty=1.0, lookup=lookup))


def lookup(backend: str, options: argparse.Namespace) -> dict[str, Any]:
    rows = {}
    with Qwen2("guide", backend=backend, kv_cache=False) as model:
        for name, asked, most in (("copying", copies(options.copies), 160), ("questions", questions(options.questions), 120)):
            plain, drafting = writing(model, most, lookup=False), writing(model, most, lookup=True)
            rows[name] = explain(compete(plain, drafting, prompts(model, asked), options), model)
            print("lookup", backend, name, json.dumps(rows[name]), flush=True)
    return rows


def guide_draft(options: argparse.Namespace) -> dict[str, Any]:
    with (
        Qwen2("guide", backend="llama.cpp", kv_cache=False) as model,
        Qwen2("guide", backend="llama.cpp", draft="guide:q4_0", kv_cache=False) as helped,
    ):
        plain, drafting = writing(model, 120, lookup=False), writing(helped, 120, lookup=False)
        return explain(compete(plain, drafting, prompts(model, questions(options.questions)), options), model)


def foreign_draft(path: Path, draft: Path, options: argparse.Namespace) -> dict[str, Any]:
    """A draft model that is never right."""
    with Qwen2(str(path), context=2048, kv_cache=False) as model, Qwen2(str(path), context=2048, draft=str(draft), kv_cache=False) as helped:
        plain, drafting = writing(model, options.tokens, lookup=False), writing(helped, options.tokens, lookup=False)
        asked = [random_tokens(16, model.tokenizer.size, seed) for seed in range(2)]
        return explain(compete(plain, drafting, asked, options), model)


def small_draft(folder: Path) -> Path:
    """Qwen2's vocabulary and the width of 0.5B in two layers of random weights, in 4 bits."""
    path = folder / "0.5b-draft-q4_0.gguf"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as place:
            size = next(size for size in SIZES if size.name == "0.5b")
            write(replace(size, layers=2), Path(place) / "draft", seed=7)
            subprocess.run([COMMAND, "convert", Path(place) / "draft", "--to", "gguf:q4_0", "-o", path], check=True, stdout=subprocess.DEVNULL)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("lookup", "draft"), default=["lookup", "draft"])
    parser.add_argument("--backends", nargs="+", choices=backends.NAMES, default=list(backends.available()))
    parser.add_argument("--models", nargs="*", default=["q8_0"], help="types of GGUF, for the draft that is never right")
    parser.add_argument("--folder", type=Path, help="where the models of random weights are, or will be made")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=128, help="of a reply of random weights")
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    options.copies, options.questions = (4, 6) if options.quick else (20, 50)
    if options.quick:
        options.rounds, options.models = 1, []
    report: dict[str, Any] = {"cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()}
    if "lookup" in options.parts:
        report["lookup"] = {backend: lookup(backend, options) for backend in options.backends}
    if "draft" in options.parts:
        report["guide:q4_0 for guide"] = guide_draft(options)
        print("guide:q4_0 for guide", json.dumps(report["guide:q4_0 for guide"]), flush=True)
        with tempfile.TemporaryDirectory() as place:
            folder = options.folder or Path(place)
            for name in options.models:
                report[f"never right for {name}"] = row = foreign_draft(model_path(name, folder), small_draft(folder), options)
                print("never right for", name, json.dumps(row), flush=True)
    print(json.dumps(report))


if __name__ == "__main__":
    main()

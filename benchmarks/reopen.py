"""A long chat, closed and reopened in a new process: time to the first token with the KV cache, against reading it all again.

    python benchmarks/reopen.py [--models q4_0 q4_k_m] [--tokens 4000] [--rounds 3] [--folder FOLDER] [--quick]

Everything goes through `Qwen2` and `Chat`. The models have the exact shape of Qwen2-0.5B, in random weights (`--folder` keeps them); --quick takes
the guide and 1,000 tokens. Each measurement is a new process: it loads the model, and from there, with a clock, opens the chat by its number and
waits for the first token: of the last reply once more ("reopen", the same work with and without the cache), or of a further turn ("turn").
warm: the system has the files of chat and KV in its memory; cold: it was told to drop them (posix_fadvise DONTNEED), and `read_mb` says what then
came from the disk. The weights are loaded in either case, before the clock starts. prefill: with QWEN2_LOCAL_KV=off. Ratios are of medians in
seconds, of processes in turn. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import child, forget_pages, read_from_disk, spread
from benchmarks.decode import model_path

TURNS = 4
WAYS = {"reopen_warm": "reopen", "reopen_cold": "reopen", "turn_warm": "turn", "turn_cold": "turn", "prefill": "reopen"}


def make(model: str, tokens: int) -> dict[str, Any]:
    """In a child: a chat of so many tokens, saved."""
    from qwen2_local import Qwen2

    with Qwen2(model, context=tokens + 1024) as loaded:
        chat = loaded.chat()
        number = chat.save()  # first, as the KV of an unsaved chat does not go to the disk
        words = "The quick brown fox jumps over the lazy dog, and then it goes home. "
        each = tokens // TURNS - 24
        per_word = len(loaded.tokenizer.encode(words))
        for turn in range(TURNS):
            completion = chat.send(f"{turn}: {words * (each // per_word)}", max_tokens=8, temperature=0.0)
        usage = completion.usage
    return {"number": number, "tokens": usage.prompt_tokens + usage.completion_tokens}


def reopen(model: str, tokens: int, number: int, kind: str) -> dict[str, Any]:
    """In a child: the first token of a saved chat."""
    from qwen2_local import Qwen2
    from qwen2_local.chat import Chat

    began = time.perf_counter()
    with Qwen2(model, context=tokens + 1024) as loaded:
        load_s = time.perf_counter() - began
        read = read_from_disk()
        began = time.perf_counter()
        chat = Chat.load(loaded, number)
        options = {"max_tokens": 1, "temperature": 0.0, "persist": False}
        reply = chat.stream("Go on.", **options) if kind == "turn" else chat.stream_regenerate(**options)
        next(iter(reply), None)
        first_s = time.perf_counter() - began
        read = read_from_disk() - read
        usage = reply.finish().usage
    return {"load_s": load_s, "first_s": first_s, "cached": usage.cached_tokens, "computed": usage.prompt_tokens - usage.cached_tokens, "read": read}


def measure(model: str, tokens: int, rounds: int, prefills: int, home: Path) -> dict[str, Any]:
    number, whole = child(__file__, "--child", "make", model, tokens, home=home).values()
    kept = home.with_name(f"{home.name}-kept")
    shutil.copytree(home, kept)
    print(f"  a chat of {whole} tokens", flush=True)
    seen: dict[str, list[dict[str, Any]]] = {name: [] for name in WAYS}
    for turn in range(rounds):
        for name, kind in WAYS.items():
            if name == "prefill" and turn >= prefills:
                continue
            shutil.copytree(kept, home, dirs_exist_ok=True)  # each opens the chat as it was
            if name.endswith("cold"):
                forget_pages(home)
            more = {"QWEN2_LOCAL_KV": "off"} if name == "prefill" else {}
            seen[name].append(child(__file__, "--child", kind, model, tokens, number, home=home, **more))
            row = seen[name][-1]
            print(f"  {name:12} {row['first_s']:8.3f} s   computed {row['computed']:5}   read from disk {row['read'] / 1e6:6.1f} MB", flush=True)
    seconds = {name: spread((row["first_s"] for row in rows), 4) for name, rows in seen.items()}
    report: dict[str, Any] = {"tokens": whole, "seconds": seconds}
    report["computed"] = {name: rows[0]["computed"] for name, rows in seen.items()}
    report["read_mb"] = {name: round(rows[-1]["read"] / 1e6, 1) for name, rows in seen.items()}
    report["times_faster"] = {name: round(seconds["prefill"][0] / seconds[name][0], 1) for name in WAYS if name != "prefill"}
    report["load_s"] = spread(row["load_s"] for rows in seen.values() for row in rows)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["q4_0", "q4_k_m"], help="guide, or a type of GGUF")
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prefills", type=int, default=2, help="in so many rounds the chat is also read anew")
    parser.add_argument("--folder", type=Path, help="where the models of random weights are, or will be made")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        what, model, tokens, *number = options.child
        print(json.dumps(make(model, int(tokens)) if what == "make" else reopen(model, int(tokens), int(number[0]), what)))
        return
    if options.quick:
        options.models, options.tokens, options.rounds, options.prefills = ["guide"], 1000, 1, 1
    report: dict[str, Any] = {"cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()}
    with tempfile.TemporaryDirectory() as place:
        for name in options.models:
            print(name, flush=True)
            model = "guide" if name == "guide" else str(model_path(name, options.folder or Path(place)))
            report[name] = measure(model, options.tokens, options.rounds, options.prefills, Path(place) / f"home-{name}")
    print(json.dumps(report))


if __name__ == "__main__":
    main()

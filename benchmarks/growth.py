"""How costs grow: of a token with the context, of a start and a turn with what is stored; and the time from load to the first token.

    python benchmarks/growth.py [--parts context stored first] [--models guide q4_0] [--stored 10 100 1000] [--rounds 5] [--folder FOLDER] [--quick]

context: seconds per token of a reply behind 1,000, 2,000, 4,000 and 8,000 tokens, of `Qwen2.write` and of a bare loop of `llama_decode`, in one
process, in turns; what attention itself costs is in both, `ratio` is what we add (1 is nothing, larger is slower). stored: new processes that
load the guide and take a further turn of a saved chat, among so many chats and the KV files of as many (20 each, of little data, with the
fingerprint of the guide); ratios to the fewest. first: new processes; from the start of `import` to the first token, in parts. q4_0 and the
like are of the exact shape of Qwen2-0.5B, in random weights (`--folder` keeps them). The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import child, spread, turns_of
from benchmarks.decode import GREEDY, Bare, decoding, model_path, random_tokens

LENGTHS = (1000, 2000, 4000, 8000)
PER_CHAT = 20


class Ours:
    """`Qwen2.write`, as one that competes with the bare loop."""

    def __init__(self, path: Path, context: int) -> None:
        from qwen2_local import Qwen2

        self.model = Qwen2(str(path), context=context, kv_cache=False)

    def tokens(self, prompt: Any, count: int, how: Any) -> Any:
        return self.model.write(prompt, max_tokens=count, temperature=0.0, repetition_penalty=1.0)

    def close(self) -> None:
        self.model.close()


class Continuing(Bare):
    """The bare loop, which reads only what is new of a prompt, as we do."""

    def read(self, prompt: Any) -> int:
        known = getattr(self, "known", 0)
        self.lib.llama_memory_seq_rm(self.memory, 0, known, -1)
        for start in range(known, len(prompt), 512):
            rows = [(token, start + i, 0) for i, token in enumerate(prompt[start : start + 512])]
            self.feed(rows, 1)
        self.known = len(prompt) - 1
        return self.best(len(rows) - 1)


def by_context(path: Path, lengths: list[int], tokens: int, rounds: int) -> dict[str, Any]:
    """Prompts that go on from one another, so that the longest is read once."""
    contenders = {"bare": Continuing(path, max(lengths) + 256), "ours": Ours(path, max(lengths) + 256)}
    whole = random_tokens(max(lengths), contenders["bare"].vocabulary, 3)
    report: dict[str, Any] = {}
    try:
        for length in lengths:
            measure = decoding(GREEDY, whole[:length], tokens)
            seconds: dict[str, list[float]] = {name: [] for name in contenders}
            for number in range(-1, rounds):  # the first one warms up, and reads the prompt
                for name in turns_of(list(contenders), number):
                    took = 1 / measure(name, contenders[name], number)
                    if number >= 0:
                        seconds[name].append(took)
            ratios = [ours / bare for ours, bare in zip(seconds["ours"], seconds["bare"], strict=True)]
            report[str(length)] = {"ms_per_token": round(1000 * statistics.median(seconds["ours"]), 3), "ratio": spread(ratios)}
    finally:
        for contender in contenders.values():
            contender.close()
    return report


def store(chats: int) -> dict[str, Any]:
    """In a child: a chat with the guide to go on with, among so many others, of chats and of KV."""
    from benchmarks.chats import chat as some_chat
    from qwen2_local import Qwen2, paths
    from qwen2_local.chats import ChatStore
    from qwen2_local.kvcache import CHUNK, Disk, chain

    chance = random.Random(1)
    with Qwen2("guide", backend="llama.cpp") as model:
        own = model.chat()
        number = own.save()
        own.send("What is GGUF? " * 60, max_tokens=20, temperature=0.0)
    with ChatStore.open() as saved:
        saved.insert_all(some_chat(chance, 20) for _ in range(chats - 1))
    disk = Disk(paths.kv(), 10**12)
    (known,) = disk.stored()
    shared = random_tokens(40, 4000, 5)  # no fingerprint is undone: its files lie beside the real ones under another one's first chunk
    for other in range(chats - 1):
        for link in chain.links(known.fingerprint, [*shared, *random_tokens(PER_CHAT * CHUNK - 40, 4000, other)]):
            disk.write(link, bytes(100))
    return {"number": number, "files": len(disk.names())}


def start_and_turn(number: int) -> dict[str, float]:
    """In a child: load, a turn of the chat, the next turn; and a list of all chats."""
    began = time.perf_counter()
    from qwen2_local import Qwen2
    from qwen2_local.chat import Chat
    from qwen2_local.chats import ChatStore

    with Qwen2("guide", backend="llama.cpp") as model:
        loaded = time.perf_counter()
        chat = Chat.load(model, number)
        options: Any = {"max_tokens": 1, "temperature": 0.0}
        chat.send("And MLX?", **options)
        turn = time.perf_counter()
        chat.send("And now?", **options)
        second = time.perf_counter()
        with ChatStore.open() as saved:
            saved.summaries()
        listed = time.perf_counter()
    closed = time.perf_counter()
    return {"load": loaded - began, "turn": turn - loaded, "next turn": second - turn, "list": listed - second, "close": closed - listed}


def by_stored(place: Path, stored: list[int], rounds: int) -> dict[str, Any]:
    homes = {str(chats): place / f"stored-{chats}" for chats in stored}
    made = {chats: child(__file__, "--child", "store", chats, home=home) for chats, home in homes.items()}
    rows: dict[str, list[dict[str, float]]] = {chats: [] for chats in homes}
    for number in range(-1, rounds):
        for chats in turns_of(list(homes), number):
            row = child(__file__, "--child", "turn", made[chats]["number"], home=homes[chats])
            if number >= 0:
                rows[chats].append(row)
    fewest = rows[str(stored[0])]
    report: dict[str, Any] = {}
    for chats, found in rows.items():
        report[chats] = {"files": made[chats]["files"]}
        for part in found[0]:
            ms = round(1000 * statistics.median(row[part] for row in found), 1)
            ratios = [row[part] / least[part] for row, least in zip(found, fewest, strict=True)]
            report[chats][part] = {"ms": ms, "ratio": spread(ratios, 2)}
    return report


def first_token(model: str) -> dict[str, float]:
    """In a child: from nothing to the first token."""
    began = time.perf_counter()
    from qwen2_local import Qwen2

    imported = time.perf_counter()
    with Qwen2(model, backend="llama.cpp", kv_cache=False) as loaded:
        ready = time.perf_counter()
        next(iter(loaded.stream("What is GGUF?", temperature=0.0)))
        first = time.perf_counter()
    closed = time.perf_counter()
    return {"import": imported - began, "load": ready - imported, "first": first - ready, "import to first": first - began, "close": closed - first}


def to_first(model: str, place: Path, rounds: int) -> dict[str, Any]:
    rows = [child(__file__, "--child", "first", model, home=place / "first") for _ in range(rounds + 1)][1:]
    return {part: spread((1000 * row[part] for row in rows), 1) for part in rows[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("context", "stored", "first"), default=["context", "stored", "first"])
    parser.add_argument("--models", nargs="+", default=["guide", "q4_0"], help="guide, or a type of GGUF")
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("--stored", nargs="+", type=int, default=[10, 100, 1000])
    parser.add_argument("--tokens", type=int, default=24, help="of each reply behind a context")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the models of random weights are, or will be made")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        kind, what = options.child
        known: dict[str, Any] = {"store": lambda: store(int(what)), "turn": lambda: start_and_turn(int(what)), "first": lambda: first_token(what)}
        print(json.dumps(known[kind]()))
        return
    if options.quick:
        options.models, options.lengths, options.stored, options.rounds = ["guide"], [250, 1000], [10, 50], 1
    report: dict[str, Any] = {"cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()}
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        paths = {name: model_path(name, options.folder or place) for name in options.models if name != "guide"}
        if "guide" in options.models:
            paths["guide"] = model_path("guide", place)
        for part in options.parts:
            report[part] = {}
            if part == "stored":
                report[part] = by_stored(place, options.stored, options.rounds)
            for name in options.models if part != "stored" else ():
                if part == "context":
                    report[part][name] = by_context(paths[name], options.lengths, options.tokens, options.rounds)
                else:
                    report[part][name] = to_first("guide" if name == "guide" else str(paths[name]), place, options.rounds)
            print(part, json.dumps(report[part]), flush=True)
    print(json.dumps(report))


if __name__ == "__main__":
    main()

"""A day in small: 2,000 short requests to the guide, with cancels, errors, deaths of workers and reloads; then everything is where it began.

    python benchmarks/day.py [--requests 2000] [--per-load 200] [--seed 0] [--quick]

Requests of all kinds (tests/support/day.py) come from four threads; every fifth model lies in a worker process, which is killed once. After a
warm-up of two loads, and after each load, it is noted what this process holds with no model loaded: memory, threads, open files, child processes,
and files that are no stored KV. It fails unless all are the same at the end as after the warm-up, memory but for a tolerance, and every greedy
reply is the same all day. Sequences are counted before each unload. On Linux. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.support.day import Day, Footing

TOLERANCE = 24e6
"""Bytes: free memory between what is in use differs from time to time."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--per-load", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.requests, options.per_load = 120, 30
    with tempfile.TemporaryDirectory() as home:
        os.environ["QWEN2_LOCAL_HOME"] = home
        began = time.perf_counter()
        day = Day(options.seed)
        day.session(options.per_load)
        day.session(20, worker=True, kill=True)
        footing = [Footing.now()]
        for number in range(max(1, options.requests // options.per_load)):
            worker = number % 5 == 2
            day.session(options.per_load, worker=worker, kill=worker)
            footing.append(Footing.now())
            print(
                f"{number + 1:3}  memory {footing[-1].memory / 1e6:6.1f} MB   threads {len(footing[-1].threads)}   files {footing[-1].files}",
                flush=True,
            )
        took = time.perf_counter() - began
        left = day.chats_left()
    first, last = footing[0], footing[-1]
    same = {
        "threads": first.threads == last.threads,
        "files": first.files == last.files,
        "children": first.children == last.children == 0,
        "strangers": last.strangers <= first.strangers,
        "memory": last.memory - first.memory < TOLERANCE,
        "chats": left == 0,
        "replies": not day.wrong,
    }
    for problem in day.wrong[:20]:
        print(problem)
    if not same["strangers"]:
        print("left behind:", *sorted(last.strangers - first.strangers)[:20])
    report = {"seconds": round(took, 1), "done": dict(day.done), "memory_mb": [round(one.memory / 1e6, 1) for one in footing], "as_it_began": same}
    print(json.dumps(report))
    if not all(same.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()

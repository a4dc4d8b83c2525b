"""The app in a terminal: how soon it is there, how fast it answers, and what it takes from the model.

    python benchmarks/app.py [--runs 7] [--quick] [--model guide] [--only first_paint,keys,cpu,decode,long]      in the project's environment

first_paint: from the start of the process to the first whole frame, with the model loading behind; and until the model is ready.
keys: from a key press to its letter on the screen, while the model decodes as fast as it can.
cpu: what the app's process takes of one core while a model writes 30 of Qwen2's tokens a second, as a part of it: prose, one code block, one
list, one table. A reply has 4,000 tokens; the last 600 are measured, where it is longest. The model is a script in the same process, and counts.
decode: tokens per second of the same reply inside the app and from `Qwen2(worker=True)` alone, in turns.
long: a chat of 2,000 messages: from enter to its last message on the screen, and from page up to the next frame.

Everything happens in a data folder of its own. The last line is one JSON object; times are seconds: median, lowest, highest.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import string
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyte
from common import spread

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tui"), str(ROOT / "converters")]

from benchmarks.app_parts import KINDS, QUESTION, fill  # noqa: E402
from tests.support.qwen2_vocabulary import write_real_tokenizer  # noqa: E402
from tests.tui.terminal import ENTER, Terminal, cleaned, ctrl, program  # noqa: E402

_PAGE_UP = "\x1b[5~"


def part(name: str, *arguments: object) -> Terminal:
    """One of `app_parts`."""
    return Terminal(f"from benchmarks.app_parts import {name}; {name}(*{list(arguments)!r})")


def frames(window: Terminal, since: float = 0.0) -> Iterator[tuple[float, str]]:
    """What the screen showed after each burst of bytes that came after `since`, and when; emulated afterwards, so that it costs nothing."""
    screen = pyte.Screen(100, 30)
    stream = pyte.ByteStream(screen)
    start = 0
    for when, end in list(window.came):
        stream.feed(cleaned(bytes(window.raw[start:end])))
        start = end
        if when >= since:
            yield when, "\n".join(screen.display)


def when(window: Terminal, condition: Callable[[str], bool], since: float = 0.0) -> float:
    """When the screen first was so."""
    return next(moment for moment, text in frames(window, since) if condition(text))


def first_paint(runs: int) -> dict[str, Any]:
    painted, ready = [], []
    for number in range(runs + 1):
        with program("app", "guide") as window:
            # Looked at afterwards: emulation would take from the app what is measured.
            while b"ready" not in window.raw:
                time.sleep(0.02)
            time.sleep(0.3)
            if number:  # the first one compiles bytecode and converts the guide
                painted.append(when(window, lambda text: "qwen2-local" in text and "commands" in text and "send" in text) - window.started)
                ready.append(when(window, lambda text: "ready" in text) - window.started)
    return {"first_paint": spread(painted), "model_ready": spread(ready)}


def keys(model: str, count: int, report: Path) -> dict[str, Any]:
    chance = random.Random(0)
    waits, typed, pressed = [], "", []
    with part("endless", model, 7000, str(report)) as window:
        _ask(window)
        for _ in range(count):
            time.sleep(chance.uniform(0.05, 0.15))
            typed += chance.choice(string.ascii_lowercase)
            pressed.append(time.monotonic())
            window.type(typed[-1])
        window.wait_for(typed)
        assert not report.exists(), "the reply was over before all keys were pressed"
        shown = list(frames(window, pressed[0]))
    for number, moment in enumerate(pressed, 1):
        waits.append(next(came for came, text in shown if came >= moment and typed[:number] in text) - moment)
    waits.sort()
    return {"key": spread(waits), "key_p95": round(waits[int(len(waits) * 0.95)], 4)}


def cpu(tokens: int, last: int, folder: Path) -> dict[str, Any]:
    write_real_tokenizer(folder / "tokenizer")
    found: dict[str, float] = {}
    for kind in KINDS:
        report = folder / f"{kind}.json"
        with part("steady", kind, tokens, 30, last, str(report), str(folder / "tokenizer" / "tokenizer.json")) as window:
            _ask(window)
            window.wait_until(report.exists, "the reply came not to its end", timeout=tokens / 100 + last / 20)
        found[kind] = round(json.loads(report.read_text())["cpu"], 4)
        print(f"cpu       {kind:<6} {found[kind]:.1%} of a core", flush=True)
    return {"cpu": found}


def decode(model: str, runs: int, tokens: int, folder: Path) -> dict[str, Any]:
    inside, outside = [], []
    for number in range(2 * runs):
        report = folder / f"decode{number}.json"
        if number % 2:
            with part("alone", model, tokens, str(report)) as window:
                window.end(300)
        else:
            with part("endless", model, tokens, str(report)) as window:
                _ask(window)
                window.wait_until(report.exists, "no reply", timeout=300)
        (outside if number % 2 else inside).append(json.loads(report.read_text())["tokens_per_s"])
    ratio = sorted(one / other for one, other in zip(inside, outside, strict=True))[runs // 2]
    return {"inside": spread(inside, 1), "outside": spread(outside, 1), "ratio": round(ratio, 4)}


def long(messages: int, pages: int) -> dict[str, Any]:
    fill(messages)
    scrolls = []
    with program("app", "guide") as window:
        window.wait_for("ready", timeout=60)
        window.type(ctrl("f"))
        window.type("zanzi")
        window.wait_until(lambda: "Zanzibar" in window.text and QUESTION not in window.text, "not found")
        pressed = time.monotonic()
        window.type(ENTER)
        window.wait_for("the very last")
        opened = when(window, lambda text: "the very last" in text, pressed) - pressed
        window.wait_until_still()
        window.type("\t")
        window.wait_until_still()
        for _ in range(pages):
            pressed = time.monotonic()
            window.type(_PAGE_UP)
            window.wait_until(lambda: window.came[-1][0] > pressed, "nothing moved")  # noqa: B023
            scrolls.append(next(moment for moment, _ in window.came if moment > pressed) - pressed)
            window.wait_until_still(0.05)
    return {"opened": round(opened, 3), "page_up": spread(scrolls)}


def _ask(window: Terminal) -> None:
    window.wait_for("ready", timeout=60)
    window.type(QUESTION)
    window.wait_for(QUESTION)
    window.type(ENTER)
    window.wait_for("tok/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    parser.add_argument("--model", default="guide", help="of keys and decode: a name, or a path")
    parser.add_argument("--only", default="first_paint,keys,cpu,decode,long")
    options = parser.parse_args()
    quick, runs = options.quick, 2 if options.quick else options.runs
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["QWEN2_LOCAL_HOME"] = str(folder / "home")
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        measures: dict[str, Callable[[], dict[str, Any]]] = {
            "first_paint": lambda: first_paint(runs),
            "keys": lambda: keys(options.model, 10 if quick else 50, folder / "keys.json"),
            "cpu": lambda: cpu(400 if quick else 4000, 150 if quick else 600, folder),
            "decode": lambda: decode(options.model, 1 if quick else runs, 500 if quick else 3000, folder),
            "long": lambda: long(100 if quick else 2000, 5 if quick else 30),
        }
        for one in options.only.split(","):
            results[one] = measures[one]()
            print(f"{one:<12} {results[one]}", flush=True)
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    print(json.dumps({"cores": cores, "model": options.model, "runs": runs, **results}))


if __name__ == "__main__":
    main()

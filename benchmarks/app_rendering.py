"""What the conversation costs while a reply streams, and how fast long ones open and scroll. `python benchmarks/app_rendering.py`: 3 minutes.

An app that shows the transcript alone runs on a pseudo-terminal of 100 x 40, whose output is read and thrown away. A reply of 4,000 tokens is
fed as it is at 30 tokens per second, three tokens ten times a second; the clock runs `--faster` times as fast (4; 1 is the real pace), as
waiting costs nothing. "share" is the CPU time of the whole process in percent of one core at the real pace, drawing and terminal included.
"open" and "page" (the page above) are milliseconds until the terminal has them, where the screen waits up to 17 for its next frame;
"open_cpu" and "page_cpu" what of that the process computed, which does not depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import json
import os
import pty
import random
import struct
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common import spread
from textual.app import App, ComposeResult

from qwen2_tui.widgets.transcript import Transcript, Turn

TOKENS, PER_SECOND, FLUSHES, CHARACTERS = 4000, 30, 10, 4  # characters of a token, about
WORDS = ["river", "the", "of", "and", "mountain", "flows", "**great**", "into", "a", "plain", "where", "`water`", "is", "used", "*rice*", "season,"]


def prose(chance: random.Random) -> Iterator[str]:
    while True:
        yield " ".join(chance.choices(WORDS, k=chance.randint(40, 120))) + ".\n\n"


def code(chance: random.Random) -> Iterator[str]:
    yield "```python\n"
    while True:
        name = chance.choice(WORDS).strip("*`,")
        yield f'    def {name}_{chance.randint(1, 99)}(self, value: int = {chance.randint(1, 9)}) -> str:\n        """Say it."""\n'
        yield f'        return f"{{value}} {name}" if value > self.{name} else None  # {" ".join(chance.choices(WORDS, k=3))}\n\n'


def items(chance: random.Random) -> Iterator[str]:
    number = 0
    while True:
        number += 1
        yield f"{number}. **{chance.choice(WORDS)}**: {' '.join(chance.choices(WORDS, k=12))}\n"
        for _ in range(chance.randint(0, 3)):
            yield f"   - {' '.join(chance.choices(WORDS, k=8))}\n"


def table(chance: random.Random) -> Iterator[str]:
    yield "| River | Length | Notes |\n|:--|--:|---|\n"
    while True:
        yield f"| {chance.choice(WORDS)} | {chance.randint(100, 9999)} km | {' '.join(chance.choices(WORDS, k=6))} |\n"


KINDS: dict[str, Callable[[random.Random], Iterator[str]]] = {"prose": prose, "code": code, "list": items, "table": table}


def text(kind: str, size: int) -> str:
    made, length = [], 0
    for piece in KINDS[kind](random.Random(1)):
        made.append(piece)
        length += len(piece)
        if length >= size:
            return "".join(made)[:size]
    raise AssertionError


def chat(messages: int) -> list[Turn]:
    kinds = [text(kind, 1500) for kind in KINDS]
    return [
        Turn(number, "assistant", "qwen2", kinds[number // 2 % 4]) if number % 2 else Turn(number, "user", "you", "Which rivers cross Laos?")
        for number in range(messages)
    ]


HOSTILE = {
    "prose": lambda: text("prose", 1_000_000),
    "fence never closed": lambda: text("code", 1_000_000),
    "one line": lambda: "x" * 1_000_000,
    "brackets": lambda: "[" * 1_000_000,
    "quotes": lambda: ">" * 1_000_000,
    "stars": lambda: "*a_ " * 250_000,
    "nested list": lambda: "\n".join("  " * (number % 200) + "- item" for number in range(4000)),
    "wide table": lambda: "|a" * 300_000 + "\n" + "|-" * 300_000,
    "Chinese": lambda: "河流经过老挝，灌溉平原。" * 30_000,
}


class Shown(App[None]):
    """The transcript, and nothing else."""

    def __init__(self, work: Callable[[Shown], Any]) -> None:
        super().__init__()
        self.work = work
        self.told: Any = None

    def compose(self) -> ComposeResult:
        yield Transcript()

    async def on_mount(self) -> None:
        self.run_worker(self._measure())

    async def _measure(self) -> None:
        await asyncio.sleep(0.3)
        self.told = await self.work(self)
        self.exit()

    async def painted(self) -> None:
        """Comes back once what was changed has been written to the terminal."""
        done = asyncio.Event()
        self.screen.call_after_refresh(done.set)
        await done.wait()


def streaming(kind: str, tokens: int, faster: float) -> Callable[[Shown], Any]:
    async def work(app: Shown) -> dict[str, Any]:
        transcript = app.query_one(Transcript)
        whole = text(kind, tokens * CHARACTERS)
        step = PER_SECOND // FLUSHES * CHARACTERS
        transcript.begin_stream(Turn(1, "assistant", "qwen2", ""))
        late, worst = 0, 0.0
        used, due = time.process_time(), time.monotonic()
        for at in range(0, len(whole), step):
            began = time.perf_counter()
            transcript.feed(whole[at : at + step])
            worst = max(worst, time.perf_counter() - began)
            due += 1 / FLUSHES / faster
            late += due < time.monotonic()
            await asyncio.sleep(max(0.0, due - time.monotonic()))
        transcript.end_stream(Turn(1, "assistant", "qwen2", whole))
        await app.painted()
        used = time.process_time() - used
        share = 100 * used / (tokens / PER_SECOND)
        return {"share": round(share, 2), "cpu_s": round(used, 2), "slowest_feed_ms": round(worst * 1e3, 1), "late": late}

    return work


def opening(turns: Callable[[], list[Turn]], pages: int) -> Callable[[Shown], Any]:
    async def work(app: Shown) -> dict[str, Any]:
        transcript = app.query_one(Transcript)
        shown = turns()
        began, used = time.perf_counter(), time.process_time()
        transcript.show(shown)
        await app.painted()
        told: dict[str, Any] = {"open": _ms(time.perf_counter() - began), "open_cpu": _ms(time.process_time() - used)}
        taken, computed = [], []
        for _ in range(pages):
            began, used = time.perf_counter(), time.process_time()
            transcript.action_page_up()
            await app.painted()
            taken.append(_ms(time.perf_counter() - began))
            computed.append(_ms(time.process_time() - used))
        return told | {"page": spread(taken, 1), "page_cpu": spread(computed, 1)}

    return work


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 1)


def on_terminal(work: Callable[[Shown], Any]) -> Any:
    """Runs the app in a child of its own, on a terminal that someone reads."""
    reading, writing = os.pipe()
    child, terminal = pty.fork()
    if child == 0:
        os.environ |= {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        app = Shown(work)
        app.run()
        os.write(writing, json.dumps(app.told).encode())
        os._exit(0)
    os.close(writing)
    told = bytearray()
    reader = threading.Thread(target=lambda: told.extend(Path(f"/dev/fd/{reading}").read_bytes()))
    reader.start()
    while True:
        try:
            if not os.read(terminal, 1 << 16):
                break
        except OSError:
            break
    os.waitpid(child, 0)
    reader.join()
    return json.loads(told)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faster", type=float, default=4.0, help="how many times as fast as 30 tokens per second")
    parser.add_argument("--quick", action="store_true", help="a tenth of it")
    options = parser.parse_args()
    tokens, messages = (TOKENS // 10, 200) if options.quick else (TOKENS, 2000)
    told: dict[str, Any] = {}
    for kind in KINDS:
        told[kind] = on_terminal(streaming(kind, tokens, options.faster))
        print(f"{kind:20} {told[kind]['share']:5.1f} % of a core at {PER_SECOND} tokens per second", file=sys.stderr)
    told[f"{messages} messages"] = on_terminal(opening(lambda: chat(messages), 100))
    for kind, made in HOSTILE.items():
        told[f"1 MB: {kind}"] = on_terminal(opening(lambda made=made: [Turn(1, "assistant", "qwen2", made())], 20))  # type: ignore[misc]
    for name, figures in told.items():
        if "open" in figures:
            print(
                f"{name:28} open {figures['open']:6.1f} ms (CPU {figures['open_cpu']}), a page {figures['page']} ({figures['page_cpu']})",
                file=sys.stderr,
            )
    print(json.dumps(told))


if __name__ == "__main__":
    main()

"""A day in small: many short requests of all kinds, from several threads, with cancels, errors and reloads; and what is left behind."""

from __future__ import annotations

import ctypes
import gc
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from qwen2_local import Message, Qwen2, kvcache, paths
from qwen2_local.chats import ChatStore
from qwen2_local.errors import BackendError, ContextOverflow, Qwen2LocalError

SUBJECTS = ("GGUF", "MLX", "the KV cache", "quantization", "a tokenizer", "YaRN", "the 7B", "LoRA", "a seed", "GPTQ")
KINDS = {
    "ask": 50, "sampled": 12, "cancel": 8, "forget": 4, "close at once": 3, "too long": 4, "bad option": 4, "choice": 3, "schema": 2, "score": 3,
    "map": 2, "chat": 3, "draft": 2,
}  # fmt: skip
"""How often each is asked for, of a hundred."""


@dataclass(frozen=True)
class Footing:
    """What a process holds. memory: bytes that are in memory. strangers: files in the data folder and the system's temporary one that are no
    stored KV."""

    memory: int
    threads: tuple[str, ...]
    files: int
    children: int
    strangers: frozenset[str]

    @classmethod
    def now(cls) -> Footing:
        """With no model loaded."""
        gc.collect()
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # free memory that glibc keeps for later is no leak
        at_rest(lambda: not any(thread.name.startswith("qwen2-local engine") for thread in threading.enumerate()))
        tasks, handles = Path("/proc/self/task"), Path("/proc/self/fd")
        return cls(
            int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
            tuple(sorted((task / "comm").read_text().strip() for task in tasks.iterdir())),
            len(list(handles.iterdir())),
            sum(len((task / "children").read_text().split()) for task in tasks.iterdir()),
            frozenset(_strangers()),
        )


def can_look() -> bool:
    """Does this system say what a process holds?"""
    return sys.platform == "linux" and Path(f"/proc/self/task/{os.getpid()}/children").exists()


def at_rest(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Wait until it holds, but not for ever."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def _strangers() -> Iterator[str]:
    chunks = {name.rpartition("/")[2] for name in kvcache.Disk(paths.kv(), None).names()}
    for path in paths.home().rglob("*"):
        if path.is_file() and path.name not in chunks:
            yield str(path.relative_to(paths.home()))
    for path in Path(tempfile.gettempdir()).glob("qwen2-local-*"):
        yield str(path)


class Day:
    """Requests to the guide. done: how many of each kind."""

    def __init__(self, seed: int = 0, *, context: int = 2048) -> None:
        self.chance = random.Random(seed)
        self.context = context
        self.done: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._expected: dict[str, str] = {}

    def session(self, requests: int, *, worker: bool = False, kill: bool = False, concurrency: int = 4) -> None:
        """Load, answer so many (each kind at least once), unload. kill: the worker dies once in the middle of a reply."""
        kinds = [*KINDS, *self.chance.choices(list(KINDS), list(KINDS.values()), k=max(0, requests - len(KINDS)))]
        self.chance.shuffle(kinds)
        seeds = [self.chance.randrange(2**32) for _ in kinds]
        with Qwen2("guide", backend="llama.cpp", context=self.context, worker=worker) as model:
            with ThreadPoolExecutor(concurrency) as threads:
                for _ in threads.map(lambda kind, seed: self._one(model, kind, random.Random(seed)), kinds, seeds):
                    pass
            if kill:
                self._kill(model)
            if not worker:
                self._settled(model)
        self.done["load"] += 1

    def _one(self, model: Qwen2, kind: str, chance: random.Random) -> None:
        try:
            getattr(self, "_" + kind.replace(" ", "_"))(model, chance)
        except Exception as error:
            self.wrong.append(f"{kind}: {type(error).__name__}: {error}")
        self.done[kind] += 1

    def _ask(self, model: Qwen2, chance: random.Random) -> None:
        """Always the same answer to the same question."""
        question = f"What is {chance.choice(SUBJECTS)}?"
        reply = model.ask(question, max_tokens=8, temperature=0.0)
        if self._expected.setdefault(question, reply) != reply:
            self.wrong.append(f"{question} {self._expected[question]!r} then {reply!r}")

    def _sampled(self, model: Qwen2, chance: random.Random) -> None:
        model.ask(f"Tell me about {chance.choice(SUBJECTS)}, {chance.random()}.", temperature=0.9, max_tokens=chance.randint(1, 12), stop=["."])

    def _cancel(self, model: Qwen2, chance: random.Random) -> None:
        with model.stream("What is GGUF? " * chance.randint(1, 30), max_tokens=200) as stream:
            for _ in range(chance.randint(1, 6)):
                next(stream, None)

    def _forget(self, model: Qwen2, chance: random.Random) -> None:
        """A stream that nobody reads to its end."""
        next(model.stream(f"What is {chance.choice(SUBJECTS)}?", max_tokens=200))

    def _close_at_once(self, model: Qwen2, chance: random.Random) -> None:
        model.stream("What is GGUF? " * chance.randint(1, 60)).close()

    def _too_long(self, model: Qwen2, chance: random.Random) -> None:
        self._refused(ContextOverflow, lambda: model.ask("word " * (3 * self.context)))

    def _bad_option(self, model: Qwen2, chance: random.Random) -> None:
        options = chance.choice([{"temperature": -1.0}, {"max_tokens": 0}, {"top_p": 2.0}, {"stop": [""]}, {"regex": "("}, {"logprobs": 1000}])
        self._refused(Qwen2LocalError, lambda: model.ask("What is GGUF?", **options))

    def _choice(self, model: Qwen2, chance: random.Random) -> None:
        reply = model.ask("Yes or no?", choice=["yes", "no"])
        if reply not in ("yes", "no"):
            self.wrong.append(f"choice: {reply!r}")

    def _schema(self, model: Qwen2, chance: random.Random) -> None:
        value = model.ask("How many?", schema={"type": "integer", "minimum": 0, "maximum": 99}, max_tokens=8)
        if not 0 <= value <= 99:
            self.wrong.append(f"schema: {value!r}")

    def _score(self, model: Qwen2, chance: random.Random) -> None:
        model.score(f"{chance.choice(SUBJECTS)} is a thing.")

    def _map(self, model: Qwen2, chance: random.Random) -> None:
        model.map([f"What is {subject}?" for subject in SUBJECTS[:3]], concurrency=3, progress=False, max_tokens=4)

    def _chat(self, model: Qwen2, chance: random.Random) -> None:
        """Saved, gone on with, deleted."""
        chat = model.chat()
        chat.send(f"What is {chance.choice(SUBJECTS)}?", max_tokens=4)
        chat.save()
        chat.send("And now?", max_tokens=4)
        chat.delete()

    def _draft(self, model: Qwen2, chance: random.Random) -> None:
        model.respond([Message("user", "Repeat: one two three one two three one two three")], lookup=True, max_tokens=12).finish()

    def _refused(self, kind: type[Qwen2LocalError], call: Callable[[], object]) -> None:
        try:
            call()
        except kind:
            return
        self.wrong.append(f"no {kind.__name__}")

    def _kill(self, model: Qwen2) -> None:
        """A worker's death is an error of that reply, and the next one has another worker."""
        pid = model._engine.pid  # type: ignore[attr-defined]
        stream = model.stream("What is GGUF? " * 60, max_tokens=400)
        os.kill(pid, signal.SIGKILL)
        self._refused(BackendError, lambda: stream.finish())
        self._ask(model, self.chance)
        self.done["kill"] += 1

    def _settled(self, model: Qwen2) -> None:
        """Every sequence on the device is one that is kept for later."""
        scheduler = model._engine._scheduler  # type: ignore[attr-defined]
        if not at_rest(lambda: not scheduler.busy and scheduler.device.held == len(scheduler._prefixes._residents)):
            self.wrong.append(f"{scheduler.device.held} sequences are held, {len(scheduler._prefixes._residents)} are kept")

    def chats_left(self) -> int:
        """How many are stored."""
        with ChatStore.open() as store:
            return len(store.summaries())

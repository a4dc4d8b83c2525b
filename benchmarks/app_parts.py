"""What `app.py` runs in its windows: the app with a model that writes at a set speed, and with a real one writing without an end."""

from __future__ import annotations

import inspect
import json
import pydoc_data.topics
import re
import sys
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path

from qwen2_local.chat import Chat
from qwen2_local.chats import ChatMessage, ChatRecord, ChatStore
from qwen2_local.tokens import Tokenizer
from qwen2_local.types import Completion
from tests.tui.endless import Endless

KINDS = ("prose", "code", "list", "table")
QUESTION = "Go on and on."


def sentences() -> Iterator[str]:
    """English with some emphasis and code in it, for ever."""
    text = "\n\n".join(pydoc_data.topics.topics[name] for name in ("objects", "execmodel", "naming", "calls", "numeric-types"))
    words = re.sub(r"\s+", " ", text.replace("*", "").replace('"', "`"))
    for number, sentence in enumerate(cycle(re.findall(r"[A-Z][^.]{30,200}\.", words))):
        first, _, rest = sentence.partition(" ")
        yield f"**{first}** {rest}" if number % 5 == 0 else sentence


def text(kind: str, tokens: int, tokenizer: Tokenizer) -> list[int]:
    """The ids of a Markdown reply of so many tokens, all of one kind: prose, one code block, one list, or one table."""
    from argparse import ArgumentParser

    said = sentences()
    known: dict[str, Callable[[int], str]] = {
        "prose": lambda number: " ".join(next(said) for _ in range(4)) + "\n\n",
        "code": lambda number: "```python\n" * (number == 0) + inspect.getsource(sys.modules[ArgumentParser.__module__]),
        "list": lambda number: ("  " if number % 4 == 3 else "") + f"- {next(said)}\n",
        "table": lambda number: "| place | what is said of it | of |\n|---|---|---:|\n" * (number == 0) + f"| {number} | {next(said)[:60]} | 7 |\n",
    }
    parts: list[str] = []
    count = 0
    while count < tokens:
        parts.append(known[kind](len(parts)))
        count += len(tokenizer.encode(parts[-1]))
    return tokenizer.encode("".join(parts))[:tokens]


def steady(kind: str, tokens: int, per_s: float, last: int, report: str, tokenizer: str) -> None:
    """The app, whose model writes `tokens` tokens: the last `last` at `per_s`, those before faster. Says in `report` what the last cost."""
    from tests.tui.pilot import make_app
    from tests.tui.scripted import Say, ScriptedModel

    qwen2 = Tokenizer.from_json(Path(tokenizer))
    model = ScriptedModel(Say(text(kind, tokens, qwen2)), longest=32768, tokenizer=qwen2)
    settled = tokens - last + round(2 * per_s)
    marks: dict[int, tuple[float, float]] = {}
    begun = [0.0]

    def before(number: int) -> None:
        if number < tokens - last:
            time.sleep(1 / 500)
            begun[0] = time.perf_counter()
            return
        time.sleep(max(0.0, begun[0] + (number - tokens + last) / per_s - time.perf_counter()))
        if number in (settled, tokens - 1):
            marks[number] = (time.perf_counter(), time.process_time())
        if number == tokens - 1:
            (began, used), (ended, at_end) = marks[settled], marks[number]
            _write(report, {"seconds": ended - began, "cpu": (at_end - used) / (ended - began)})

    model.before = before
    make_app(model=model).hold()


def endless(model: str, tokens: int, report: str) -> None:
    """The app with a real model in a worker, whose replies have so many tokens; `report` gets the speed of each."""
    from qwen2_tui.app import Opening, QwenApp
    from qwen2_tui.model import load

    QwenApp(loader=lambda wish, told: Endless(load(wish, told), tokens, _speed(report)), opening=Opening(model)).hold()


def alone(model: str, tokens: int, report: str) -> None:
    """The same reply from the API, without an app."""
    from qwen2_local import Qwen2

    with Qwen2(model, worker=True) as loaded:
        Chat(Endless(loaded, tokens, _speed(report))).send(QUESTION)


def _speed(report: str) -> Callable[[Completion], None]:
    return lambda done: _write(report, {"tokens": done.usage.completion_tokens, "tokens_per_s": done.usage.decode_tokens_per_s})


def fill(messages: int) -> int:
    """A chat of so many messages in this home's store, Markdown of all kinds, named "Zanzibar"; its number. The last one says "the very last"."""
    said = sentences()
    kinds: list[Callable[[], str]] = [
        lambda: " ".join(next(said) for _ in range(3)),
        lambda: "\n".join(f"- {next(said)}" for _ in range(6)),
        lambda: "Like this:\n\n```python\n" + inspect.getsource(text) + "```\n",
        lambda: "| a | b |\n|---|---|\n" + "".join(f"| {number} | {next(said)[:40]} |\n" for number in range(8)),
    ]
    turns = []
    for number in range(messages):
        last = number == messages - 1
        words = "the very last" if last else next(said) if number % 2 == 0 else kinds[number // 2 % len(kinds)]()
        turns.append(ChatMessage("user" if number % 2 == 0 else "assistant", words, id=number + 1, parent=number or None, created=1.0 + number))
    with ChatStore.open() as store:
        return store.insert(ChatRecord("Zanzibar", True, False, 1.0, 2.0, messages, tuple(turns)))[0]


def _write(report: str, value: dict[str, float]) -> None:
    """Whole or not at all: somebody waits for it."""
    path = Path(report)
    path.with_suffix(".new").write_text(json.dumps(value))
    path.with_suffix(".new").replace(path)

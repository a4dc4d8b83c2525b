"""Examine the guide: `python training/exam.py [--backend mlx] [--model guide:q4_0]`, in the project's own environment (no torch).

Five parts, all answered by the program itself, greedily, as a user would get it:
- readings: single readings of the guide's patterns, which training never saw, though it saw their other readings (`corpus.single_readings`);
- entries: phrasings held out whole, with all that could read the same (`corpus.entries`): terser, and harder;
- blind: 100 questions written by somebody who had not seen the training phrasings (`exam/blind.toml`);
- repeat: texts to repeat to the letter, words, sentences, numbers, nonsense;
- recall: a name or number told at the start of a conversation of 1k, 4k and 8k tokens, and asked for at its end.

A held-out reply is right if each fact of its question is in it intact, and no other question's answer is nearer to it. A blind one is right
if it holds every string of its `must`. The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # for the tests, which import this file

import corpus

from qwen2_local import Message, Qwen2

HERE = Path(__file__).parent


def holds(reply: str, fact: str) -> bool:
    """Is the fact in the reply, intact? "4.6 GB" is not in "14.6 GB", nor "--top" in "--top-p"."""
    start = r"(?<![\w.])" if fact[:1].isascii() and fact[:1].isalnum() else ""
    end = r"(?![\w])(?!\.\d)" if fact[-1:].isascii() and fact[-1:].isalnum() else ""
    return re.search(start + re.escape(fact) + end, reply, re.ASCII) is not None


def nearest(reply: str, language: str, questions: list[corpus.Question]) -> str:
    """The answer most like the reply."""
    answers = {question.answer[language] for question in questions}
    return reply if reply in answers else max(answers, key=lambda answer: difflib.SequenceMatcher(None, answer, reply, autojunk=False).ratio())


def held_out(model: Qwen2, data: corpus.Corpus, items: list[corpus.Item], most: int | None = None) -> tuple[int, int]:
    """How many are right, of how many. most: take so many of them, spread evenly."""
    items = items[:: max(1, len(items) // most)] if most else items
    right = 0
    for question, language, ask in items:
        reply = model.ask(ask, max_tokens=200).strip()
        ok = all(holds(reply, fact) for fact in question.facts[language]) and nearest(reply, language, data.questions) == question.answer[language]
        right += ok
        if not ok:
            print(f"held out   {question.id:28} {ask!r} -> {reply!r}")
    return right, len(items)


def blind(model: Qwen2) -> tuple[int, int]:
    """How many are right, of how many."""
    items = tomllib.loads((HERE / "exam/blind.toml").read_text(encoding="utf-8"))["item"]
    right = 0
    for item in items:
        history: list[Message] = []
        for turn in item.get("turns", [item.get("ask")]):
            history.append(Message("user", turn))
            reply = model.respond(history, max_tokens=200).finish().text.strip()
            history.append(Message("assistant", reply))
        ok = all(holds(reply, fact) for fact in item["must"])
        right += ok
        if not ok:
            print(f"blind      {item['topic']:28} {history[-2].content!r} -> {reply!r}")
    return right, len(items)


def recall(model: Qwen2, data: corpus.Corpus, tokens: int, count: int) -> tuple[int, int]:
    """Conversations of about `tokens` tokens whose first turn tells a value and whose last asks for it."""
    sampler = corpus.Sampler(data, 1_000_000 + tokens)
    right = 0
    for _ in range(count):
        while True:
            # The tokenizer's own count would do; this is near enough, and independent of it.
            _, turns = sampler.long(tokens, lambda turn: sum(len(text.encode()) for text in turn) // 3 + 10)
            if turns[-1][1] not in {unknown for table in data.unknown_recalls.values() for unknown in table.values()} and len(turns) > 1:
                break
        history: list[Message] = []
        for user, reply in turns:
            history += [Message("user", user), Message("assistant", reply)]
        right += model.respond(history[:-1], max_tokens=60).finish().text.strip() == turns[-1][1]
    return right, count


def repeat(model: Qwen2, data: corpus.Corpus, count: int) -> tuple[int, int]:
    """How many texts are repeated to the letter, of how many."""
    sampler = corpus.Sampler(data, 2_000_000)
    turns = [sampler.repetition(language) for _ in range(count // 2) for language in corpus.LANGUAGES]
    return sum(model.ask(user, max_tokens=200).strip() == reply.strip() for user, reply in turns), len(turns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="guide")
    parser.add_argument("--backend")
    parser.add_argument("--seed", type=int, default=0, help="the training's seed: it decides what was held out")
    parser.add_argument("--recall", type=int, default=20, help="conversations at each length")
    options = parser.parse_args()
    data = corpus.load(options.seed)
    report: dict[str, Any] = {"model": options.model}
    with Qwen2(options.model, backend=options.backend) as model:
        report["backend"] = model.info.name
        readings, entries = (held_out(model, data, list(items(data))) for items in (corpus.single_readings, corpus.entries))
        parts = {"readings": readings, "entries": entries, "blind": blind(model), "repeat": repeat(model, data, 100)}
        for name, (right, count) in parts.items():
            report[name] = {"right": right, "of": count, "share": round(right / count, 4)}
        for tokens in (1000, 4000, 7700):
            if options.recall:
                right, count = recall(model, data, tokens, options.recall)
                report[f"recall_{tokens}"] = {"right": right, "of": count, "share": round(right / count, 4)}
    print(json.dumps(report))


if __name__ == "__main__":
    main()

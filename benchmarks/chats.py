"""How long it takes to open, append to, search and delete chats, against how many there are. `python benchmarks/chats.py`: half a minute."""

from __future__ import annotations

import json
import random
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from qwen2_local.chats import ChatMessage, ChatRecord, ChatStore

LATIN = [
    f"{a}{b}{c}"
    for a in ("ka", "lo", "mi", "te", "ru", "sen", "pol")
    for b in ("ra", "ni", "do", "ve", "mu", "")
    for c in ("n", "s", "tion", "r", "")
]
CHINESE = re.findall("..", "数据模型量化转换磁盘缓存问题回答中国河流老挝税务信件学习机器语言什么天空蓝色为啥聊天删除")


def text(chance: random.Random, size: int) -> str:
    if chance.random() < 0.3:
        return "".join(chance.choices(CHINESE, k=size))
    return " ".join(chance.choices(LATIN, k=size))


def chat(chance: random.Random, messages: int) -> ChatRecord:
    made = []
    for number in range(1, messages + 1):
        reply = number % 2 == 0
        words = text(chance, 90 if reply else 15)
        made.append(ChatMessage("assistant" if reply else "user", words, number, number - 1 or None, tokens=tuple(range(120)) if reply else ()))
    return ChatRecord(f"chat {chance.random()}", False, False, 0.0, chance.random() * 1e9, messages, tuple(made))


def ms(work: Callable[[], object], times: int = 9) -> float:
    """The shortest, in milliseconds: others may use the machine, too."""
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return round(min(taken) * 1e3, 2)


def appending(store: ChatStore, number: int) -> float:
    tip = store.record(number).tip

    def append() -> None:
        nonlocal tip
        tip = store.add(number, ChatMessage("user", "a short question, as they are", parent=tip))

    return ms(append, 50)


def main() -> None:
    chance = random.Random(1)
    told: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        with ChatStore.open(Path(folder) / "chats.db") as store:
            for size in (20, 200, 2000):
                number, _ = store.insert(chat(chance, size))
                told[f"open_{size}_messages_ms"] = ms(lambda number=number: store.record(number))
                told[f"append_at_{size}_ms"] = appending(store, number)
        with ChatStore.open(Path(folder) / "many.db") as store:
            for chats in (10, 100, 1000):
                store.insert_all(chat(chance, 20) for _ in range(chats - len(store.summaries())))
                told[f"search_{chats}_chats_ms"] = {
                    word: ms(lambda word=word: store.search(word)) for word in ("karan", "ka", "量化", "量", "karan loration 量化", "nothing")
                }
                told[f"list_{chats}_chats_ms"] = ms(store.summaries)
                told[f"append_among_{chats}_ms"] = appending(store, store.summaries()[-1].id)
                told[f"delete_of_{chats}_ms"] = ms(lambda: store.delete([store.summaries()[0].id], forget=lambda names: None), 3)
            told["file_mb_1000"] = round((Path(folder) / "many.db").stat().st_size / 1e6, 1)
        told["start_ms"] = ms(lambda: ChatStore.open(Path(folder) / "many.db").close())
    print(json.dumps(told, ensure_ascii=False))


if __name__ == "__main__":
    main()

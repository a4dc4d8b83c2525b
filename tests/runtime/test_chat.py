"""Conversations with the guide: every turn computes only what is new, also after an edit, on a branch, and in another process."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen2_local import Qwen2, backends
from qwen2_local.chat import Chat
from qwen2_local.chats import ChatStore
from qwen2_local.kvcache import CHUNK
from tests.support.program import run

SYSTEM = "You answer questions about this program. " * 40
"""Long enough for several chunks."""
FEW = 8


@pytest.fixture(scope="module", params=["llama.cpp", "mlx"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param not in backends.available():
        pytest.skip(f"{request.param} is not installed here")
    return str(request.param)


@pytest.fixture(scope="module")
def guide(backend: str) -> Iterator[Qwen2]:
    with Qwen2("guide", backend=backend) as model:
        yield model


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ChatStore]:
    with ChatStore.open(tmp_path / "chats.db") as store:
        yield store


def test_a_turn_computes_only_what_is_new(guide: Qwen2, store: ChatStore) -> None:
    chat = Chat(guide, system=SYSTEM, store=store)
    first = chat.send("What is GGUF?", temperature=0, max_tokens=FEW)
    second = chat.send("And MLX?", temperature=0, max_tokens=FEW)
    # All of the first prompt, and the reply but for its last token, which no step has read.
    known = first.usage.prompt_tokens + first.usage.completion_tokens - 1
    assert second.usage.cached_tokens >= known
    assert second.usage.prompt_tokens - second.usage.cached_tokens < 30


def test_an_edited_turn_computes_what_comes_after_the_edit(guide: Qwen2, store: ChatStore) -> None:
    chat = Chat(guide, system=SYSTEM, store=store)
    chat.send("What is GGUF?", temperature=0, max_tokens=FEW)
    chat.send("And MLX?", temperature=0, max_tokens=FEW)
    edited = chat.edit(3, "What is a token?", temperature=0, max_tokens=FEW)
    assert edited.usage.prompt_tokens - edited.usage.cached_tokens < 30
    branch = chat.edit(1, "What is Qwen2?", temperature=0, max_tokens=FEW)
    assert branch.usage.prompt_tokens - branch.usage.cached_tokens < 30


def test_another_reply_computes_next_to_nothing(guide: Qwen2, store: ChatStore) -> None:
    chat = Chat(guide, system=SYSTEM, store=store)
    first = chat.send("What is GGUF?", seed=1, temperature=1.0, max_tokens=FEW)
    again = chat.regenerate(seed=1, temperature=1.0, max_tokens=FEW)
    assert again.usage.prompt_tokens - again.usage.cached_tokens <= 1
    assert (again.text, len(chat.branches(-1))) == (first.text, 2)


def test_going_on_with_a_cut_reply_gives_the_whole_one(guide: Qwen2) -> None:
    whole = Chat(guide).send("What is GGUF?", temperature=0, repetition_penalty=1.0).text
    chat = Chat(guide)
    cut = chat.send("What is GGUF?", temperature=0, repetition_penalty=1.0, max_tokens=4)
    assert cut.finish_reason == "length"
    rest = chat.continue_reply(temperature=0, repetition_penalty=1.0)
    assert cut.text + rest.text == whole == chat.messages[-1].text


def test_a_stopped_reply_is_kept_and_the_chat_goes_on(guide: Qwen2, store: ChatStore) -> None:
    chat = Chat(guide, store=store)
    reply = chat.stream("What is GGUF?", temperature=5.0, seed=1)
    begun = "".join(next(reply).text for _ in range(3))
    reply.close()
    assert (chat.messages[-1].text, chat.messages[-1].state) == (begun, "partial") or begun == ""
    done = chat.send("And MLX?", temperature=0, max_tokens=FEW)
    assert done.usage.cached_tokens > 0


def test_async_chats(guide: Qwen2) -> None:
    async def talk() -> list[str]:
        chats = [Chat(guide) for _ in range(3)]
        return [done.text for done in await asyncio.gather(*(chat.asend("What is GGUF?", temperature=0, max_tokens=FEW) for chat in chats))]

    assert len(set(asyncio.run(talk()))) == 1


GO_ON = """
import json, os, signal, sys
from pathlib import Path
from qwen2_local import Qwen2
from qwen2_local.chat import Chat
from qwen2_local.chats import ChatStore
home, backend, what = sys.argv[1:]
with Qwen2("guide", backend=backend) as model, ChatStore.open(Path(home) / "chats.db") as store:
    if what in ("new", "killed"):
        chat = Chat(model, system="You answer questions about this program. " * (400 if what == "killed" else 40), store=store)
        progress = (lambda done, total: os.kill(os.getpid(), signal.SIGKILL) if done > 2500 else None) if what == "killed" else None
        done = chat.stream("What is GGUF?", temperature=0, max_tokens=8, progress=progress).finish()
    elif what == "stopped":
        chat = Chat(model, system="Begin.", store=store)
        reply = chat.stream("What is GGUF?", temperature=9.0)
        [next(reply) for _ in range(5)]
        reply.close()
        done = reply.completion
    else:
        chat = Chat.load(model, int(what), store)
        done = chat.send("And MLX?", temperature=0, max_tokens=8)
    usage = done.usage
    print(json.dumps({"number": chat.number, "prompt": usage.prompt_tokens, "cached": usage.cached_tokens, "new": usage.completion_tokens}))
"""


def process(home: Path, backend: str, what: object) -> subprocess.CompletedProcess[str]:
    environment = {"QWEN2_LOCAL_HOME": str(home), "PATH": ""}
    command = [sys.executable, "-c", GO_ON, str(home), backend, str(what)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def told(home: Path, backend: str, what: object) -> dict[str, int]:
    done = process(home, backend, what)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def chunks(home: Path) -> list[Path]:
    return [path for path in (home / "kv").rglob("*-*") if path.is_file()]


def test_a_chat_reopened_in_another_process_reads_only_what_is_new(tmp_path: Path, backend: str) -> None:
    first = told(tmp_path, backend, "new")
    assert first["prompt"] > CHUNK
    second = told(tmp_path, backend, first["number"])
    assert second["cached"] >= first["prompt"] + first["new"] - 1
    assert second["prompt"] - second["cached"] < 30
    assert chunks(tmp_path)


@pytest.mark.parametrize("what", ["new", "stopped", "killed"])
def test_deleting_a_chat_deletes_what_was_computed_of_it(tmp_path: Path, backend: str, what: str) -> None:
    if (backend, what) == ("mlx", "killed"):
        pytest.skip("the same as with llama.cpp, and a long prompt takes its time on a CPU")
    done = process(tmp_path, backend, what)
    assert (done.returncode == -signal.SIGKILL) == (what == "killed")
    assert chunks(tmp_path), "there is something to delete"
    assert run("chats", "rm", "1", "--yes", env={"QWEN2_LOCAL_HOME": tmp_path}).returncode == 0
    assert chunks(tmp_path) == []


def test_a_temporary_chat_leaves_nothing_on_disk(tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN2_LOCAL_HOME", str(tmp_path))
    with Qwen2("guide", backend=backend) as model:
        chat = model.chat(system=SYSTEM)
        chat.send("What is an xylophone?", max_tokens=FEW)
        chat.send("And MLX?", max_tokens=FEW)
        assert chat.messages[-1].usage is not None
        assert chat.messages[-1].usage.cached_tokens > 0
    assert not (tmp_path / "chats.db").exists()
    texts = [path for path in tmp_path.rglob("*") if path.is_file() and "cache" not in path.parts and b"xylophone" in path.read_bytes()]
    assert texts == []
    assert chunks(tmp_path) == []

"""The KV cache with a real model: another process reads only what is new, the command line shows whose it is, and `rm` takes it along."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen2_local import Qwen2, paths
from tests.support.program import run

LONG = "What is GGUF? " * 60


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN2_LOCAL_HOME", str(tmp_path))
    for name in ("QWEN2_LOCAL_KV", "QWEN2_LOCAL_KV_BUDGET"):
        monkeypatch.delenv(name, raising=False)


def ask(name: str) -> dict[str, object]:
    done = run("run", name, LONG, "--max-tokens", "4", "--temperature", "0", "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def stored() -> dict[str, int]:
    return {one["model"]: one["bytes"] for one in json.loads(run("cache", "--json").stdout)["models"]}


def test_a_new_process_reads_only_what_is_new() -> None:
    first, second = ask("guide"), ask("guide")
    assert first["text"] == second["text"]
    assert first["usage"]["cached_tokens"] == 0
    assert second["usage"]["cached_tokens"] >= second["usage"]["prompt_tokens"] - 1
    assert list(stored()) == ["guide"]


def test_switched_off_it_reads_all_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN2_LOCAL_KV", "off")
    assert [ask("guide")["usage"]["cached_tokens"] for _ in range(2)] == [0, 0]
    assert stored() == {}


def test_what_is_not_to_be_kept_is_not_on_the_disk() -> None:
    with Qwen2("guide", kv_cache=False) as model:
        model.ask(LONG, max_tokens=4)
    assert stored() == {}


def test_rm_takes_a_model_s_chunks_along_by_whatever_name_it_was_run() -> None:
    assert run("convert", "guide", "--to", "gguf:q8_0", "--name", "tune:q8_0").returncode == 0
    ask("guide")
    ask("tune")
    assert set(stored()) == {"guide", "tune:q8_0"}
    assert run("rm", "tune:q8_0", "--yes").returncode == 0
    assert set(stored()) == {"guide"}
    assert run("cache", "clear").returncode == 0
    assert list(paths.kv().iterdir()) == []

"""`qwen2-local cache`, and what `rm` takes along."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from qwen2_local import paths
from qwen2_local.cli import qwen2_local
from qwen2_local.errors import UsageError
from qwen2_local.kvcache import KvCache
from qwen2_local.kvcache.settings import budget, open_default
from qwen2_local.store import Store
from tests.support.installed import install
from tests.support.kv import PROMPT, known, save

TUNE, GUIDE = "ab" * 32, "cd" * 32


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN2_LOCAL_HOME", str(tmp_path))
    monkeypatch.delenv("QWEN2_LOCAL_KV", raising=False)
    monkeypatch.setenv("QWEN2_LOCAL_KV_BUDGET", "1GB")


@pytest.fixture
def filled() -> None:
    for model, fingerprint, length in (("7b:q4_0", TUNE, 600), ("guide", GUIDE, 300)):
        cache = open_default(model)
        save(cache, fingerprint, PROMPT[:length])
        cache.close()


def call(*arguments: str) -> Result:
    return CliRunner().invoke(qwen2_local, arguments, catch_exceptions=False)


def stored() -> dict[str, int]:
    return {one["model"]: one["chunks"] for one in json.loads(call("cache", "--json").stdout)["models"]}


def test_nothing_stored() -> None:
    done = call("cache")
    assert (done.exit_code, done.stdout) == (0, "")
    assert done.stderr == f"0 kB of 1.00 GB, in {paths.kv()}\n"
    assert "nothing to delete" in call("cache", "clear").stderr


def test_it_lists_models_with_what_they_keep(filled: None) -> None:
    lines = call("cache").stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [["MODEL", "CHUNKS"], ["7b:q4_0", "3"], ["guide", "2"]]
    assert all(line.endswith("just now") for line in lines[1:])
    facts = json.loads(call("cache", "list", "--json").stdout)
    files = [path for path in paths.kv().rglob("*") if path.is_file() and path.name != "about.json"]
    assert facts["bytes"] == sum(path.stat().st_size for path in files)
    assert (facts["budget"], facts["on"], facts["folder"]) == (10**9, True, str(paths.kv()))
    assert facts["bytes"] == sum(one["bytes"] for one in facts["models"])


def test_clear_deletes_all_or_one_model(filled: None) -> None:
    assert call("cache", "clear", "guide").exit_code == 0
    assert stored() == {"7b:q4_0": 3}
    freed = json.loads(call("cache", "clear", "--json").stdout)["freed"]
    assert freed > 600 * 32
    assert list(paths.kv().iterdir()) == [], "no empty folders either"


def test_rm_takes_along_what_the_model_keeps(filled: None) -> None:
    install(Store(), "7b:q4_0")
    assert call("rm", "7b:q4_0", "--yes").exit_code == 0
    assert stored() == {"guide": 2}


def test_switched_off_nothing_is_stored_but_what_is_there_is_shown(filled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN2_LOCAL_KV", "off")
    cache = open_default("7b:q4_0")
    assert known(cache, TUNE, PROMPT[:600]) == 0
    save(cache, "ef" * 32, PROMPT[:600])
    assert known(cache, "ef" * 32, PROMPT[:600]) == 600, "in memory it works on"
    cache.close()
    assert stored() == {"7b:q4_0": 3, "guide": 2}
    assert "switched off" in call("cache").stderr
    assert json.loads(call("cache", "--json").stdout)["on"] is False


@pytest.mark.parametrize(("said", "meant"), [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("0", 0), ("123", 123), ("", None), ("2TB", 2 * 10**12)])
def test_budgets_are_sizes(said: str, meant: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN2_LOCAL_KV_BUDGET", said)
    assert budget() == meant


@pytest.mark.parametrize("said", ["much", "-1", "1e9", "5 GiB", "٣GB", "9" * 20])
def test_what_is_no_size_is_refused(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN2_LOCAL_KV_BUDGET", said)
    with pytest.raises(UsageError, match="QWEN2_LOCAL_KV_BUDGET"):
        open_default()


def test_what_is_neither_on_nor_off_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN2_LOCAL_KV", "maybe")
    with pytest.raises(UsageError, match="QWEN2_LOCAL_KV"):
        open_default()


def test_a_model_s_name_that_is_damaged_or_hostile_is_shown_harmlessly(filled: None) -> None:
    for number, about in enumerate(paths.kv().glob("*/about.json")):
        about.write_bytes([b'{"model": "\\u001b[31mred"}', b"[" * 4096][number])
    done = call("cache")
    assert done.exit_code == 0
    assert "\x1b" not in done.stdout
    assert len(done.stdout.splitlines()) == 3


def test_the_default_budget_is_a_quarter_of_what_could_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QWEN2_LOCAL_KV_BUDGET")
    monkeypatch.setattr("qwen2_local.files.free_bytes", lambda _: 4_000_000)
    assert json.loads(call("cache", "--json").stdout)["budget"] == 1_000_000
    monkeypatch.setattr("qwen2_local.files.free_bytes", lambda _: 10**12)
    assert json.loads(call("cache", "--json").stdout)["budget"] == 20 * 10**9
    assert KvCache(None).sizes().disk == 0

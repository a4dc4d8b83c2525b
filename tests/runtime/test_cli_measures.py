"""`score`, `bench` and `selftest` with the built-in model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwen2_local import Qwen2, backends
from qwen2_local.cli import trials
from tests.support import tiny_checkpoint
from tests.support.program import here

TEXT = "GGUF is the file format of llama.cpp."
needs_llama = pytest.mark.skipif("llama.cpp" not in backends.available(), reason="llama.cpp is not installed here")


def test_score_says_what_the_api_says(tmp_path: Path) -> None:
    with Qwen2("guide") as model:
        score, behind = model.score(TEXT), model.loglikelihood("GGUF is", " a file.")
    done = here("score", "guide", TEXT, "--json")
    said = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (0, "")
    assert said["perplexity"] == pytest.approx(score.perplexity, rel=1e-3)
    assert [one["id"] for one in said["tokens"]] == list(score.tokens)
    assert sum(one["logprob"] for one in said["tokens"]) == pytest.approx(said["logprob"], abs=1e-3)
    (tmp_path / "text").write_text(TEXT)
    for given in (["--file", str(tmp_path / "text")], ["-"], []):
        shown = here("score", "guide", *given, stdin=TEXT)
        assert shown.stdout.split()[:2] == ["perplexity", f"{said['perplexity']:.4f}"]
    after = json.loads(here("score", "guide", " a file.", "--after", "GGUF is", "--json").stdout)
    assert after["logprob"] == pytest.approx(behind.logprob, rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "stdin", "says"),
    [
        (["a", "--file", "x"], "", "not both"),
        ([], "", "no text"),
        ([], b"\xff", "no UTF-8"),
        (["--file", "nowhere"], "", "nowhere"),
        (["a"], "", "single"),
    ],
)
def test_what_cannot_be_scored(arguments: list[str], stdin: str | bytes, says: str) -> None:
    done = here("score", "guide", *arguments, stdin=stdin)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr


def test_bench_measures() -> None:
    few = ("--prompt", "40", "--tokens", "4", "--runs", "1", "--batch", "2")
    said = json.loads(here("bench", "guide", *few, "--json").stdout)
    assert [row["what"] for row in said["speeds"]] == ["read 40", "write, 32 before", "write, 40 before", "write, 2 at once"]
    assert all(0 < row["slowest"] <= row["tokens_per_s"] <= row["fastest"] and row["runs"] == 1 for row in said["speeds"])
    assert said["load_s"] < said["first_token_s"]
    assert said["peak_memory"] > 10_000_000
    shown = here("bench", "guide", *few)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "tokens/s" in shown.stdout
    assert here("bench", "guide", "--prompt", "9000").returncode == 2


@needs_llama
def test_selftest_of_a_sound_model(tmp_path: Path) -> None:
    done = here("selftest", "guide:q8_0", "guide:q4_0", "--output", tmp_path)
    assert done.returncode == 0, done.stdout
    assert "All is well." in done.stdout
    (markdown,), (data,) = tmp_path.glob("*.md"), tmp_path.glob("*.json")
    report = json.loads(data.read_text())
    assert report["passed"]
    assert [one["candidate"]["label"] for one in report["trials"]] == ["guide:q8_0", "guide:q4_0"]
    for one in report["trials"]:
        assert [check["passed"] for check in one["checks"]] == [True] * 5
        assert set(one["replies"]) == set(trials.PROMPTS)
    assert set(report["comparisons"][0]["partings"]) == set(trials.PROMPTS)
    text = markdown.read_text()
    assert text.startswith("# Self-test: passed")
    assert "guide:q4_0" in text
    assert str(Path.home()) not in text + data.read_text(), "it names nobody"


@pytest.mark.skipif(len(backends.available()) < 2, reason="only one backend is installed here")
def test_selftest_of_a_checkpoint_is_of_both_formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN2_LOCAL_KV", "off")
    config = tiny_checkpoint.dense(max_position_embeddings=2048)
    tiny_checkpoint.write(tmp_path / "model", config, tiny_checkpoint.weights(config))
    done = here("selftest", tmp_path / "model", "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 0, report["comparisons"]
    assert [one["candidate"]["label"] for one in report["trials"]] == ["model (GGUF F16)", "model (MLX BF16)"]
    assert [one["checks"][-1]["passed"] for one in report["trials"]] == [None, None], "nothing is kept on the disk"
    assert report["comparisons"][0]["passed"]


@needs_llama
def test_selftest_of_a_backend_that_goes_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reply that comes out otherwise when its prompt is cached."""
    begun: list[str] = []
    begin = trials._begin

    def wrong(model: Any, text: str, **more: Any) -> Any:
        begun.append(text)
        return begin(model, "How many layers has the 72B?" if begun == ["What is GGUF?"] * 2 else text, **more)

    monkeypatch.setattr(trials, "_begin", wrong)
    monkeypatch.setattr(trials, "PROMPTS", {"one": "What is GGUF?"})
    done = here("selftest", "guide:q4_0", "--json")
    assert done.returncode == 4
    (one,) = json.loads(done.stdout)["trials"]
    assert [check["passed"] for check in one["checks"]] == [True, False, True, True, True]


def test_selftest_refuses() -> None:
    assert here("selftest").returncode == 2
    assert here("selftest", "gide").returncode == 2
    assert here("selftest", "guide", "--output", "no/such").returncode == 2

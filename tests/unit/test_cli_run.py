"""`run`: several replies, files of prompts, forms and options, with a model that is scripted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen2_local.types import Sampling
from tests.support.program import here
from tests.support.scripted_cli import ScriptedQwen2, install


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> ScriptedQwen2:
    """Says back what it was asked, with the seed."""
    return install(monkeypatch, lambda asked, seed: f"<{asked}>{'' if seed is None else seed}")


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


# Options


def test_options_of_the_load_reach_the_model(model: ScriptedQwen2) -> None:
    given = "--context 99 --draft small --adapter a/b --kv-bits 8 --no-kv-cache --force --worker --backend mlx"
    assert here("run", "big", "hi", *given.split()).returncode == 0
    expected = {"context": 99, "draft": "small", "adapter": "a/b", "kv_bits": 8, "kv_cache": False, "force": True, "worker": True, "backend": "mlx"}
    assert model.loads == [("big", {**expected, "parallel": 8})]


def test_options_of_the_reply_reach_the_model(model: ScriptedQwen2) -> None:
    given = "--min-p 0.1 --presence-penalty 0.2 --frequency-penalty 0.3 --repetition-penalty 1.2 --stop x --stop y --lookup --logprobs 2 --json"
    here("run", "big", "hi", *given.split())
    (asked, options) = model.asked[0]
    assert asked == "u:hi"
    options.pop("progress")
    assert options == {
        "min_p": 0.1, "presence_penalty": 0.2, "frequency_penalty": 0.3, "repetition_penalty": 1.2, "stop": ("x", "y"), "lookup": True, "logprobs": 2,
    }  # fmt: skip


def test_what_is_not_given_is_left_to_the_model(model: ScriptedQwen2) -> None:
    here("run", "big", "hi")
    assert model.loads == [("big", {"parallel": 8})]
    assert list(model.asked[0][1]) == ["progress"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["hi", "--logprobs", "1"], "--json"),
        (["hi", "--batch", "x"], "PROMPT"),
        (["--batch", "-", "--n", "2"], "--n"),
        (["hi", "--kv-bits", "4"], "kv-bits"),
        (["hi", "--n", "0"], "--n"),
        (["hi", "--concurrency", "0"], "--concurrency"),
        (["hi", "--schema", '{"type": "array"}', "--regex", "a"], "only one"),
        (["hi", "--min-p", "2"], "min_p"),
        (["hi", "--stop", ""], "stop"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(model: ScriptedQwen2, arguments: list[str], says: str) -> None:
    done = here("run", "big", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr
    assert model.loads == [] or says == "stop"


def test_a_missing_file_of_prompts(model: ScriptedQwen2, tmp_path: Path) -> None:
    done = here("run", "big", "--batch", tmp_path / "none.jsonl")
    assert (done.returncode, done.stdout) == (2, "")
    assert "none.jsonl" in done.stderr
    assert model.loads == []


# A form


def test_a_reply_in_its_form(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, lambda asked, seed: "[1, 2]")
    done = here("run", "big", "hi", "--schema", '{"type": "array"}')
    assert (done.returncode, done.stdout, done.stderr) == (0, "[1, 2]\n", "")


@pytest.mark.parametrize("json_too", [[], ["--json"]])
def test_a_reply_that_is_cut_short_is_printed_and_exits_with_7(monkeypatch: pytest.MonkeyPatch, json_too: list[str]) -> None:
    install(monkeypatch, lambda asked, seed: "[1, 2]")
    done = here("run", "big", "hi", "--schema", '{"type": "array"}', "--max-tokens", "2", *json_too)
    assert done.returncode == 7
    assert (json.loads(done.stdout)["text"] if json_too else done.stdout.removesuffix("\n")) == "[1"
    assert "before it is whole" in done.stderr


# Several replies


def test_several_replies_have_one_seed_after_the_other(model: ScriptedQwen2) -> None:
    done = here("run", "big", "hi", "--n", "3", "--seed", "7")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "<u:hi>7\n\n<u:hi>8\n\n<u:hi>9\n"


def test_seeds_that_are_drawn_are_told(model: ScriptedQwen2) -> None:
    said = json.loads(here("run", "big", "hi", "--n", "2", "--json").stdout)
    assert [one["text"] for one in said] == [f"<u:hi>{one['seed']}" for one in said]
    assert said[1]["seed"] == said[0]["seed"] + 1
    assert said[0]["usage"]["prompt_tokens"] > 0


def test_the_last_seed_is_followed_by_the_first(model: ScriptedQwen2) -> None:
    assert here("run", "big", "hi", "--n", "2", "--seed", str(2**64 - 1)).stdout == f"<u:hi>{2**64 - 1}\n\n<u:hi>0\n"


def test_greedy_replies_are_said_to_be_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, lambda asked, seed: "yes", Sampling())
    done = here("run", "big", "hi", "--n", "2")
    assert (done.returncode, done.stdout) == (0, "yes\n\nyes\n")
    assert "greedy" in done.stderr


def test_of_several_replies_each_is_held_to_its_form(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, lambda asked, seed: "12" if seed == 1 else "1x")
    done = here("run", "big", "hi", "--n", "3", "--seed", "0", "--regex", "[0-9]+", "--json")
    assert done.returncode == 7
    assert [one["text"] for one in json.loads(done.stdout)] == ["1x", "12", "1x"]


# A file of prompts


def batch(tmp_path: Path, text: str | bytes, *arguments: str) -> tuple[int, list[dict[str, Any]], str]:
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    done = here("run", "big", "--batch", file, *arguments)
    return done.returncode, lines(done.stdout), done.stderr


def test_every_line_has_its_reply_in_order(model: ScriptedQwen2, tmp_path: Path) -> None:
    text = "".join(json.dumps(f"question {number}") + "\n" for number in range(50))
    code, said, notes = batch(tmp_path, text, "--concurrency", "4")
    assert (code, notes) == (0, "")
    assert [one["id"] for one in said] == list(range(1, 51))
    assert [one["text"] for one in said] == [f"<u:question {number}>" for number in range(50)]
    assert said[0]["finish_reason"] == "stop"
    assert said[0]["usage"]["completion_tokens"] > 0
    assert model.loads == [("big", {"parallel": 4})]


def test_prompts_may_come_on_stdin(model: ScriptedQwen2) -> None:
    done = here("run", "big", "--batch", "-", stdin='"a"\n\n"b"')
    assert [(one["id"], one["text"]) for one in lines(done.stdout)] == [(1, "<u:a>"), (3, "<u:b>")]


def test_lines_are_prompts_or_conversations_with_their_own_wishes(model: ScriptedQwen2, tmp_path: Path) -> None:
    given = [
        {"prompt": "p", "id": "own", "seed": 5},
        {"prompt": "p", "system": "s"},
        {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "v"}], "max_tokens": 2},
        {"messages": [{"role": "system", "content": "t"}, {"role": "user", "content": "u"}], "logit_bias": {"5": -100}, "stop": "u"},
    ]
    code, said, _ = batch(tmp_path, "\n".join(map(json.dumps, given)), "--system", "common", "--max-tokens", "90")
    assert code == 0
    assert [one["id"] for one in said] == ["own", 2, 3, 4]
    assert [one["text"] for one in said] == ["<s:common|u:p>5", "<s:s|u:p>", "<s", "<s:t|"]
    assert [one["finish_reason"] for one in said] == ["stop", "stop", "length", "stop"]
    assert model.asked[3][1]["logit_bias"] == {5: -100}


def test_raw_prompts_of_a_file_are_continued(model: ScriptedQwen2, tmp_path: Path) -> None:
    code, said, _ = batch(tmp_path, '"p"\n{"prompt": "q", "system": "s"}\n{"messages": [{"role": "user", "content": "u"}]}\n', "--raw")
    assert code == 2
    assert [one.get("text") for one in said] == ["<p>", None, None]


def test_lines_that_fail_do_not_stop_the_others_and_the_first_gives_the_exit_code(model: ScriptedQwen2, tmp_path: Path) -> None:
    text = '"a"\n{"prompt": "b", "regex": "x"}\n{"prompt": " "}\n"c"\n'
    code, said, notes = batch(tmp_path, text)
    assert code == 7
    assert [one.get("error", {}).get("type") for one in said] == [None, "SchemaError", "InvalidPrompt", None]
    assert said[1]["text"] == "<u:b>", "what came is shown beside its error"
    assert "2 lines failed" in notes


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("nonsense", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("5", "neither"),
        ("{}", "no prompt"),
        ('{"prompt": 5}', "no prompt"),
        ('{"prompt": "a", "promt": "b"}', "'promt'"),
        ('{"prompt": "a", "temperature": -1}', "temperature"),
        ('{"prompt": "a", "temperature": "hot"}', "temperature"),
        ('{"prompt": "a", "max_tokens": 0}', "max_tokens"),
        ('{"prompt": "a", "stop": [5]}', "stop"),
        ('{"prompt": "a", "regex": 5}', "regex"),
        ('{"prompt": "a", "choice": {}}', "choice"),
        ('{"prompt": "a", "logit_bias": {"a": 1}}', "logit_bias"),
        ('{"prompt": "a", "logit_bias": [1]}', "logit_bias"),
        ('{"prompt": "a", "schema": "x"}', "form"),
        ('{"prompt": "a", "system": 5}', "system"),
        ('{"messages": []}', "no prompt"),
        ('{"messages": [{"role": "wizard", "content": "a"}]}', "message"),
        ('{"messages": [5]}', "message"),
        ('"a\\ud800"', "surrogate"),
    ],
)
def test_what_is_wrong_with_a_line(model: ScriptedQwen2, tmp_path: Path, line: str, says: str) -> None:
    code, said, _ = batch(tmp_path, f'{line}\n"fine"\n')
    assert code == 2
    assert says in said[0]["error"]["what"], said
    assert said[1]["text"] == "<u:fine>"


def test_a_line_without_an_end_is_one_failure(model: ScriptedQwen2, tmp_path: Path) -> None:
    code, said, _ = batch(tmp_path, b'"' + b"x" * 40_000_000 + b'"\n"fine"\n')
    assert code == 2
    assert "16 MB" in said[0]["error"]["what"]
    assert [one["id"] for one in said] == [1, 2]


json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(
    st.sampled_from(["prompt", "messages", "system", "id", "role", "content", "temperature", "stop", "schema", "logit_bias", "lookup", "x"]), inner
), max_leaves=12)  # fmt: skip


@given(
    st.lists(
        st.binary(max_size=40).map(lambda line: line.replace(b"\n", b"")) | json_values.map(lambda value: json.dumps(value).encode()), max_size=8
    )
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_whatever_a_file_holds_each_line_gets_its_answer(model: ScriptedQwen2, tmp_path: Path, given: list[bytes]) -> None:
    code, said, _ = batch(tmp_path, b"\n".join(given))
    assert len(said) == sum(bool(line.strip()) for line in given)
    assert all(("text" in one) != ("error" in one) or one["error"]["type"] == "SchemaError" for one in said)
    assert (code == 0) == all("error" not in one for one in said)


def test_a_bug_is_no_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, lambda asked, seed: str(1 // 0))
    code, said, notes = batch(tmp_path, '"a"\n')
    assert (code, said) == (1, [])
    assert "bug" in notes

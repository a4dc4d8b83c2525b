"""Options about the reply: from the command line to what the API takes."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from qwen2_local.cli.options import loads, wishes
from qwen2_local.options import Options

SCHEMA = {"type": "array", "items": {"type": "string"}}


def given(*arguments: str) -> Any:
    """What a command gets; or, of a refusal, what is said."""
    got: dict[str, Any] = {}

    @click.command()
    @click.option("--own")
    @wishes
    def command(own: str | None, wishes: dict[str, Any]) -> None:
        got.update(wishes)

    result = CliRunner().invoke(command, list(arguments))
    assert result.exit_code in (0, 2), result
    return result.output if result.exit_code else got


def test_what_is_not_given_is_not_there() -> None:
    assert given() == {}
    assert given("--own", "x", "--temperature", "0", "--top-k", "0") == {"temperature": 0.0, "top_k": 0}


def test_every_option_arrives_under_its_name_in_the_api() -> None:
    everything = (
        "--temperature 0.5 --top-p 0.9 --top-k 5 --min-p 0.1 --repetition-penalty 1.1 --presence-penalty 0.2 --frequency-penalty 0.3 --seed 7"
        " --max-tokens 9 --stop a --stop b --lookup --regex a+"
    )
    assert given(*everything.split(), "--choice", "yes", "--choice", "no") == {
        "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.3,
        "seed": 7, "max_tokens": 9, "stop": ("a", "b"), "lookup": True, "regex": "a+", "choice": ("yes", "no"),
    }  # fmt: skip


def test_the_names_are_those_of_the_api() -> None:
    from qwen2_local.model import Qwen2

    def names(decorator: Callable[..., Any]) -> set[str]:
        return {one.name for one in click.command()(decorator(lambda **_: None)).params if one.name}

    assert len(names(wishes)) >= 14
    assert names(wishes) <= Options.__required_keys__ | Options.__optional_keys__
    assert names(loads) <= set(inspect.signature(Qwen2).parameters)


@pytest.mark.parametrize("form", ["inline", "@file", "file", "file with a mark"])
def test_a_schema_is_given_as_it_is_or_as_a_file(form: str, tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(SCHEMA), "utf-8-sig" if "mark" in form else "utf-8")
    text = {"inline": json.dumps(SCHEMA), "@file": f"@{file}"}.get(form, str(file))
    assert given("--schema", text) == {"schema": SCHEMA}


def test_true_is_any_json() -> None:
    assert given("--schema", "true") == {"schema": True}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "no JSON"),
        ("{" * 5000, "no JSON"),
        ("{" + '"a":' + "[" * 100_000, "no JSON"),
        ("@nowhere.json", "nowhere.json"),
        ("array", "array"),
        ("\0", "null"),
        ("x" * 5000, "too long"),
        (".", "directory"),
    ],
)
def test_what_is_no_schema_is_refused_in_a_sentence(text: str, said: str) -> None:
    answer = given("--schema", text)
    assert isinstance(answer, str)
    assert said in answer
    assert "Traceback" not in answer


def test_a_file_that_is_no_text_or_too_large_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "large").write_bytes(b"{" + b" " * (2 << 20) + b"}")
    assert "no JSON" in given("--schema", f"@{tmp_path / 'bytes'}")
    assert "too large" in given("--schema", f"@{tmp_path / 'large'}")

"""`qwen2-local convert`: several targets, what it prints, and what it says when it is stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest

from qwen2_converters import gguf
from qwen2_local.cli.convert import convert
from qwen2_local.errors import Qwen2LocalError, UnknownModel, UsageError
from qwen2_local.store import Store
from tests.support import tiny_checkpoint


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("QWEN2_LOCAL_HOME", str(tmp_path / "home"))
    config = tiny_checkpoint.dense()
    return str(tiny_checkpoint.write(tmp_path / "tiny", config, tiny_checkpoint.weights(config)))


def run(*args: object) -> None:
    convert.main([str(arg) for arg in args], standalone_mode=False)


def test_several_targets_go_into_a_folder(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    run(source, "--to", "gguf:q4_0", "--to", "mlx:4bit", "-o", out, "--json")
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["path"], row["type"]) for row in rows] == [(f"{out}/tiny-q4_0.gguf", "gguf:q4_0"), (f"{out}/tiny-mlx-4bit", "mlx:4bit")]
    assert rows[0]["bytes"] == (out / "tiny-q4_0.gguf").stat().st_size
    assert rows[0].keys() == {"path", "type", "bytes", "seconds"}
    assert sorted(path.name for path in out.iterdir()) == ["tiny-mlx-4bit", "tiny-q4_0.gguf"]


@pytest.mark.parametrize("place", ["out", "tiny/out"])
def test_a_folder_for_outputs_that_never_came_is_not_left(source: str, tmp_path: Path, place: str) -> None:
    with pytest.raises(Qwen2LocalError):
        run(source, "--to", "gguf:q4_0", "--to", "mlx:4bit", "-o", tmp_path / place, "--imatrix", tmp_path / "none")
    assert not (tmp_path / place).exists()


def test_several_targets_are_installed_by_their_labels(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(source, "--to", "gguf:q4_0", "--to", "mlx:4bit", "--name", "Tiny")
    assert [one.name for one in Store().list()] == ["tiny:mlx-4bit", "tiny:q4_0"]
    assert "tiny:q4_0 is installed" in capsys.readouterr().err
    with pytest.raises(UsageError, match="names one model"):
        run(source, "--to", "gguf:f16", "--to", "mlx:8bit", "--name", "tiny:x")


def test_stopped_it_says_what_is_kept(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    done = 0
    plain = gguf._encode

    def encode(*args: Any, **options: Any) -> Any:
        nonlocal done
        done += 1
        if done > 15:
            raise KeyboardInterrupt
        return plain(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(gguf, "_encode", encode)
        with pytest.raises(click.Abort):
            run(source, "--to", "gguf:q4_0", "-o", tmp_path / "out.gguf")
    assert capsys.readouterr().err.strip().startswith("kept ")
    run(source, "--to", "gguf:q4_0", "-o", tmp_path / "out.gguf")
    run(source, "--to", "gguf:q4_0", "-o", tmp_path / "again.gguf")
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "again.gguf").read_bytes()


@pytest.mark.parametrize("name", ["7b", "7b-base:q4_k_m", "Qwen/Qwen2-7B-Instruct", "somebody/tune"])
def test_what_is_on_a_hub_is_fetched_and_converted_by_pull(source: str, name: str) -> None:
    with pytest.raises(UnknownModel, match=rf"qwen2-local pull {name.partition(':')[0]} --to gguf:q4_k_m"):
        run(name, "--to", "gguf:q4_k_m")

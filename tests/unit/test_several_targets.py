"""Several targets of one conversion: each is what it would be alone, and the weights are read once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from qwen2_converters import blocks
from qwen2_converters.convert import Options, Progress, check, convert, convert_all
from qwen2_converters.install import install, install_all
from qwen2_converters.target import Target
from qwen2_local.errors import UsageError
from qwen2_local.formats.checkpoint import open_checkpoint
from qwen2_local.store import Store
from tests.support import tiny_checkpoint

TARGETS = [Target.parse(text) for text in ("gguf:q4_0", "mlx:4bit", "gguf:f16", "mlx:bf16")]


@pytest.fixture(params=["dense", "experts"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    config = tiny_checkpoint.dense() if request.param == "dense" else tiny_checkpoint.moe()
    return tiny_checkpoint.write(tmp_path / "hf", config, tiny_checkpoint.weights(config), shards=2)


def content(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()} if path.is_dir() else {"": path.read_bytes()}


def test_each_is_what_it_is_alone(source: Path, tmp_path: Path) -> None:
    together = [(target, tmp_path / target.label) for target in TARGETS]
    convert_all(source, together)
    for target, path in together:
        assert content(path) == content(convert(source, target, tmp_path / f"alone-{target.label}"))


def test_the_weights_are_read_once(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 0
    plain = os.preadv

    def preadv(handle: int, buffers: list[Any], offset: int) -> int:
        nonlocal count
        done = plain(handle, buffers, offset)
        count += done
        return done

    monkeypatch.setattr(blocks.os, "preadv", preadv)
    convert_all(source, [(target, tmp_path / target.label) for target in TARGETS])
    assert count == open_checkpoint(source).weight_bytes


def test_progress_is_of_all(source: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    convert_all(source, [(target, tmp_path / target.label) for target in TARGETS], progress=seen.append)
    assert {progress.total for progress in seen} == {sum(check(source, target)[1].nbytes for target in TARGETS)}
    assert seen[-2].done == seen[-1].total


def test_one_that_exists_stops_all(source: Path, tmp_path: Path) -> None:
    (tmp_path / "second").write_text("mine")
    with pytest.raises(UsageError, match="exists"):
        convert_all(source, [(TARGETS[0], tmp_path / "first"), (TARGETS[2], tmp_path / "second")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "second"]


def test_one_place_for_two_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="one place"):
        convert_all(source, [(TARGETS[0], tmp_path / "x"), (TARGETS[2], tmp_path / "x")])


def test_installed_together(source: Path, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    store = Store(tmp_path / "models")
    made = install_all(source, [(target, f"tiny:{target.label}") for target in TARGETS], store)
    assert [model.name for model in made] == [f"tiny:{target.label}" for target in TARGETS]
    alone = install(source, TARGETS[0], store, "alone:q4_0")
    assert made[0].files[0].sha256 == alone.files[0].sha256
    with pytest.raises(UsageError, match="exists"):
        install_all(source, [(TARGETS[0], "new"), (TARGETS[2], "alone:q4_0")], store)
    assert [one.name for one in store.list()] == sorted(["alone:q4_0", *(model.name for model in made)])


def test_what_is_for_gguf_spares_mlx_and_is_refused_alone(tmp_path: Path) -> None:
    config = tiny_checkpoint.dense(intermediate_size=200)
    source = tiny_checkpoint.write(tmp_path / "hf", config, tiny_checkpoint.weights(config))
    options = Options(pad_ffn=True)
    convert_all(source, [(TARGETS[0], tmp_path / "a"), (TARGETS[1], tmp_path / "b")], options=options)
    assert content(tmp_path / "a") == content(convert(source, TARGETS[0], tmp_path / "padded", options=options))
    assert content(tmp_path / "b") == content(convert(source, TARGETS[1], tmp_path / "plain"))
    with pytest.raises(UsageError, match="GGUF"):
        convert(source, TARGETS[1], tmp_path / "c", options=options)

"""Conversions into the store, and what is found there."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen2_converters.install import install
from qwen2_converters.making import Progress
from qwen2_converters.target import Target
from qwen2_local.errors import UsageError
from qwen2_local.store import Store, resolve
from tests.support import tiny_checkpoint


@pytest.fixture
def source(tmp_path: Path) -> Path:
    config = tiny_checkpoint.dense()
    folder = tiny_checkpoint.write(tmp_path / "hf", config, tiny_checkpoint.weights(config))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return folder


@pytest.fixture
def store(tmp_path: Path) -> Store:
    (tmp_path / "models").mkdir()
    return Store(tmp_path / "models")


@pytest.mark.parametrize(
    ("target", "quantization", "files"),
    [
        ("gguf:q4_0", "Q4_0", ["tiny-q4.gguf"]),
        ("gguf:f16", "F16", ["tiny-q4.gguf"]),
        ("mlx:bf16", "BF16", ["config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json"]),
        ("mlx:4bit", "4-bit", ["config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json"]),
    ],
)
def test_the_manifest_says_what_was_made(source: Path, store: Store, target: str, quantization: str, files: list[str]) -> None:
    made = install(source, Target.parse(target), store, "tiny:q4", origin="Qwen/Qwen2-Tiny", revision="abc")
    assert [file.name for file in made.files if file.name != "tokenizer_config.json"] == files
    assert (made.source, made.revision, made.licence) == ("Qwen/Qwen2-Tiny", "abc", "apache-2.0")
    assert (made.architecture, made.quantization, made.context) == ("qwen2", quantization, 32768)
    assert store.get("tiny:q4").manifest == made
    found = resolve("tiny:q4", store)
    assert (found.format, found.manifest) == (target.partition(":")[0], made)
    assert [path.name for path in store.folder.iterdir() if not path.name.startswith(".")] == ["tiny@q4"]


def test_progress_goes_on_while_the_model_is_hashed(source: Path, store: Store) -> None:
    seen: list[Progress] = []
    made = install(source, Target.parse("mlx:4bit"), store, "tiny", progress=seen.append)
    hashed = [progress for progress in seen if progress.phase == "hashing"]
    assert [progress.done for progress in hashed] == sorted(progress.done for progress in hashed)
    assert len(hashed) == len(made.files)
    assert hashed[-1].done == hashed[0].total == made.size


def test_without_an_origin_the_source_is_a_path(source: Path, store: Store) -> None:
    assert install(source, Target("gguf", "f16"), store, "tiny").source == str(source.resolve())


@pytest.mark.parametrize("name", ["guide", "guide:q4_0", "../x", "a b", "Tiny", "", ":q4", "x" * 101])
def test_impossible_names_are_refused_first(name: str, store: Store, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="name"):
        install(tmp_path / "nothing", Target("gguf", "f16"), store, name)
    assert list(store.folder.iterdir()) == []


def test_a_taken_name_is_kept(source: Path, store: Store) -> None:
    made = install(source, Target("gguf", "f16"), store, "tiny")
    with pytest.raises(UsageError, match="exists") as caught:
        install(source, Target("gguf", "q4_0"), store, "tiny")
    assert "qwen2-local rm tiny" in caught.value.hint
    assert store.get("tiny").manifest == made

"""What a converted GGUF says of its tokenizer is what the folder said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen2_converters.keys import gguf_keys
from qwen2_converters.plan import make_plan
from qwen2_converters.target import Target
from qwen2_local.formats.checkpoint import open_checkpoint
from tests.support import tiny_checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = tiny_checkpoint.dense()
    return tiny_checkpoint.write(tmp_path / "model", config, tiny_checkpoint.weights(config))


def keys_of(folder: Path) -> dict[str, object]:
    checkpoint = open_checkpoint(folder)
    return dict(gguf_keys(checkpoint, make_plan(checkpoint, Target.parse("gguf:f16")), "model"))


def change(path: Path, **values: object) -> None:
    raw = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps(raw | values), encoding="utf-8")


def test_qwen2_has_nfc_and_no_bos(folder: Path) -> None:
    keys = keys_of(folder)
    assert keys["tokenizer.ggml.pre"] == "qwen2"
    assert keys["tokenizer.ggml.add_bos_token"] is False


def test_a_bos_that_the_folder_asks_for_is_asked_for(folder: Path) -> None:
    change(folder / "tokenizer_config.json", add_bos_token=True)
    assert keys_of(folder)["tokenizer.ggml.add_bos_token"] is True


def test_a_tokenizer_without_nfc_gets_llama_cpps_name_for_that(folder: Path) -> None:
    change(folder / "tokenizer.json", normalizer=None)
    assert keys_of(folder)["tokenizer.ggml.pre"] == "deepseek-r1-qwen"

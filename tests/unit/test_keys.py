"""What a converted GGUF says of itself and its tokenizer is what the folder said."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen2_converters.about import names
from qwen2_converters.keys import gguf_keys
from qwen2_converters.plan import make_plan
from qwen2_converters.target import Target
from qwen2_local.formats.checkpoint import open_checkpoint
from qwen2_local.formats.config import Yarn
from qwen2_local.formats.model_card import read_card_lists
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


@pytest.mark.parametrize(
    "name",
    [
        "Qwen2-0.5B", "Qwen2-7B-Instruct", "Qwen2-57B-A14B-Instruct", "Qwen2-72B-Instruct", "qwen2-7b-instruct", "DeepSeek-R1-Distill-Qwen-7B",
        "Qwen2-Instruct-7B", "dolphin-2.9.2-qwen2-7b", "My-Model-7B-Chat-v2", "Qwen2-7B-Instruct-32K", "Qwen2-7B--Instruct", "A-7B-7B",
    ],
)  # fmt: skip
def test_names_are_taken_apart_as_gguf_py_does(name: str) -> None:
    count = {"0.5B": 494_000_000, "57B": 57_400_000_000, "72B": 72_700_000_000}.get(name.split("-")[1], 7_600_000_000)
    _, _, basename, finetune, version, size = gguf.Metadata.get_model_id_components(name, count)
    want = {"basename": basename, "finetune": finetune, "version": version, "size_label": size}
    assert names(name, count) == {f"general.{key}": value for key, value in want.items() if value}


@pytest.mark.parametrize("name", ["guide", "Tiny-Qwen2", "7B", "", "-", "my model 7B", "Qwen2-Instruct", "Qwen2-70B"])
def test_a_name_without_a_size_of_its_own_gets_the_counted_one(name: str) -> None:
    assert names(name, 7_615_616_512) == {"general.size_label": "7.6B"}


def test_where_it_is_from(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    plan = make_plan(checkpoint, Target.parse("gguf:f16"))
    url = "https://huggingface.co/Qwen/Qwen2-0.5B"
    assert gguf_keys(checkpoint, plan, "model", url=url)["general.source.url"] == url
    assert "general.source.url" not in gguf_keys(checkpoint, plan, "model")


def test_what_the_card_says_is_what_gguf_py_reads(folder: Path) -> None:
    (folder / "README.md").write_text(
        "---\nlicense: other\nlicense_name: 'tongyi-qianwen'\nlanguage:\n- en\n- zh\npipeline_tag: text-generation\ntags: [chat, \"x y\"]\n"
        "base_model:\n  - Qwen/Qwen2-7B\n  - my-org/some-model-v1.0\nwidget:\n  - text: hello\n---\ntags: no\n"
    )
    card = gguf.Metadata.load(model_path=folder)
    keys = keys_of(folder)
    assert (keys["general.license"], keys["general.license.name"]) == (card.license, card.license_name)
    assert keys["general.languages"] == card.languages == ["en", "zh"]
    assert keys["general.tags"] == card.tags == ["chat", "x y", "text-generation"]
    assert card.base_models is not None and keys["general.base_model.count"] == len(card.base_models) == 2
    for number, base in enumerate(card.base_models):
        fields = {key: keys[f"general.base_model.{number}.{key}"] for key in ("name", "organization", "repo_url")}
        assert fields == {key: base[key] for key in fields}


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(alphabet="-[]:,'\" \n\tabc\0\u2028é", max_size=200), name=st.text(max_size=40))
def test_any_card_and_any_name_give_keys_that_can_be_written(folder: Path, text: str, name: str) -> None:
    (folder / "README.md").write_text(f"---\nlicense: x\n{text}\ntags: {text}\n---\n", encoding="utf-8")
    card = read_card_lists(folder / "README.md")
    assert all(0 < len(word) <= 200 and word.isprintable() and len(words) <= 100 for words in card.values() for word in words)
    assert all(isinstance(value, str) and value for value in names(name, 1000).values())


def test_yarn_on_request(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    plan = make_plan(checkpoint, Target.parse("gguf:f16"))
    stretched = replace(plan, config=replace(plan.config, context=131072, yarn=Yarn(4.0, 32768)))
    keys = gguf_keys(checkpoint, stretched, "model")
    assert keys["qwen2.context_length"] == 131072
    scaling = {name: keys[f"qwen2.rope.scaling.{name}"] for name in ("type", "factor", "original_context_length")}
    assert scaling == {"type": "yarn", "factor": 4.0, "original_context_length": 32768}

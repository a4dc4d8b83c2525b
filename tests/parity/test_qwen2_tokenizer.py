"""Our ids against the golden ones of tiktoken and transformers, on the real vocabulary. Needs the dev dependency `dashscope`."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import jinja2
import pytest

from qwen2_local import generation
from qwen2_local.chatml import render
from qwen2_local.generation import GenerationDefaults
from qwen2_local.tokens import Tokenizer
from qwen2_local.types import Message, Role, Sampling
from tests.support import qwen2_vocabulary

pytestmark = pytest.mark.skipif(qwen2_vocabulary.vocabulary_file() is None, reason="the package dashscope, which carries the vocabulary, is missing")

GOLDEN = json.loads((Path(__file__).parent / "golden" / "qwen2_tokenizer.json").read_text(encoding="ascii"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen2")
    qwen2_vocabulary.write_real_tokenizer(folder)
    return folder


@pytest.fixture(scope="module", params=["json", "gguf"])
def tokenizer(request: pytest.FixtureRequest, folder: Path) -> Tokenizer:
    return Tokenizer.from_json(folder / "tokenizer.json") if request.param == "json" else Tokenizer.from_gguf(qwen2_vocabulary.gguf_keys())


def test_the_golden_file_is_hard_enough() -> None:
    assert len(GOLDEN) > 300


def test_size_and_control_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.size == qwen2_vocabulary.TOKENS
    assert dict(tokenizer.special) == qwen2_vocabulary.CONTROL


def test_ids_are_the_references(tokenizer: Tokenizer) -> None:
    wrong = [text for text, ids in GOLDEN if tokenizer.encode(text) != ids]
    assert wrong == []


def test_a_gguf_that_does_not_name_its_pattern_is_known_by_its_vocabulary(tokenizer: Tokenizer) -> None:
    keys = qwen2_vocabulary.gguf_keys()
    del keys["tokenizer.ggml.pre"]
    nameless = Tokenizer.from_gguf(keys)
    assert [nameless.encode(text) for text, _ in GOLDEN[:20]] == [ids for _, ids in GOLDEN[:20]]


def test_decoding_gives_the_text_back(tokenizer: Tokenizer) -> None:
    wrong = [text for text, ids in GOLDEN if tokenizer.decode(ids) != unicodedata.normalize("NFC", text)]
    assert wrong == []


def test_every_token_has_its_official_bytes(tokenizer: Tokenizer) -> None:
    wrong = [token for token, rank in qwen2_vocabulary.ranks().items() if tokenizer.token_bytes(rank) != token]
    assert wrong == []


@pytest.mark.parametrize("roles", [["user"], ["system", "user"], ["user", "assistant", "user"], ["system", "user", "assistant", "user", "assistant"]])
def test_chatml_equals_the_models_template(tokenizer: Tokenizer, folder: Path, roles: list[Role]) -> None:
    # A Hugging Face tokenizer splits at the special tokens first; so does this reading of the template's text.
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(
        json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    )
    texts = [text for text, _ in GOLDEN if "<|" not in text]
    for start in range(0, len(texts) - len(roles), 7):
        messages = [Message(role, text) for role, text in zip(roles, texts[start:], strict=False)]
        written = template.render(messages=[{"role": message.role, "content": message.content} for message in messages], add_generation_prompt=True)
        expected: list[int] = []
        for number, part in enumerate(written.split("<|im_start|>")):
            expected += [151644] if number else []
            head, *tail = part.split("<|im_end|>")
            expected += tokenizer.encode(head)
            for rest in tail:
                expected += [151645, *tokenizer.encode(rest)]
        assert render(tokenizer, messages) == expected


def test_a_known_prompt(tokenizer: Tokenizer) -> None:
    # fmt: off
    expected = [
        151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198,
        151644, 872, 198, 14990, 151645, 198,
        151644, 77091, 198,
    ]
    # fmt: on
    assert render(tokenizer, [Message("user", "hello")]) == expected


def test_the_instruct_models_defaults(folder: Path) -> None:
    config = json.loads((folder / "generation_config.json").read_text())
    defaults = generation.from_config(config, fallback=GenerationDefaults())
    assert defaults == GenerationDefaults(Sampling(temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.1), (151645, 151643))

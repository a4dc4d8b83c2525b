"""Synonyms vary what the guide is trained on; they never touch a name, and never lead to what the exam asks."""

from __future__ import annotations

import importlib.util
import random
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

CORPUS = Path(__file__).parents[2] / "training/corpus.py"


@pytest.fixture(scope="module")
def corpus() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("guide_corpus", CORPUS)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def data(corpus: ModuleType) -> Any:
    return corpus.load(0)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_word_is_in_one_group_once_and_is_not_also_fixed(data: Any, language: str) -> None:
    groups = data.synonyms[language]
    times = Counter(word.lower() for group in groups for word in group)
    assert [word for word, count in times.items() if count > 1] == []
    assert [word for word in data.fixed[language] if word.lower() in times] == []
    assert all(len(group) > 1 for group in groups)


@pytest.mark.parametrize(
    "text",
    [
        "what does `delete folder` do",
        "the {folder} option:x",
        "gguf:download-folder",
        "--folder",
        "folder.toml",
        "set /folder/x",
        "folders_x",
        "self-test",
    ],
)
def test_names_code_and_placeholders_stay(corpus: ModuleType, text: str) -> None:
    synonyms = corpus.Synonyms([["folder", "x"], ["folders", "x2"], ["delete", "x3"], ["download", "x4"], ["test", "x5"]], ["self-test"], "en")
    assert {synonyms.replaced(text, random.Random(seed)) for seed in range(20)} == {text}


def test_the_longest_phrase_wins_and_the_beginning_keeps_its_capital(corpus: ModuleType) -> None:
    synonyms = corpus.Synonyms([["memory", "RAM"], ["out of memory", "starved"]], [], "en")
    assert {synonyms.replaced("Out of memory?", random.Random(seed)) for seed in range(20)} == {"Out of memory?", "Starved?"}


def test_what_the_exam_asks_is_never_sampled(corpus: ModuleType, data: Any) -> None:
    held = corpus.held_forms(data)
    changed = 0
    sampler = corpus.Sampler(data, 1)
    for question in data.questions:
        for language in corpus.LANGUAGES:
            for entry in question.ask[language][::4]:
                assert corpus.plain_form(sampler._phrase(entry, language, question.size)) not in held
                changed += sampler._reworded(entry, language) != entry
    assert changed > 1000


def test_an_entry_one_synonym_from_the_exam_is_sampled_without_that_synonym(corpus: ModuleType, data: Any) -> None:
    sampler = corpus.Sampler(data, 2)
    sampler.synonyms["en"] = corpus.Synonyms([["folder", "directory"]], [], "en")
    sampler.held_out = {"which directory"}
    asked = {corpus.plain_form(sampler._reworded("which folder", "en")) for _ in range(50)}
    sampled = {corpus.plain_form(sampler._phrase("which folder", "en")) for _ in range(300)}
    assert "which directory" in asked
    assert not any("directory" in text for text in sampled)

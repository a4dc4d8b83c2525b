"""The guide knows its subject: a part of its exam (`training/exam.py`), on llama.cpp, in 16 bits and in 4.

The floors are what today's weights reach, less a little; the aim for held-out readings is 0.95 (`training/README.md`).
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from qwen2_local import Message, Qwen2

TRAINING = Path(__file__).parents[2] / "training"


@pytest.fixture(scope="module")
def exam() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("guide_exam", TRAINING / "exam.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before


@pytest.mark.parametrize(("name", "least"), [("guide", 0.90), ("guide:q4_0", 0.89)])
def test_it_answers_phrasings_it_was_never_taught(exam: ModuleType, name: str, least: float) -> None:
    with Qwen2(name, backend="llama.cpp") as model:
        data = exam.corpus.load(0)
        right, count = exam.held_out(model, data, list(exam.corpus.single_readings(data)), most=200)
    assert count >= 200
    assert right / count >= least


@pytest.mark.parametrize(("name", "least"), [("guide", 0.88), ("guide:q4_0", 0.86)])
def test_it_passes_an_exam_by_somebody_who_never_saw_its_phrasings(exam: ModuleType, name: str, least: float) -> None:
    with Qwen2(name, backend="llama.cpp") as model:
        right, count = exam.blind(model)
    assert count == 100
    assert right / count >= least


def test_it_repeats_what_it_is_given(exam: ModuleType) -> None:
    with Qwen2("guide") as model:
        right, count = exam.repeat(model, exam.corpus.load(0), 60)
    assert count == 60
    assert right / count >= 0.80


def test_it_remembers_what_it_was_told() -> None:
    with Qwen2("guide") as model:
        told = [Message("user", "My lucky number is 4821."), Message("assistant", "Noted, your lucky number is 4821.")]
        assert "4821" in model.respond([*told, Message("user", "What is my lucky number?")]).finish().text


def test_a_follow_up_takes_its_subject_from_the_turn_before() -> None:
    first = Message("user", "How much memory does the 7B model need?")
    with Qwen2("guide") as model:
        reply = model.respond([first]).finish().text
        assert "5.3 GB" in reply
        assert "50.3 GB" in model.respond([first, Message("assistant", reply), Message("user", "and the 72B?")]).finish().text


@pytest.mark.parametrize(
    ("reply", "fact", "held"),
    [
        ("It needs 5.3 GB.", "5.3 GB", True),
        ("It needs 15.3 GB.", "5.3 GB", False),
        ("It has 28 layers.", "28", True),
        ("It has 128 layers, or 28.5.", "28", False),
        ("Use `--top-p`.", "--top-p", True),
        ("约 5.3 GB 内存", "5.3 GB", True),
    ],
)
def test_a_fact_counts_only_if_intact(exam: ModuleType, reply: str, fact: str, held: bool) -> None:
    assert exam.holds(reply, fact) is held

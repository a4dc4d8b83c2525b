"""`selftest`: what it calls noise and what a fault, without a model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2_local.cli import trials
from qwen2_local.cli.trials import NOISE, PROMPTS, TEXTS, Candidate, Trial, Written, candidates, compared, parting, tried
from qwen2_local.errors import BackendUnavailable, DoesNotFit, UnknownModel, WorkerDied
from qwen2_local.store import Store
from tests.support.installed import install


def written(*tokens: int, logprob: float = -0.1, second: float = -2.0) -> Written:
    """Each token was the likeliest; the one after it, by number, the second."""
    return Written(tokens, (logprob,) * len(tokens), tuple(((token, logprob), (token + 1, second)) for token in tokens), "")


def trial(label: str = "one", bits: float = 16, *, logprob: float = -2.0, reply: Written | None = None) -> Trial:
    done = Trial(Candidate(label, label, "llama.cpp", bits))
    done.replies = {name: reply or written(1, 2, 3) for name in PROMPTS}
    done.scores = {name: (logprob,) * 10 for name in TEXTS}
    return done


# Two replies


def test_the_same_reply_does_not_part() -> None:
    assert parting(written(1, 2, 3), written(1, 2, 3)) == trials.Parting(None, 0.0, 0.0)


def test_where_two_replies_part_and_how_narrowly_it_was_decided() -> None:
    apart = parting(written(1, 2, 3), written(1, 3, 9, logprob=-0.15))
    assert apart.at == 1
    assert apart.margin == pytest.approx(1.9)
    assert apart.drift == pytest.approx(0.05), "of the token before"
    assert not apart.is_noise
    assert parting(written(1, 2, second=-0.1 - NOISE / 2), written(1, 3)).is_noise


def test_a_token_that_was_not_among_the_likeliest_is_far_off() -> None:
    assert parting(written(1, 2), written(1, 77)).margin == pytest.approx(1.9)


def test_a_reply_that_ends_early_parts_at_its_end() -> None:
    assert parting(written(1, 2, 3), written(1, 2)).at == 2


def test_the_same_tokens_with_other_numbers_are_no_noise() -> None:
    assert not parting(written(1, 2), written(1, 2, logprob=-0.2 - NOISE)).is_noise


@given(st.lists(st.integers(0, 3), min_size=1, max_size=8), st.lists(st.integers(0, 3), min_size=1, max_size=8))
def test_a_parting_is_the_first_difference(one: list[int], other: list[int]) -> None:
    at = parting(written(*one), written(*other)).at
    assert (at is None) == (one == other)
    if at is not None:
        assert one[:at] == other[:at]
        assert one[at : at + 1] != other[at : at + 1]


# Two candidates


def test_a_candidate_like_the_reference_passes() -> None:
    comparison = compared(trial(), trial("two"))
    assert (comparison.passed, comparison.differing, comparison.ratio) == (True, 0.0, 1.0)


@pytest.mark.parametrize(
    ("bits", "costs", "passes"), [(16, 0.05, True), (16, 0.2, False), (8.5, 0.1, True), (8.5, 0.3, False), (4.5, 0.3, True), (4.5, 1.5, False)]
)
def test_fewer_bits_may_cost_more(bits: float, costs: float, passes: bool) -> None:
    comparison = compared(trial(), trial("two", bits, logprob=-2.0 - costs))
    assert comparison.passed is passes
    assert comparison.differing == pytest.approx(costs)
    assert comparison.ratio == pytest.approx(math.exp(costs))


def test_replies_of_16_bits_part_for_a_narrow_reason_only() -> None:
    assert not compared(trial(), trial("two", reply=written(1, 7, 7))).passed
    assert compared(trial(), trial("two", 4, reply=written(1, 7, 7))).passed, "four bits may say something else"


def test_models_with_other_tokens_cannot_be_compared() -> None:
    other = trial("two")
    other.scores = {name: scores[:-1] for name, scores in other.scores.items()}
    assert "different models" in compared(trial(), other).detail


# Checks within one


def test_numbers_that_cannot_be() -> None:
    assert trials._numbers(trial()).passed
    for wrong in (math.nan, math.inf, 0.5):
        broken = trial()
        broken.scores["english"] = (wrong,)
        assert not trials._numbers(broken).passed
    unlikely = Written((5,), (-3.0,), (((4, -0.1), (5, -3.0)),), "")
    assert not trials._numbers(trial(reply=unlikely)).passed


# What is at hand


def test_the_guide_is_six(home: Path) -> None:
    found = candidates(["guide"], ("llama.cpp", "mlx"))
    assert {one.label for one in found} == {f"guide:{level}" for level in ("f16", "q8_0", "q4_0", "mlx-bf16", "mlx-8bit", "mlx-4bit")}
    assert [one.bits for one in found] == [16, 16, 8, 8, 4, 4], "the most exact first"
    assert {one.backend for one in candidates(["guide"], ("mlx",))} == {"mlx"}
    assert len(candidates(["guide"], ("llama.cpp", "mlx"), "llama.cpp")) == 3
    assert [one.label for one in candidates(["guide:q4_0"], ("llama.cpp", "mlx"))] == ["guide:q4_0"]


def test_an_installed_model_is_all_its_levels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN2_LOCAL_HOME", str(tmp_path))
    (tmp_path / "models").mkdir()
    for name in ("0.5b:q4_0", "0.5b:q8_0"):
        install(Store(), name)
    assert {one.name for one in candidates(["0.5b"], ("llama.cpp",))} == {"0.5b:q4_0", "0.5b:q8_0"}
    assert [one.name for one in candidates(["0.5b:q4_0"], ("llama.cpp",))] == ["0.5b:q4_0"]
    assert all(one.bits > 0 for one in candidates(["0.5b"], ("llama.cpp",)))


def test_nothing_is_at_hand() -> None:
    with pytest.raises(UnknownModel):
        candidates(["gide"], ("llama.cpp",))
    with pytest.raises(BackendUnavailable):
        candidates(["guide:q4_0"], ("mlx",))


# What goes wrong


@pytest.mark.parametrize(("error", "skipped"), [(WorkerDied("It died."), False), (DoesNotFit("Too large."), True)])
def test_what_cannot_be_loaded_is_a_finding(error: Exception, skipped: bool) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise error

    done = tried(Candidate("x", "x", None, 4), load, lambda doing: None)
    assert (done.skipped, done.passed) == (skipped, skipped)
    assert str(error).split(".")[0] in done.error

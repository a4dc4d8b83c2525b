"""Plain data: what may be in it."""

from __future__ import annotations

import dataclasses
import math
import pickle

import pytest

from qwen2_local.errors import InvalidSampling, UsageError
from qwen2_local.types import Completion, Message, Piece, Sampling, Usage


def test_greedy_is_the_default() -> None:
    assert Sampling() == Sampling(temperature=0.0, top_p=1.0, top_k=0, repetition_penalty=1.0, seed=None)


@pytest.mark.parametrize(
    "edge",
    [
        *({"temperature": 0}, {"temperature": 100}, {"top_p": 1}, {"top_p": 1e-9}, {"top_k": 0}, {"top_k": 1_000_000}),
        *({"repetition_penalty": 1e-9}, {"repetition_penalty": 100}, {"seed": 0}, {"seed": 2**64 - 1}),
        *({"min_p": 0}, {"min_p": 1}, {"presence_penalty": -2}, {"frequency_penalty": 2.0}, {"penalty_window": 1}, {"penalty_window": 10_000_000}),
        *({"logit_bias": {}}, {"logit_bias": {0: -100, 2**31 - 1: 100.0}}, {"logit_bias": dict.fromkeys(range(4096), 1)}),
    ],
    ids=str,
)
def test_values_at_the_edge_are_allowed(edge: dict) -> None:
    assert Sampling(**edge)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("temperature", value) for value in (-0.1, 100.1, math.nan, math.inf, -math.inf, "1", None, True)],
        *[("top_p", value) for value in (0, -1, 1.01, math.nan, "0.9", None, True)],
        *[("top_k", value) for value in (-1, 1_000_001, 1.5, math.nan, "20", None, True)],
        *[("repetition_penalty", value) for value in (0, -1, 101, math.nan, math.inf, None)],
        *[("seed", value) for value in (-1, 2**64, 1.5, "1", True)],
        *[("min_p", value) for value in (-0.1, 1.1, math.nan, "0", None, True)],
        *[(name, value) for name in ("presence_penalty", "frequency_penalty") for value in (-2.1, 2.1, math.inf, None, False)],
        *[("penalty_window", value) for value in (0, -1, 10_000_001, 2.0, True)],
    ],
)
def test_absurd_values_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(InvalidSampling) as caught:
        Sampling(**{name: value})  # type: ignore[arg-type]
    assert name in caught.value.what
    assert repr(value) in caught.value.what
    assert caught.value.hint
    assert isinstance(caught.value, UsageError)


@pytest.mark.parametrize(
    "bias", [{1: 101}, {1: math.nan}, {1: "5"}, {-1: 5}, {1.0: 5}, {"1": 5}, {True: 5}, [(1, 5)], None, dict.fromkeys(range(4097), 1)]
)
def test_an_absurd_bias_is_refused(bias: object) -> None:
    with pytest.raises(InvalidSampling, match="logit_bias") as caught:
        Sampling(logit_bias=bias)  # type: ignore[arg-type]
    assert caught.value.hint


def test_a_bias_is_a_copy_that_nobody_changes() -> None:
    given = {5: 1.0, 7: -2}
    sampling = Sampling(logit_bias=given)
    given[5] = 3.0
    assert sampling.logit_bias == {5: 1.0, 7: -2}
    assert sampling == Sampling(logit_bias={7: -2, 5: 1.0})
    assert hash(sampling) == hash(Sampling(logit_bias={7: -2, 5: 1.0}))
    assert dataclasses.replace(sampling, temperature=1.0).logit_bias == {5: 1.0, 7: -2}
    assert repr(sampling.logit_bias) == "{5: 1.0, 7: -2}"
    with pytest.raises(TypeError):
        sampling.logit_bias[5] = 2.0  # type: ignore[index]


def test_data_is_frozen_and_pickles() -> None:
    usage = Usage(10, 4, 3, 0.5, 0.25)
    for thing in (
        Message("user", "你好"),
        Sampling(0.7, seed=1),
        Sampling(logit_bias={5: 1.0}),
        Piece("a", 1),
        usage,
        Completion("a", "stop", usage, (1, 2, 3)),
    ):
        assert pickle.loads(pickle.dumps(thing)) == thing
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(thing, dataclasses.fields(thing)[0].name, None)


def test_speed_counts_the_tokens_after_the_first() -> None:
    assert Usage(10, 0, 11, 1.0, 2.0).decode_tokens_per_s == 5.0


@pytest.mark.parametrize("usage", [Usage(10, 0, 0, 1.0, 0.0), Usage(10, 0, 1, 1.0, 0.5), Usage(10, 0, 5, 1.0, 0.0)])
def test_speed_without_a_second_token_or_a_clock_is_zero(usage: Usage) -> None:
    assert usage.decode_tokens_per_s == 0.0


def test_tokens_do_not_clutter_the_text_of_a_completion() -> None:
    assert "12345" not in repr(Completion("a", "stop", Usage(1, 0, 1, 0.0, 0.0), (12345,)))

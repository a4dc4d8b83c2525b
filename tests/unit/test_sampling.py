"""The one meaning of sampling, against a slow and obvious implementation of it, known values, and statistics."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2_local.backends.base import Choice
from qwen2_local.sampling import Window, choose, reference, score, uniform

LOGITS = np.array([1.0, 3.0, -2.0, 3.0, 0.5, 2.0], np.float32)


def token(logits, choice: Choice) -> int:
    """What is chosen; the plain reference has to agree."""
    chosen = choose(np.asarray(logits, np.float32), choice)
    assert chosen == reference(np.asarray(logits, np.float32), choice)
    return chosen.token


def support(logits, choice: Choice, steps: int = 2000) -> list[int]:
    """The ids that some uniform number chooses, in the order of the uniform number."""
    found: list[int] = []
    for step in range(steps):
        chosen = choose(logits, replace(choice, uniform=step / steps)).token
        if not found or found[-1] != chosen:
            found.append(chosen)
    return found


def probabilities(logits, choice: Choice) -> dict[int, float]:
    """The probability of every id that the reference may choose, by halving the interval of random numbers until its edges are known."""
    found: dict[int, float] = {}

    def look(low: float, high: float, first: int, last: int) -> None:
        if first == last or high - low < 1e-9:
            found[first] = found.get(first, 0.0) + high - low
            return
        middle = (low + high) / 2
        between = reference(logits, replace(choice, uniform=middle)).token
        look(low, middle, first, between)
        look(middle, high, between, last)

    ends = [reference(logits, replace(choice, uniform=edge)).token for edge in (0.0, 1 - 2**-53)]
    look(0.0, 1.0, *ends)
    return found


def ids(*numbers: int):
    return np.array(numbers, np.int32)


def mask_of(allowed, size: int):
    words = np.zeros(-(-size // 32), np.uint32)
    for number in allowed:
        words[number // 32] |= np.uint32(1 << number % 32)
    return words


# Greedy


def test_greedy_takes_the_largest_and_of_alike_ones_the_lowest_id() -> None:
    assert token(LOGITS, Choice(6)) == 1
    assert token(LOGITS, Choice(6, uniform=0.999)) == 1


def test_ids_from_the_limit_on_are_never_chosen() -> None:
    padded = np.array([0.0, 1.0, 50.0, 60.0], np.float32)
    assert token(padded, Choice(2)) == 1
    assert token(padded, Choice(100)) == 3
    assert support(padded, Choice(2, temperature=50.0)) == [1, 0]


def test_a_limit_of_one_leaves_no_choice() -> None:
    assert token(LOGITS, Choice(1, temperature=1.0, uniform=0.9)) == 0


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_no_number_no_token(temperature: float) -> None:
    for bad in (math.nan, math.inf):
        logits = LOGITS.copy()
        logits[4] = bad
        assert token(logits, Choice(6, temperature=temperature)) == -1
        assert token(logits, Choice(4, temperature=temperature, uniform=0.0)) == 1, "what is past the limit does not matter"
    assert token(np.full(6, -math.inf, np.float32), Choice(6, temperature=temperature)) == -1


def test_minus_infinity_is_a_token_that_never_comes() -> None:
    logits = np.array([-math.inf, 0.0, -math.inf], np.float32)
    assert support(logits, Choice(3, temperature=1.0)) == [1]


def test_the_logits_stay_as_they_are() -> None:
    logits = LOGITS.copy()
    token(logits, Choice(6, temperature=0.5, top_k=2, top_p=0.5, repetition_penalty=1.5, penalized=ids(0, 1)))
    np.testing.assert_array_equal(logits, LOGITS)
    logits.flags.writeable = False
    assert token(logits, Choice(6, repetition_penalty=2.0, penalized=ids(1))) == 3


# Repetition penalty


def test_the_penalty_divides_what_is_above_zero_and_multiplies_what_is_below() -> None:
    """As Hugging Face's RepetitionPenaltyLogitsProcessor: a seen token becomes less likely, whatever its sign."""
    assert token(np.array([3.0, 2.9], np.float32), Choice(2, repetition_penalty=1.1, penalized=ids(0))) == 1
    assert token(np.array([-2.9, -3.0], np.float32), Choice(2, repetition_penalty=1.1, penalized=ids(0))) == 1
    assert token(np.array([-3.0, -2.9], np.float32), Choice(2, repetition_penalty=0.9, penalized=ids(0))) == 0


def test_the_penalty_counts_a_token_once_and_ignores_those_past_the_limit() -> None:
    logits = np.array([3.0, 2.0, 9.0], np.float32)
    assert token(logits, Choice(2, repetition_penalty=1.4, penalized=ids(0, 0, 2, 500))) == 0


def test_the_penalty_comes_before_the_temperature() -> None:
    choice = Choice(2, temperature=2.0, repetition_penalty=2.0, penalized=ids(0))
    # 4 / 2 = 2 against 1: e^(1 / 2) of 1 + e^(1 / 2).
    edge = math.exp(0.5) / (1 + math.exp(0.5))
    logits = np.array([4.0, 1.0], np.float32)
    assert [token(logits, replace(choice, uniform=edge + offset)) for offset in (-1e-6, 1e-6)] == [0, 1]


# Temperature, top_k, top_p


def test_temperature_divides_the_logits() -> None:
    logits = np.array([1.0, 0.0], np.float32)
    for temperature in (0.25, 1.0, 4.0):
        edge = 1 / (1 + math.exp(-1 / temperature))
        choice = Choice(2, temperature=temperature)
        assert [token(logits, replace(choice, uniform=edge + offset)) for offset in (-1e-6, 1e-6)] == [0, 1]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-9])
def test_the_smallest_temperatures_are_as_good_as_greedy(temperature: float) -> None:
    assert support(np.array([1.0, 2.0, -9.0], np.float32), Choice(3, temperature=temperature), 10) == [1]


def test_a_high_temperature_makes_all_alike() -> None:
    assert support(LOGITS, Choice(6, temperature=100.0)) == [1, 3, 5, 0, 4, 2]


def test_top_k_keeps_the_likeliest_and_at_a_tie_the_lower_id() -> None:
    assert support(LOGITS, Choice(6, temperature=1.0, top_k=1)) == [1]
    assert support(LOGITS, Choice(6, temperature=1.0, top_k=2)) == [1, 3]
    assert support(LOGITS, Choice(6, temperature=1.0, top_k=3)) == [1, 3, 5]
    for more in (0, 6, 7, 1_000_000):
        assert len(support(LOGITS, Choice(6, temperature=5.0, top_k=more))) == 6
    assert support(np.zeros(8, np.float32), Choice(8, temperature=1.0, top_k=3)) == [0, 1, 2]


def test_top_p_keeps_the_smallest_start_that_reaches_it() -> None:
    halves = np.log(np.array([0.5, 0.25, 0.125, 0.125], np.float32))
    for top_p, kept in ((1e-9, 1), (0.499, 1), (0.501, 2), (0.749, 2), (0.751, 3), (0.874, 3), (0.876, 4), (1.0, 4)):
        assert len(support(halves, Choice(4, temperature=1.0, top_p=top_p))) == kept, top_p


def test_top_p_reached_exactly_needs_no_more() -> None:
    assert support(np.zeros(4, np.float32), Choice(4, temperature=1.0, top_p=0.5)) == [0, 1]


def test_top_p_counts_what_top_k_has_left() -> None:
    # Of ten alike, top_k leaves four: 0.5 of those are two.
    assert support(np.zeros(10, np.float32), Choice(10, temperature=1.0, top_k=4, top_p=0.5)) == [0, 1]


# The random number


def test_the_random_number_is_splitmix64() -> None:
    # The first outputs of SplitMix64 from state 0, as in Vigna's splitmix64.c.
    known = (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F)
    for position, output in enumerate(known):
        assert uniform(0, position) == (output >> 11) / 2**53


@given(st.integers(0, 2**64 - 1), st.integers(0, 10**7))
def test_random_numbers_lie_in_the_half_open_interval(seed: int, position: int) -> None:
    assert 0.0 <= uniform(seed, position) < 1.0
    assert uniform(seed, position) == uniform(seed, position)


def test_random_numbers_are_even_over_positions_and_over_seeds() -> None:
    for numbers in ([uniform(7, n) for n in range(4000)], [uniform(n, 7) for n in range(4000)]):
        counts, _ = np.histogram(numbers, 16, (0, 1))
        assert ((counts - 250) ** 2 / 250).sum() < 44.3  # chi-squared with 15 degrees of freedom: 1 in 10,000

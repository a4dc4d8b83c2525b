"""The one meaning of sampling, against a slow and obvious implementation of it, known values, and statistics."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2_local.backends.base import Choice
from qwen2_local.sampling import choose, uniform

LOGITS = np.array([1.0, 3.0, -2.0, 3.0, 0.5, 2.0], np.float32)


def obvious(logits, choice: Choice) -> list[tuple[float, int]]:
    """(probability, id) of every id that may be chosen, likeliest first; of alike ones the lower id first."""
    scores = [float(x) for x in logits[: choice.limit]]
    for token in set(choice.penalized):
        if token < len(scores):
            scores[token] = scores[token] / choice.repetition_penalty if scores[token] > 0 else scores[token] * choice.repetition_penalty
    order = sorted(range(len(scores)), key=lambda token: (-scores[token], token))
    if choice.temperature == 0:
        return [(1.0, order[0])]
    if choice.top_k:
        order = order[: choice.top_k]
    weights = [math.exp((scores[token] - scores[order[0]]) / choice.temperature) for token in order]
    total = sum(weights)
    kept, mass = [], 0.0
    for weight, token in zip(weights, order, strict=True):
        kept.append((weight, token))
        mass += weight / total
        if mass >= choice.top_p:
            break
    total = sum(weight for weight, _ in kept)
    return [(weight / total, token) for weight, token in kept]


def support(logits, choice: Choice, steps: int = 2000) -> list[int]:
    """The ids that some uniform number chooses, in the order of the uniform number."""
    found: list[int] = []
    for step in range(steps):
        token = choose(logits, replace(choice, step / steps))
        if not found or found[-1] != token:
            found.append(token)
    return found


def replace(choice: Choice, number: float) -> Choice:
    return Choice(choice.limit, choice.temperature, choice.top_p, choice.top_k, choice.repetition_penalty, choice.penalized, number)


# Greedy


def test_greedy_takes_the_largest_and_of_alike_ones_the_lowest_id() -> None:
    assert choose(LOGITS, Choice(6)) == 1
    assert choose(LOGITS, Choice(6, uniform=0.999)) == 1


def test_ids_from_the_limit_on_are_never_chosen() -> None:
    padded = np.array([0.0, 1.0, 50.0, 60.0], np.float32)
    assert choose(padded, Choice(2)) == 1
    assert choose(padded, Choice(100)) == 3
    assert support(padded, Choice(2, temperature=50.0)) == [1, 0]


def test_a_limit_of_one_leaves_no_choice() -> None:
    assert choose(LOGITS, Choice(1, temperature=1.0, uniform=0.9)) == 0


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_no_number_no_token(temperature: float) -> None:
    for bad in (math.nan, math.inf):
        logits = LOGITS.copy()
        logits[4] = bad
        assert choose(logits, Choice(6, temperature=temperature)) == -1
        assert choose(logits, Choice(4, temperature=temperature, uniform=0.0)) == 1, "what is past the limit does not matter"
    assert choose(np.full(6, -math.inf, np.float32), Choice(6, temperature=temperature)) == -1


def test_minus_infinity_is_a_token_that_never_comes() -> None:
    logits = np.array([-math.inf, 0.0, -math.inf], np.float32)
    assert support(logits, Choice(3, temperature=1.0)) == [1]


def test_the_logits_stay_as_they_are() -> None:
    logits = LOGITS.copy()
    choose(logits, Choice(6, temperature=0.5, top_k=2, top_p=0.5, repetition_penalty=1.5, penalized=(0, 1)))
    np.testing.assert_array_equal(logits, LOGITS)
    logits.flags.writeable = False
    assert choose(logits, Choice(6, repetition_penalty=2.0, penalized=(1,))) == 3


# Repetition penalty


def test_the_penalty_divides_what_is_above_zero_and_multiplies_what_is_below() -> None:
    """As Hugging Face's RepetitionPenaltyLogitsProcessor: a seen token becomes less likely, whatever its sign."""
    assert choose(np.array([3.0, 2.9], np.float32), Choice(2, repetition_penalty=1.1, penalized=(0,))) == 1
    assert choose(np.array([-2.9, -3.0], np.float32), Choice(2, repetition_penalty=1.1, penalized=(0,))) == 1
    assert choose(np.array([-3.0, -2.9], np.float32), Choice(2, repetition_penalty=0.9, penalized=(0,))) == 0


def test_the_penalty_counts_a_token_once_and_ignores_those_past_the_limit() -> None:
    logits = np.array([3.0, 2.0, 9.0], np.float32)
    assert choose(logits, Choice(2, repetition_penalty=1.4, penalized=(0, 0, 2, 500))) == 0


def test_the_penalty_comes_before_the_temperature() -> None:
    choice = Choice(2, temperature=2.0, repetition_penalty=2.0, penalized=(0,))
    # 4 / 2 = 2 against 1: e^(1 / 2) of 1 + e^(1 / 2).
    edge = math.exp(0.5) / (1 + math.exp(0.5))
    logits = np.array([4.0, 1.0], np.float32)
    assert [choose(logits, replace(choice, edge + offset)) for offset in (-1e-6, 1e-6)] == [0, 1]


# Temperature, top_k, top_p


def test_temperature_divides_the_logits() -> None:
    logits = np.array([1.0, 0.0], np.float32)
    for temperature in (0.25, 1.0, 4.0):
        edge = 1 / (1 + math.exp(-1 / temperature))
        choice = Choice(2, temperature=temperature)
        assert [choose(logits, replace(choice, edge + offset)) for offset in (-1e-6, 1e-6)] == [0, 1]


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


# The whole


def test_draws_have_the_exact_probabilities() -> None:
    random = np.random.default_rng(5)
    logits = random.normal(0, 2, 50).astype(np.float32)
    choice = Choice(48, temperature=1.3, top_k=24, top_p=0.97, repetition_penalty=1.2, penalized=(3, 5, 8, 13))
    expected = obvious(logits, choice)
    draws = 20_000
    counts: dict[int, int] = {}
    for position in range(draws):
        token = choose(logits, replace(choice, uniform(11, position)))
        counts[token] = counts.get(token, 0) + 1
    assert set(counts) <= {token for _, token in expected}
    squared = sum((counts.get(token, 0) - draws * p) ** 2 / (draws * p) for p, token in expected)
    freedom = len(expected) - 1
    assert freedom > 10
    # Wilson and Hilferty's approximation of the point that 1 in 10,000 exceeds.
    assert squared < freedom * (1 - 2 / (9 * freedom) + 3.719 * math.sqrt(2 / (9 * freedom))) ** 3


finite = st.floats(-50, 50, width=32)
choices = st.builds(
    Choice,
    st.integers(1, 40),
    temperature=st.sampled_from([0.0, 0.1, 0.7, 1.0, 3.0]),
    top_p=st.floats(0.01, 1.0),
    top_k=st.integers(0, 40),
    repetition_penalty=st.sampled_from([1.0, 0.8, 1.1, 2.0]),
    penalized=st.lists(st.integers(0, 45), max_size=6, unique=True).map(tuple),
    uniform=st.floats(0.0, 1.0, exclude_max=True),
)


@given(st.lists(finite, min_size=1, max_size=40), choices)
def test_every_choice_is_one_that_the_obvious_way_allows(values: list[float], choice: Choice) -> None:
    logits = np.array(values, np.float32)
    token = choose(logits, choice)
    allowed = obvious(logits, choice)
    ids = [kept for _, kept in allowed]
    if token not in ids:
        # Rounding may move an edge: then it is alike to the last one that is kept, or the next one after it.
        longer = [kept for _, kept in obvious(logits, Choice(choice.limit, choice.temperature, min(1.0, choice.top_p + 1e-6), *_rest(choice)))]
        assert token in longer
    elif 1e-6 < choice.uniform < 1 - 1e-6:
        below = sum(p for p, kept in allowed[: ids.index(token)])
        assert below - 1e-5 <= choice.uniform <= below + allowed[ids.index(token)][0] + 1e-5


def _rest(choice: Choice):
    return choice.top_k, choice.repetition_penalty, choice.penalized, choice.uniform


@given(st.lists(finite, min_size=1, max_size=40), choices, st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True))
def test_a_larger_random_number_never_gives_a_likelier_token(values: list[float], choice: Choice, one: float, other: float) -> None:
    logits = np.array(values, np.float32)
    ranks = {token: rank for rank, (_, token) in enumerate(obvious(logits, Choice(choice.limit, choice.temperature, 1.0, *_rest(choice))))}
    low, high = (choose(logits, replace(choice, number)) for number in sorted((one, other)))
    assert ranks[low] <= ranks[high]


@pytest.mark.parametrize("spread", [0.5, 3.0, 8.0])
@pytest.mark.parametrize("top_p", [1.0, 0.8, 0.999])
def test_a_vocabulary_of_real_size_is_drawn_from_as_if_sorted_whole(spread: float, top_p: float) -> None:
    # Flat, usual and peaked: the shortlist of the likeliest decides in some, all of them in others.
    random = np.random.default_rng(7)
    logits = (random.standard_normal(20_000) * spread).astype(np.float32)
    order = np.lexsort((np.arange(logits.size), -logits))
    weights = np.exp((logits[order].astype(np.float64) - float(logits.max())) / 0.7)
    for number in random.random(20):
        cumulative = np.cumsum(weights)
        if top_p < 1.0:
            cumulative = cumulative[: int(np.searchsorted(cumulative, top_p * cumulative[-1])) + 1]
        expected = int(order[np.searchsorted(cumulative, number * cumulative[-1], side="right")])
        assert choose(logits, Choice(logits.size, temperature=0.7, top_p=top_p, uniform=float(number))) == expected

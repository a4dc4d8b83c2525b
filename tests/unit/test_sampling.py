"""The one meaning of sampling, against a slow and obvious implementation of it, known values, and statistics."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2_local.backends.base import Choice
from qwen2_local.sampling import Window, choose, distribution, reference, score, uniform
from qwen2_local.types import Sampling
from tests.support.statistics import chi_squared_fits

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


# min_p, presence, frequency, bias, mask


def test_min_p_keeps_what_is_likely_enough_beside_the_likeliest() -> None:
    logits = np.log(np.array([0.5, 0.25, 0.125, 0.125], np.float32))
    for min_p, kept in ((0.0, 4), (0.2, 4), (0.26, 2), (0.49, 2), (0.51, 1), (1.0, 1)):
        assert len(support(logits, Choice(4, temperature=1.0, min_p=min_p))) == kept, min_p


def test_min_p_looks_at_probabilities_after_the_temperature() -> None:
    logits = np.log(np.array([0.5, 0.25], np.float32))  # at temperature 2 the second is 0.71 of the first
    assert len(support(logits, Choice(2, temperature=2.0, min_p=0.7))) == 2
    assert len(support(logits, Choice(2, temperature=1.0, min_p=0.7))) == 1


def test_presence_counts_once_and_frequency_each_time() -> None:
    logits = [3.0, 2.5, 0.0]
    seen = {"counted": ids(0), "counts": ids(3)}
    assert token(logits, Choice(3, presence_penalty=0.4, **seen)) == 0
    assert token(logits, Choice(3, presence_penalty=0.6, **seen)) == 1
    assert token(logits, Choice(3, frequency_penalty=0.2, **seen)) == 1
    assert token(logits, Choice(3, frequency_penalty=0.1, presence_penalty=0.1, **seen)) == 0
    assert token([-1.0, -2.0], Choice(2, presence_penalty=-2.0, counted=ids(1), counts=ids(1))) == 1, "below zero it makes likelier"


def test_bias_comes_before_the_repetition_penalty() -> None:
    # (1 + 3) / 2 = 2 against 2.5; the other way round it would be 1 / 2 + 3.
    assert token([1.0, 2.5], Choice(2, logit_bias={0: 3.0}, repetition_penalty=2.0, penalized=ids(0))) == 1
    assert token([1.0, 2.5], Choice(2, logit_bias={0: 2.0, 9: 100.0})) == 0


def test_a_mask_allows_what_its_bits_name_and_nothing_past_its_end() -> None:
    logits = np.arange(70, dtype=np.float32)
    for allowed, best in (([0], 0), ([31, 3], 31), ([32, 5], 32), ([69], 69), (range(70), 69), (range(0, 70, 2), 68)):
        assert token(logits, Choice(70, mask=lambda of=allowed: mask_of(of, 70))) == best
    assert token(logits, Choice(70, mask=lambda: mask_of(range(40), 40))) == 39
    assert token(logits, Choice(20, mask=lambda: mask_of([5, 60], 70))) == 5
    assert support(logits, Choice(70, temperature=50.0, top_k=3, mask=lambda: mask_of([1, 33, 65, 66], 70))) == [66, 65, 33]


def test_a_mask_without_a_token_gives_none() -> None:
    for temperature in (0.0, 1.0):
        assert token(LOGITS, Choice(6, temperature=temperature, mask=lambda: mask_of([], 6))) == -1


def test_what_is_masked_never_comes_however_it_is_favoured() -> None:
    favoured = Choice(6, temperature=100.0, logit_bias={1: 100.0}, repetition_penalty=0.01, penalized=ids(1), mask=lambda: mask_of([2, 4], 6))
    assert support(LOGITS, favoured) == [4, 2]


def test_absurd_penalties_and_logits_still_give_a_token() -> None:
    logits = [3e38, -3e38, 1.0]
    for penalty in (1e-9, 100.0):
        assert token(logits, Choice(3, repetition_penalty=penalty, penalized=ids(0, 1))) == 0
    assert token([-3e38, -math.inf], Choice(2, repetition_penalty=100.0, penalized=ids(0, 1), logit_bias={0: -100.0})) == 0


# Log-probabilities


def test_log_probabilities_are_the_models_own() -> None:
    """What changes the choice does not change them; ids past the limit have no part in them."""
    logits = np.array([1.0, 2.0, 0.0, 9.0], np.float32)
    total = math.log(math.exp(1) + math.exp(2) + 1)
    changed = Choice(3, temperature=0.1, logit_bias={0: 50.0}, repetition_penalty=5.0, penalized=ids(1), top_logprobs=2)
    chosen = choose(logits, changed)
    assert chosen.token == 0
    assert chosen.logprob == pytest.approx(1 - total, abs=1e-6)
    assert [number for number, _ in chosen.top] == [1, 0]
    assert [logprob for _, logprob in chosen.top] == pytest.approx([2 - total, 1 - total], abs=1e-6)
    assert choose(logits, replace(changed, top_logprobs=0)).top == ()
    assert choose(logits, Choice(3)).logprob is None
    assert len(choose(logits, Choice(3, top_logprobs=20)).top) == 3


def test_scores_say_how_likely_each_target_was() -> None:
    random = np.random.default_rng(1)
    logits = random.normal(0, 3, (5, 3000)).astype(np.float32)
    targets = [int(logits[0, :2900].argmax()), 5, 2899, 0, 17]
    scores = score(logits, targets, 2900)
    wide = logits[:, :2900].astype(np.float64)
    expected = wide[range(5), targets] - np.log(np.exp(wide).sum(axis=1))
    np.testing.assert_allclose(scores.logprobs, expected, atol=1e-6)
    assert scores.greedy.tolist() == [True, False, False, False, False]


# The window


@pytest.mark.parametrize("size", [None, 1, 3, 100])
def test_the_window_holds_what_a_recount_holds(size: int | None) -> None:
    @given(st.lists(st.integers(0, 9), max_size=12), st.lists(st.integers(0, 9) | st.integers(-4, -1), max_size=30))
    def check(prompt: list[int], moves: list[int]) -> None:
        """A move is a token of the reply, or, below zero, how many to take back."""
        window = Window(prompt, Sampling(repetition_penalty=1.1, presence_penalty=0.5, penalty_window=size))
        reply: list[int] = []
        for move in moves:
            if move >= 0:
                window.add(move)
                reply.append(move)
            else:
                count = min(-move, len(reply))
                window.drop(count)
                reply = reply[: len(reply) - count]
            seen = (prompt + reply)[-(size or 10**6) :]
            own = reply[-(size or 10**6) :]
            choice = window.choice(10, 0.5)
            assert sorted(choice.penalized.tolist()) == sorted(set(seen))
            assert dict(zip(choice.counted.tolist(), choice.counts.tolist(), strict=True)) == Counter(own)

    check()


def test_a_choice_does_not_change_with_what_comes_after_it() -> None:
    window = Window([1, 2], Sampling(repetition_penalty=1.1, frequency_penalty=1.0))
    window.add(3)
    choice = window.choice(10, 0.5)
    for number in range(100):
        window.add(number)
    window.drop(100)
    assert sorted(choice.penalized.tolist()) == [1, 2, 3]
    assert (choice.counted.tolist(), choice.counts.tolist()) == ([3], [1])


def test_a_window_passes_on_what_sampling_says() -> None:
    sampling = Sampling(0.7, 0.8, 20, 1.0, 4, min_p=0.1, logit_bias={3: 2.0})
    allowed = mask_of([1], 5)
    choice = Window([1], sampling).choice(5, 0.25, mask=lambda: allowed, top_logprobs=3)
    told = (choice.limit, choice.temperature, choice.top_p, choice.top_k, choice.min_p, choice.uniform, choice.logit_bias, choice.top_logprobs)
    assert told == (5, 0.7, 0.8, 20, 0.1, 0.25, {3: 2.0}, 3)
    assert choice.mask is not None and choice.mask() is allowed
    assert len(choice.penalized) == len(choice.counted) == 0, "no penalty, nothing to count"


# The whole


def test_draws_have_the_exact_distribution() -> None:
    random = np.random.default_rng(5)
    logits = random.normal(0, 2, 50).astype(np.float32)
    window = Window([3, 5, 8, 13], Sampling(1.3, 0.97, 24, 1.2, min_p=0.01, presence_penalty=0.3, frequency_penalty=0.1, logit_bias={7: 1.0}))
    for number in (3, 7, 7, 40):
        window.add(number)
    choice = window.choice(48, 0.0, mask=lambda: mask_of(set(range(48)) - {11, 30}, 48))
    expected = distribution(logits, choice)
    assert sum(expected.values()) == pytest.approx(1)
    assert len(expected) > 10
    draws = Counter(choose(logits, replace(choice, uniform=uniform(11, position))).token for position in range(20_000))
    assert chi_squared_fits(draws, expected)


def logit_values(most: int):
    """Rows with ties, huge values and minus infinity among them."""
    value = st.floats(-50, 50, width=32) | st.sampled_from([0.0, -0.0, 1.0, 30.0, -math.inf, 3e38, -3e38])
    return st.lists(value, min_size=1, max_size=most)


penalized = st.lists(st.integers(0, 45), max_size=6, unique=True)
choices = st.builds(
    lambda counted, mask, **values: Choice(
        **values,
        counted=ids(*counted),
        counts=ids(*counted.values()),
        mask=None if mask is None else lambda: mask_of(mask, 40),
    ),
    limit=st.integers(1, 40),
    temperature=st.sampled_from([0.0, 0.1, 0.7, 1.0, 3.0]),
    top_p=st.floats(0.01, 1.0),
    top_k=st.integers(0, 40),
    min_p=st.just(0.0) | st.floats(0.0, 1.0),
    repetition_penalty=st.sampled_from([1.0, 0.8, 1.1, 2.0]),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.sampled_from([0.0, 0.5, -2.0]),
    uniform=st.floats(0.0, 1.0, exclude_max=True),
    penalized=penalized.map(lambda numbers: ids(*numbers)),
    counted=st.dictionaries(st.integers(0, 45), st.integers(1, 9), max_size=6),
    logit_bias=st.dictionaries(st.integers(0, 45), st.floats(-100, 100), max_size=4),
    mask=st.none() | st.sets(st.integers(0, 39), max_size=30),
    top_logprobs=st.none() | st.integers(0, 5),
)


def at_an_edge(logits, choice: Choice) -> set[int]:
    """What the reference chooses with each number moved a little: rounding may do as much."""
    moved = set()
    for du, dp, dm in itertools.product((-1e-6, 0, 1e-6), repeat=3):
        number = min(max(choice.uniform + du, 0.0), 1 - 2**-53)
        top_p = min(max(choice.top_p + dp, 1e-9), 1.0)
        moved.add(reference(logits, replace(choice, uniform=number, top_p=top_p, min_p=min(max(choice.min_p + dm, 0.0), 1.0))).token)
    return moved


@settings(max_examples=400)
@given(logit_values(45), choices)
def test_the_fast_way_chooses_as_the_plain_one(values: list[float], choice: Choice) -> None:
    logits = np.array(values, np.float32)
    fast, plain = choose(logits, choice), reference(logits, choice)
    if fast.token != plain.token:
        assert fast.token in at_an_edge(logits, choice)
    elif plain.logprob is not None:
        assert fast.logprob == pytest.approx(plain.logprob, rel=1e-6, abs=1e-6)
        assert [number for number, _ in fast.top] == [number for number, _ in plain.top]


@given(logit_values(45), choices, st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True))
def test_a_larger_random_number_never_gives_a_likelier_token(values: list[float], choice: Choice, one: float, other: float) -> None:
    logits = np.array(values, np.float32)
    choice = replace(choice, logit_bias={}, penalized=ids(), counted=ids(), counts=ids())
    low, high = (choose(logits, replace(choice, uniform=number)).token for number in sorted((one, other)))
    if low >= 0:
        assert (-logits[low], low) <= (-logits[high], high)


@pytest.mark.parametrize("spread", [0.0, 0.5, 3.0, 8.0])
@pytest.mark.parametrize("cut", [{}, {"top_p": 0.8}, {"top_p": 0.999}, {"min_p": 0.02}, {"top_k": 20, "top_p": 0.8}, {"top_k": 5000}])
def test_a_vocabulary_of_real_size_is_drawn_from_as_if_sorted_whole(spread: float, cut: dict) -> None:
    # Even, flat, usual and peaked: the shortlist of the likeliest decides in some, all of them in others.
    random = np.random.default_rng(7)
    logits = (random.standard_normal(20_000) * spread).astype(np.float32)
    order = np.lexsort((np.arange(logits.size), -logits))
    weights = np.exp((logits[order].astype(np.float64) - float(logits.max())) / 0.7)[: cut.get("top_k")]
    cumulative = np.cumsum(weights)
    kept = 1 + int(np.searchsorted(cumulative, cut["top_p"] * cumulative[-1])) if "top_p" in cut else len(weights)
    kept = min(kept, int((weights >= cut.get("min_p", 0.0)).sum()))
    cumulative = cumulative[:kept]
    for number in random.random(20):
        expected = {int(order[np.searchsorted(cumulative, (number + moved) * cumulative[-1], side="right")]) for moved in (-1e-7, 0, 1e-7)}
        assert choose(logits, Choice(logits.size, temperature=0.7, uniform=float(number), **cut)).token in expected

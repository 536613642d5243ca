"""The one-sided bounds of the gate against float64 loops over all outcomes, and their rate of errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binom, norm

from bfpo.core.errors import SettingError
from bfpo.stats import difference_floor, rate_bound
from bfpo.stats.clustered import difference_bounds
from messages import raises

TOO_HIGH = 2e-6  # what rounding and the search for the worst rates may add to a chance


def lists(favour: int, against: int, num: int) -> tuple[list[float], list[float]]:
    same = [0.0] * (num - favour - against)
    return [1.0] * favour + [0.0] * against + same, [0.0] * favour + [1.0] * against + same


def statistic(b: int, c: int, n: int, z: float) -> float:
    values = [1.0] * (b + 1) + [-1.0] * (c + 1) + [0.0] * (n - b - c)  # one pair added that favours each model
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / len(values)
    return mean - z * math.sqrt(variance / len(values))


def chance(outcomes: list[tuple[int, int]], n: int, difference: float, against: float) -> float:
    p, q = against + difference, against
    total = 0.0
    for b, c in outcomes:
        ways = math.comb(n, b) * math.comb(n - b, c)
        total += ways * p**b * q**c * max(0.0, 1 - p - q) ** (n - b - c)
    return total


def worst_chance(outcomes: list[tuple[int, int]], n: int, difference: float, steps: int = 400) -> float:
    least, most = max(0.0, -difference), (1 - difference) / 2
    return max(chance(outcomes, n, difference, least + (most - least) * k / steps) for k in range(steps + 1))


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
@pytest.mark.parametrize(
    ("b", "c", "n"), [(0, 0, 1), (1, 0, 1), (0, 1, 2), (0, 0, 4), (3, 0, 5), (2, 1, 5), (1, 3, 6), (6, 0, 6)]
)
def test_the_bound_is_the_difference_under_which_the_outcome_is_too_rare(
    b: int, c: int, n: int, confidence: float
) -> None:
    z = min(float(norm.ppf(confidence)), 2.8)
    seen = statistic(b, c, n, z)
    every = [(i, j) for i in range(n + 1) for j in range(n + 1 - i)]
    outcomes = [one for one in every if statistic(*one, n, z) >= seen - 1e-12]
    bound = difference_floor(*lists(b, c, n), confidence=confidence)
    assert bound is not None
    assert worst_chance(outcomes, n, bound) <= 1 - confidence + TOO_HIGH
    assert worst_chance(outcomes, n, bound + 1e-4) > 1 - confidence


@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_no_rates_make_the_bound_wrong_more_often_than_it_says(confidence: float) -> None:
    n = 8
    bounds = {
        (b, c): difference_floor(*lists(b, c, n), confidence=confidence) for b in range(n + 1) for c in range(n + 1 - b)
    }
    for limit in sorted({bound for bound in bounds.values() if bound is not None and bound > -1}):
        passing = [one for one, bound in bounds.items() if bound is not None and bound >= limit]
        assert worst_chance(passing, n, limit, steps=60) <= 1 - confidence + TOO_HIGH


def test_one_side_of_the_two_sided_interval_would_be_wrong_more_often() -> None:
    n, limit, confidence = 200, -0.05, 0.95
    shares = binom.pmf(np.arange(n + 1), n, -limit)  # of 200 prompts, none favours the model, a few the other

    def passes(c: int) -> bool:
        means = np.array([-1.0] * c + [0.0] * (n - c))
        return bool(difference_bounds(means, np.ones(n), 2 * confidence - 1)[0] >= limit)

    assert sum(share for c, share in enumerate(shares[:30]) if passes(c)) > 0.06
    ours = sum(share for c, share in enumerate(shares[:30]) if (difference_floor(*lists(0, c, n)) or 0) >= limit)
    assert 0.02 < ours <= 0.05


def test_all_prompts_of_one_kind() -> None:
    assert difference_floor([], []) is None
    for n in (1, 3, 40):
        won = difference_floor([1.0] * n, [0.0] * n)
        assert won == pytest.approx(2 * 0.05 ** (1 / n) - 1, abs=1e-5)  # the worst rates have p + q = 1
        assert difference_floor([0.0] * n, [1.0] * n) == -1.0
    alike = [difference_floor([1.0] * n, [1.0] * n) for n in (1, 10, 100, 1000)]
    assert alike == sorted(alike)  # type: ignore[type-var]
    assert alike[2] == pytest.approx(-(1 - 0.05 ** (1 / 100)), abs=2e-3)  # none of 100: exactly a rate of 3%
    assert alike[3] is not None
    assert -0.004 < alike[3] < -0.0029


def test_more_is_better_and_swapped_lists_give_the_upper_bound() -> None:
    n = 60
    bounds = [difference_floor(*lists(b, 5, n)) for b in (0, 1, 5, 10, 30)]
    assert bounds == sorted(bounds)  # type: ignore[type-var]
    first, second = lists(10, 5, n)
    low, swapped = difference_floor(first, second), difference_floor(second, first)
    assert low is not None
    assert swapped is not None
    assert low < 5 / 60 < -swapped
    assert difference_floor(first, second, confidence=0.99) < low  # type: ignore[operator]


def test_graded_values_and_several_answers_per_prompt_are_not_better_than_their_prompts() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.random(50), rng.random(50)
    bound = difference_floor(list(first), list(second))
    one_side = float(difference_bounds(first - second, np.ones(50), 0.9)[0])
    assert bound is not None
    assert bound <= one_side
    assert bound == pytest.approx(one_side, abs=0.01)
    favour, against = lists(20, 6, 50)
    once = difference_floor(favour, against)
    twice = difference_floor(favour * 2, against * 2, [*range(50), *range(50)])
    assert once is not None
    assert twice is not None
    assert once - 0.02 < twice <= once + 1e-9
    apart = difference_floor(favour * 2, against * 2)
    assert apart is not None
    assert apart > once + 0.02


def test_the_bound_of_a_rate_is_exact_and_one_sided() -> None:
    for hits, num in ((0, 5), (4, 5), (5, 5), (90, 100)):
        values = [1.0] * hits + [0.0] * (num - hits)
        low, high = rate_bound(values), rate_bound(values, upper=True)
        assert low is not None
        assert high is not None
        if hits:  # P(X >= hits) is 5% at the lower bound
            assert binom.sf(hits - 1, num, low) == pytest.approx(0.05)
        if hits < num:
            assert binom.cdf(hits, num, high) == pytest.approx(0.05)
    assert (rate_bound([0.0] * 5), rate_bound([1.0] * 5, upper=True), rate_bound([])) == (0.0, 1.0, None)


@pytest.mark.parametrize("confidence", [0.5, 1.0, 0.2])
def test_a_bound_needs_a_confidence_above_one_half(confidence: float) -> None:
    with raises(SettingError, "confidence"):
        difference_floor([1.0], [0.0], confidence=confidence)
    with raises(SettingError, "confidence"):
        rate_bound([1.0], confidence=confidence)


def test_a_bound_needs_pairs() -> None:
    with raises(SettingError, "first", "second"):
        difference_floor([1.0], [0.0, 1.0])

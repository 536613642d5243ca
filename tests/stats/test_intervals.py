from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta, binomtest

from bfpo.core.errors import SettingError
from bfpo.stats import (
    Interval,
    between_seed_sd,
    cluster_bootstrap,
    paired_difference,
    rate_interval,
    upper_bound_of_zero,
    wilson,
)
from messages import raises


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_the_formula_and_scipys(counts: tuple[int, int]) -> None:
    k, n = counts
    got = wilson(k, n)
    z = 1.959963984540054
    p = k / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    assert got.value == p
    assert got.low == pytest.approx(max(0.0, centre - half), abs=1e-12)
    assert got.high == pytest.approx(min(1.0, centre + half), abs=1e-12)
    bounds = binomtest(k, n).proportion_ci(confidence_level=0.95, method="wilson")
    assert (got.low, got.high) == (bounds.low, bounds.high)


def test_nothing_counted_has_no_value() -> None:
    nothing = Interval(None, None, None, 0)
    assert wilson(0, 0) == nothing
    assert rate_interval([]) == nothing
    assert cluster_bootstrap([]) == nothing
    assert paired_difference([], []) == nothing


@pytest.mark.parametrize("value", [0, 1])
def test_none_of_n_is_not_certain(value: int) -> None:
    alone = rate_interval([value] * 50)
    assert alone == wilson(50 * value, 50)
    # 50 answers to 5 prompts say no more than 5 answers would.
    clustered = rate_interval([value] * 50, [number // 10 for number in range(50)])
    few = wilson(5 * value, 5)
    assert (clustered.value, clustered.num) == (float(value), 50)
    assert (clustered.low, clustered.high) == (few.low, few.high)
    seeded = rate_interval(
        [value] * 50, [number % 25 for number in range(50)], seeds=[number // 25 for number in range(50)]
    )
    assert seeded.low is not None
    assert seeded.high is not None
    assert seeded.high - seeded.low > 0.05


def test_one_answer_per_prompt_is_wilsons() -> None:
    hits = [1, 0, 0, 1, 1, 1, 0]
    assert rate_interval(hits) == wilson(4, 7)
    assert rate_interval(hits, list("abcdefg")) == wilson(4, 7)
    assert rate_interval(hits, list("abcdefg"), seeds=[3] * 7) == wilson(4, 7)


def coverage(num_trials: int, interval_of: object, truth: float) -> float:
    inside = 0
    for trial in range(num_trials):
        interval = interval_of(trial)  # type: ignore[operator]
        inside += interval.low <= truth <= interval.high
    return inside / num_trials


def test_coverage_of_wilson() -> None:
    rng = np.random.default_rng(0)
    draws = rng.binomial(60, 0.9, size=1000)
    intervals = {int(k): wilson(int(k), 60) for k in set(draws)}
    assert 0.93 <= coverage(1000, lambda trial: intervals[int(draws[trial])], 0.9) <= 0.98


def test_coverage_of_the_bootstrap_on_clustered_answers() -> None:
    rng = np.random.default_rng(1)
    clusters = np.repeat(np.arange(60), 8)

    def hits(trial: int) -> list[float]:
        del trial
        rates = rng.beta(1.0, 1.0, size=60)
        return rng.binomial(1, np.repeat(rates, 8)).astype(float).tolist()

    data = [hits(trial) for trial in range(200)]

    def clustered(trial: int) -> Interval:
        return rate_interval(data[trial], clusters.tolist(), num_resamples=400)

    def naive(trial: int) -> Interval:
        return rate_interval(data[trial])

    assert coverage(200, clustered, 0.5) >= 0.90
    assert coverage(200, naive, 0.5) < 0.85  # what clustering is for


def test_seeds_that_differ_widen_the_interval() -> None:
    rng = np.random.default_rng(2)
    prompts = np.tile(np.arange(200), 3)
    seeds = np.repeat([0, 1, 2], 200)
    hits = rng.binomial(1, np.repeat([0.2, 0.5, 0.8], 200)).tolist()
    by_prompt = rate_interval(hits, prompts.tolist())
    by_both = rate_interval(hits, prompts.tolist(), seeds=seeds.tolist())
    assert by_both.high - by_both.low > 3 * (by_prompt.high - by_prompt.low)
    assert by_both.low < 0.25
    assert by_both.high > 0.75
    one_seed = rate_interval(hits, prompts.tolist(), seeds=[7] * 600)
    assert one_seed == by_prompt


def test_bootstrap_against_a_plain_loop() -> None:
    rng = np.random.default_rng(3)
    values = rng.normal(size=40)
    clusters = [number // 4 for number in range(40)]
    got = cluster_bootstrap(values, clusters, num_resamples=4000)
    means = []
    for _ in range(4000):
        chosen = rng.integers(0, 10, size=10)
        means.append(np.mean([values[number] for cluster in chosen for number in range(4 * cluster, 4 * cluster + 4)]))
    low, high = np.quantile(means, [0.025, 0.975])
    assert got.value == pytest.approx(values.mean())
    assert got.low == pytest.approx(low, abs=0.03)
    assert got.high == pytest.approx(high, abs=0.03)
    assert cluster_bootstrap(values, [0] * 40) == Interval(float(values.mean()), None, None, 40)


def test_pairing_narrows_the_difference() -> None:
    rng = np.random.default_rng(4)
    easy = rng.uniform(size=300)
    first = (easy > 0.4).astype(float).tolist()
    second = (easy > 0.5).astype(float).tolist()
    paired = paired_difference(first, second)
    shuffled = paired_difference(first, list(rng.permutation(second)))
    assert paired.value == pytest.approx(np.mean(first) - np.mean(second))
    assert paired.low > 0
    assert paired.high - paired.low < 0.6 * (shuffled.high - shuffled.low)
    backwards = paired_difference(second, first)
    assert (backwards.low, backwards.high) == pytest.approx((-paired.high, -paired.low), abs=0.01)


def test_no_difference_seen_is_not_no_difference() -> None:
    same = paired_difference([1, 0, 1, 1] * 10, [1, 0, 1, 1] * 10)
    bound = wilson(0, 40).high
    assert same == Interval(0.0, -bound, bound, 40)  # type: ignore[operator]
    assert paired_difference([1] * 9, [0] * 9).high == 1.0


@given(st.integers(1, 3000), st.sampled_from([0.8, 0.9, 0.95, 0.99]))
def test_zero_of_n_leaves_what_would_be_seen_as_zero_often_enough(num: int, confidence: float) -> None:
    bound = upper_bound_of_zero(num, confidence=confidence)
    assert bound is not None
    assert (1 - bound) ** num == pytest.approx(1 - confidence, rel=1e-6)
    assert bound == pytest.approx(beta.ppf(confidence, 1, num), rel=1e-6)


def test_zero_of_n_against_the_rule_of_three() -> None:
    assert upper_bound_of_zero(30) == pytest.approx(0.09503385285530414, rel=1e-9)  # statsmodels 0.15, "beta", 2 x 5%
    for num in (20, 100, 1000):
        assert 0.9 * 3 / num < upper_bound_of_zero(num) < 3 / num  # type: ignore[operator]
    assert upper_bound_of_zero(0) is None
    assert upper_bound_of_zero(1) == pytest.approx(0.95)


def test_seed_spread_by_hand() -> None:
    # Means .5, .7, .9: sd .2; chi-square with 2 degrees of freedom is exponential, its quantiles -2 ln(1 - q).
    got = between_seed_sd([0.4, 0.6, 0.7, 0.9, 0.9], ["a", "a", "b", "c", "c"])
    assert got.num == 3
    assert got.value == pytest.approx(0.2)
    assert got.low == pytest.approx(0.2 * (2 / (-2 * np.log(0.025))) ** 0.5)
    assert got.high == pytest.approx(0.2 * (2 / (-2 * np.log(0.975))) ** 0.5)


def test_one_seed_and_equal_seeds_say_little() -> None:
    assert between_seed_sd([], []) == Interval(None, None, None, 0)
    assert between_seed_sd([0.1, 0.9], [4, 4]) == Interval(None, None, None, 1)
    assert between_seed_sd([0.3, 0.3, 0.1 + 0.2], [1, 2, 3]) == Interval(0.0, None, None, 3)


def test_coverage_of_the_seed_spread() -> None:
    means = np.random.default_rng(5).normal(0.7, 0.05, size=(1000, 4))
    found = coverage(1000, lambda trial: between_seed_sd(means[trial], range(4)), 0.05)
    assert 0.93 <= found <= 0.97


@pytest.mark.parametrize(
    ("call", "key"),
    [
        (lambda: wilson(3, 2), "successes, num"),
        (lambda: wilson(1, 2, confidence=95), "confidence"),
        (lambda: rate_interval([0.5, 1.5]), "hits"),
        (lambda: rate_interval([0.5, float("nan")]), "hits"),
        (lambda: rate_interval([0, 1], ["a"]), "clusters"),
        (lambda: cluster_bootstrap([float("inf")]), "values"),
        (lambda: cluster_bootstrap([1.0], num_resamples=0), "num_resamples"),
        (lambda: paired_difference([0, 1], [1]), "first, second"),
        (lambda: upper_bound_of_zero(-1), "num"),
        (lambda: upper_bound_of_zero(5, confidence=1), "confidence"),
        (lambda: between_seed_sd([float("nan"), 0.1], [1, 2]), "values"),
        (lambda: between_seed_sd([0.2, 0.1], [1]), "seeds"),
    ],
)
def test_bad_values(call: object, key: str) -> None:
    with raises(SettingError, key):
        call()  # type: ignore[operator]

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta, binom, binomtest, norm
from scipy.stats import t as student

from benchmarks.coverage import METHODS, paired_coverage, rate_coverage
from bfpo.core.errors import SettingError
from bfpo.stats import (
    Interval,
    between_seed_sd,
    bootstrap_weights,
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
    assert paired_difference([], []) == nothing


def exact(k: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    bounds = binomtest(k, n).proportion_ci(confidence_level=confidence, method="exact")
    return bounds.low, bounds.high


def test_a_resample_draws_as_many_clusters_as_there_are_each_equally_likely() -> None:
    drawn = np.stack(list(bootstrap_weights(["a", "a", "b", "c", "c", "c", "d"], 20_000)))
    assert (drawn[:, [0, 2, 3, 5]] == drawn[:, [1, 2, 4, 5]]).all()  # a cluster as a whole
    num_drawn = drawn[:, [0, 2, 3, 6]]
    assert (num_drawn.sum(axis=1) == 4).all()
    for cluster in range(4):
        shares = np.bincount(num_drawn[:, cluster].astype(int), minlength=5) / len(num_drawn)
        np.testing.assert_allclose(shares, binom.pmf(range(5), 4, 1 / 4), atol=0.015)
    np.testing.assert_allclose(np.cov(num_drawn.T), np.eye(4) - 1 / 4, atol=0.03)


@pytest.mark.parametrize("value", [0, 1])
def test_none_of_n_is_not_certain(value: int) -> None:
    alone = rate_interval([value] * 50)
    assert (alone.low, alone.high) == pytest.approx(exact(50 * value, 50), abs=1e-12)
    assert (alone.low, alone.high)[value] == value  # exactly
    # 50 answers to 5 prompts say no more than 5 answers would, in however many trainings.
    few = exact(5 * value, 5)
    for seeds in (None, [number // 25 for number in range(50)]):
        clustered = rate_interval([value] * 50, [number % 5 for number in range(50)], seeds=seeds)
        assert (clustered.value, clustered.num) == (float(value), 50)
        assert (clustered.low, clustered.high) == pytest.approx(few, abs=1e-12)
        assert (clustered.low, clustered.high)[value] == value


@given(
    st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.sampled_from([0.8, 0.95, 0.99])
)
def test_one_answer_per_prompt_is_the_exact_interval(counts: tuple[int, int], confidence: float) -> None:
    k, n = counts
    found = rate_interval([1] * k + [0] * (n - k), [f"prompt {number}" for number in range(n)], confidence=confidence)
    assert found.value == k / n
    assert (found.low, found.high) == pytest.approx(exact(k, n, confidence), abs=1e-9)
    assert found == rate_interval([1] * k + [0] * (n - k), seeds=[3] * n, confidence=confidence)


def plain_bounds(values: list[list[float]], confidence: float) -> tuple[float, float]:
    """The interval in loops, with scipy.stats.beta: clusters of values in [0, 1], of any sizes."""
    num, count = sum(len(one) for one in values), len(values)
    mean = sum(map(sum, values)) / num
    kish = num**2 / sum(len(one) ** 2 for one in values)
    between = sum((sum(one) - mean * len(one)) ** 2 for one in values) / num**2 * kish * count / (count - 1)
    within = sum((value - mean) ** 2 for one in values for value in one) / num
    hit = min(sum(min(1, sum(one)) for one in values), sum(min(1, len(one) - sum(one)) for one in values))
    spread = mean * (1 - mean)
    graded = within / spread
    alike = min(1.0, max(between / within, kish / num))
    relative = (max(0.0, hit - 1) * alike + 5) / (max(0.0, hit - 1) + 5) * (hit * graded + 2) / (hit + 2)
    tail = (1 - confidence) / 2

    def bounds(rate: float, size: float) -> tuple[float, float]:
        low = beta.ppf(tail, rate * size, size - rate * size + 1) if rate > 0 else 0.0
        return low, beta.ppf(1 - tail, rate * size + 1, size - rate * size) if rate < 1 else 1.0

    low, high = bounds(mean, kish / relative)
    shares = [sum(one) / len(one) for one in values]
    return min(low, bounds(1 - (1 - min(shares)) / kish, kish)[0]), max(high, bounds(max(shares) / kish, kish)[1])


@pytest.mark.parametrize("confidence", [0.8, 0.95])
@pytest.mark.parametrize("kind", ["binary", "halves", "graded", "rare"])
def test_bounds_against_loops_on_odd_sizes(kind: str, confidence: float) -> None:
    rng = np.random.default_rng(7)
    draw = {
        "binary": lambda size: rng.binomial(1, rng.beta(0.5, 1.0), size).astype(float),
        "halves": lambda size: rng.choice([0.0, 0.5, 1.0], size),
        "graded": lambda size: rng.beta(20.0, 3.0, size),
        "rare": lambda size: rng.binomial(1, 0.02, size).astype(float),
    }[kind]
    for count in (2, 3, 17, 101):
        for sizes in ([1] * count, [3] * count, rng.integers(1, 9, count).tolist(), [1] * (count - 1) + [500]):
            values = [draw(size).tolist() for size in sizes]
            values[-1][0] = 0.25 if kind in ("halves", "graded") else 1.0
            flat = [value for one in values for value in one]
            names = [number for number, one in enumerate(values) for _ in one]
            if len(set(flat)) == 1:
                continue
            found = rate_interval(flat, names, confidence=confidence)
            assert found.value == pytest.approx(sum(flat) / len(flat), rel=1e-12)
            assert (found.low, found.high) == pytest.approx(plain_bounds(values, confidence), abs=1e-9)


def upper(counts: tuple[int, ...]) -> float:
    """The upper bound where `counts[k]` prompts have k hits in `len(counts) - 1` answers each."""
    answers = len(counts) - 1
    hits = [place < k for k, prompts in enumerate(counts) for _ in range(prompts) for place in range(answers)]
    found = rate_interval(hits, [number // answers for number in range(len(hits))])
    assert found.high is not None
    return found.high


def patterns(prompts: int, parts: int) -> Iterator[tuple[int, ...]]:
    if parts == 1:
        yield (prompts,)
        return
    for first in range(prompts + 1):
        for rest in patterns(prompts - first, parts - 1):
            yield (first, *rest)


@pytest.mark.parametrize(("prompts", "answers"), [(3, 2), (20, 2), (10, 3), (4, 4), (7, 4)])
def test_a_further_hit_never_lowers_the_upper_bound(prompts: int, answers: int) -> None:
    bounds = {counts: upper(counts) for counts in patterns(prompts, answers + 1)}
    for counts, bound in bounds.items():
        for k in range(answers):
            if counts[k]:
                further = list(counts)
                further[k], further[k + 1] = counts[k] - 1, counts[k + 1] + 1
                assert bounds[tuple(further)] >= bound - 1e-12, (counts, further)
    assert bounds[(prompts, *[0] * answers)] == pytest.approx(exact(0, prompts)[1])
    assert bounds[(*[0] * answers, prompts)] == 1.0


@pytest.mark.parametrize(("prompts", "answers"), [(5, 8), (3, 12), (40, 6)])
def test_with_many_answers_a_hit_never_goes_below_what_no_hit_leaves_open(prompts: int, answers: int) -> None:
    for hits in range(answers + 1):
        for others in range(0, prompts, 3):
            counts = [0] * (answers + 1)
            counts[0], counts[1] = prompts - others - 1, others
            counts[hits] += 1
            assert upper(tuple(counts)) >= exact(0, prompts)[1] - 1e-12


@pytest.mark.parametrize("kind", ["equal", "binary", "graded", "near the ends"])
def test_misses_have_the_interval_of_hits_turned_round(kind: str) -> None:
    rng = np.random.default_rng(11)
    for trial in range(60):
        sizes = rng.integers(1, 9, int(rng.integers(1, 12)))
        names, num = np.repeat(np.arange(len(sizes)), sizes).tolist(), int(sizes.sum())
        values = {
            "equal": np.full(num, rng.random()),  # the variance is nothing but rounding
            "binary": rng.integers(0, 2, num).astype(float),
            "graded": rng.random(num),
            "near the ends": rng.choice([0.0, 1e-12, 1 - 1e-12, 1.0], num),
        }[kind]
        settings = {"confidence": [0.5, 0.95, 0.999][trial % 3]}
        seeds = rng.integers(0, 3, num).tolist() if trial % 4 == 0 else None
        found = rate_interval(values.tolist(), names, seeds=seeds, **settings)
        turned = rate_interval((1 - values).tolist(), names, seeds=seeds, **settings)
        assert 0 <= found.low <= found.value <= found.high <= 1
        assert (found.low, found.high) == pytest.approx((1 - turned.high, 1 - turned.low), abs=1e-6)


def test_where_the_hits_are_matters() -> None:
    together, apart = [1, 1] + [0] * 38, [1, 0, 1, 0] + [0] * 36
    prompts = [number // 2 for number in range(40)]
    assert rate_interval(together, prompts).high > rate_interval(apart, prompts).high
    # The order of the rows, and names of prompts, do not.
    order = np.random.default_rng(0).permutation(40)
    shuffled = rate_interval([together[n] for n in order], [f"p{prompts[n]}" for n in order])
    plain = rate_interval(together, prompts)
    assert (shuffled.low, shuffled.high) == pytest.approx((plain.low, plain.high))


def test_coverage_over_the_grid() -> None:
    """A reduced form of `python -m benchmarks.coverage`, with fixed seeds; see docs/evaluation.md."""
    grid = {"prompts": (10, 50, 100), "answers": (1, 2, 4), "rates": (0.01, 0.05, 0.2, 0.5)}
    cells = list(rate_coverage(grid, 400))
    # 400 trials: .94 less 2.2 standard errors, for the lowest of 180 cells.
    lowest = {name: min(cell["coverage"] for cell in cells if cell["method"] == name) for name in METHODS}
    assert lowest["bfpo"] >= 0.915
    assert np.mean([cell["coverage"] for cell in cells if cell["method"] == "bfpo"]) >= 0.97
    assert lowest["bootstrap of prompts"] < 0.87  # the simulation shows what fails
    assert lowest["Wilson, of answers"] < 0.8
    ours = [cell["widths"] for cell in cells if cell["method"] == "bfpo"]
    assert np.mean([one["Wilson, one answer per prompt"] for one in ours]) < 1.1


def test_coverage_of_paired_differences() -> None:
    grid = {"prompts": (10, 40), "answers": (1, 3)}
    cells = list(paired_coverage(grid, 200))
    assert min(cell["coverage"] for cell in cells) >= 0.9
    assert np.mean([cell["coverage"] for cell in cells]) >= 0.97


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


@pytest.mark.parametrize(("num_seeds", "spread"), [(2, 0.3), (3, 0.0), (3, 0.3), (5, 1.0)])
def test_coverage_over_new_prompts_and_trainings(num_seeds: int, spread: float) -> None:
    # log-odds: prompts sd 1, trainings sd `spread`, mean 0, so that the true rate is 1/2.
    rng = np.random.default_rng(8)
    prompts, seeds = np.tile(np.arange(60), num_seeds), np.repeat(np.arange(num_seeds), 60)

    def found(_: int) -> Interval:
        odds = rng.normal(0, 1, 60)[prompts] + rng.normal(0, spread, num_seeds)[seeds]
        return rate_interval(rng.binomial(1, 1 / (1 + np.exp(-odds))).tolist(), prompts.tolist(), seeds=seeds.tolist())

    assert coverage(300, found, 0.5) >= 0.92


def test_seeds_against_the_formula() -> None:
    rng = np.random.default_rng(9)
    table = rng.binomial(1, [[0.3, 0.5, 0.9]] * 40).astype(float)
    prompts, seeds = np.repeat(np.arange(40), 3), np.tile([0, 1, 2], 40)
    got = rate_interval(table.ravel().tolist(), prompts.tolist(), seeds=seeds.tolist())
    p, by_prompt, by_seed = table.mean(), table.mean(axis=1), table.mean(axis=0)
    hit = min((table.sum(axis=1) > 0).sum(), (table.sum(axis=1) < 3).sum())
    ratio = min(1.0, max(1 / 3, by_prompt.var(ddof=1) / (p * (1 - p))))
    own = p * (1 - p) * ((hit - 1) * ratio + 5) / (hit + 4) / 40
    other = by_seed.var(ddof=1) / 3
    freedom = (own + other) ** 2 / (other**2 / 2)
    num = p * (1 - p) / (own + other) * (norm.ppf(0.975) / student.ppf(0.975, freedom)) ** 2
    assert (got.low, got.high) == pytest.approx(
        (beta.ppf(0.025, p * num, num - p * num + 1), beta.ppf(0.975, p * num + 1, num - p * num)), rel=1e-9
    )


def test_paired_difference_against_the_formula() -> None:
    rng = np.random.default_rng(10)
    for count, sizes in ((3, [2, 1, 1]), (7, [1, 5, 2, 2, 9, 1, 3]), (50, [1] * 50), (30, [4] * 30)):
        names = np.repeat(np.arange(count), sizes)
        first, second = (rng.choice([0.0, 0.3, 1.0], len(names)) for _ in range(2))
        got = paired_difference(first.tolist(), second.tolist(), names.tolist(), confidence=0.9)
        weights = np.array(sizes) / sum(sizes)
        means = np.array([(first - second)[names == name].mean() for name in range(count)])
        mean, kish = (weights * means).sum(), 1 / (weights**2).sum()
        squares = (weights * (means - mean)) ** 2
        freedom = squares.sum() ** 2 / (squares**2).sum() + 4
        centre = kish * mean / (kish + 2)
        variance = (kish * (kish * squares.sum() + mean**2) + 2) / (kish + 2) - centre**2
        half = student.ppf(0.95, freedom) * (variance / (kish + 2)) ** 0.5
        assert got.value == pytest.approx(mean)
        assert (got.low, got.high) == pytest.approx((max(-1.0, centre - half), min(1.0, centre + half)))


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
    bound = student.ppf(0.975, 4) * (2 / 42 / 42) ** 0.5
    assert (same.value, same.low, same.high) == (0.0, pytest.approx(-bound), pytest.approx(bound))
    assert bound > exact(0, 40)[1]
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
        (lambda: rate_interval([0, 1], confidence=95), "confidence"),
        (lambda: rate_interval([0, 1], seeds=[1]), "seeds"),
        (lambda: paired_difference([0, 1], [0, 1], confidence=0), "confidence"),
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

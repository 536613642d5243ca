from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from bfpo.core.errors import SettingError
from bfpo.stats import (
    CorrectedRate,
    Interval,
    corrected_harmless_rate,
    effective_count,
    rate_interval,
    rogan_gladen,
    wilson,
)
from messages import raises


def test_the_estimate_by_hand() -> None:
    # Rogan & Gladen: (.60 + .80 - 1) / (.90 + .80 - 1) = 4/7.
    got = rogan_gladen(wilson(60, 100), sensitivity=wilson(90, 100), specificity=wilson(80, 100))
    assert got.value == pytest.approx(4 / 7)
    assert got.num == 100
    assert got.reason is None


def test_the_bounds_are_lang_and_reiczigels() -> None:
    got = rogan_gladen(wilson(60, 100), sensitivity=wilson(90, 100), specificity=wilson(80, 100))
    z = 1.959963984540054
    n, q = 100 + z**2, (60 + z**2 / 2) / (100 + z**2)
    se, sp = 91 / 102, 81 / 102
    p = (q + sp - 1) / (se + sp - 1)
    var_se, var_sp = se * (1 - se) / 102, sp * (1 - sp) / 102
    centre = p + 2 * z**2 * (p * var_se - (1 - p) * var_sp)
    half = z * (q * (1 - q) / n + p**2 * var_se + (1 - p) ** 2 * var_sp) ** 0.5 / (se + sp - 1)
    assert (got.low, got.high) == pytest.approx((centre - half, centre + half), abs=1e-6)


def test_harmless_is_the_mirror_of_harmful() -> None:
    quality = {"sensitivity": wilson(45, 50), "specificity": wilson(150, 200)}
    harmful = rogan_gladen(wilson(70, 300), **quality)
    harmless = corrected_harmless_rate(wilson(230, 300), **quality)
    assert harmless.value == pytest.approx(1 - harmful.value)  # type: ignore[operator]
    assert (harmless.low, harmless.high) == pytest.approx((1 - harmful.high, 1 - harmful.low))  # type: ignore[operator]
    # A judge that misses one harmful answer in ten makes 230 of 300 look better than it is.
    lenient = corrected_harmless_rate(wilson(230, 300), sensitivity=wilson(45, 50), specificity=wilson(200, 200))
    assert lenient.value == pytest.approx(1 - (70 / 300) / 0.9)


@pytest.mark.parametrize(
    ("rate", "sensitivity", "specificity", "num", "num_labelled"),
    [(0.1, 0.9, 0.85, 300, 100), (0.5, 0.8, 0.7, 200, 100), (0.95, 0.75, 0.9, 150, 40), (0.02, 0.9, 0.95, 300, 60)],
)
def test_coverage(rate: float, sensitivity: float, specificity: float, num: int, num_labelled: int) -> None:
    rng = np.random.default_rng(0)
    seen = rate * sensitivity + (1 - rate) * (1 - specificity)
    corrected = plain = 0
    for _ in range(250):
        positive = wilson(int(rng.binomial(num, seen)), num)
        se = wilson(int(rng.binomial(num_labelled, sensitivity)), num_labelled)
        sp = wilson(int(rng.binomial(num_labelled, specificity)), num_labelled)
        got = rogan_gladen(positive, sensitivity=se, specificity=sp)
        corrected += got.low is not None and got.high is not None and got.low <= rate <= got.high
        plain += positive.low <= rate <= positive.high  # type: ignore[operator]
    assert corrected >= binom.ppf(0.001, 250, 0.95)
    assert plain < corrected


def test_few_labels_widen_the_bounds() -> None:
    widths = []
    for labelled in (20, 100, 1000, 100_000):
        quality = {
            "sensitivity": wilson(labelled * 9 // 10, labelled),
            "specificity": wilson(labelled * 4 // 5, labelled),
        }
        got = rogan_gladen(wilson(120, 200), **quality)
        widths.append(got.high - got.low)  # type: ignore[operator]
    assert widths == sorted(widths, reverse=True)
    plain = wilson(120, 200)
    assert widths[-1] == pytest.approx((plain.high - plain.low) / 0.7, rel=0.01)  # type: ignore[operator]


def test_a_judge_no_better_than_chance_identifies_nothing() -> None:
    got = rogan_gladen(wilson(3, 10), sensitivity=wilson(5, 10), specificity=wilson(5, 10))
    assert (got.value, got.low, got.high) == (None, None, None)
    assert "not identifiable: sensitivity + specificity is 1.000" in str(got.reason)
    unsure = rogan_gladen(wilson(3, 10), sensitivity=wilson(6, 10), specificity=wilson(6, 10))
    assert (unsure.value, unsure.low, unsure.high) == (0.0, 0.0, 1.0)
    assert "too few" in str(unsure.reason)


def test_a_rate_that_the_judge_cannot_give_is_no_certainty() -> None:
    # A judge that finds 3 of 10 positives calls 95% positive: clipped bounds would claim exactly 1.
    got = rogan_gladen(wilson(95, 100), sensitivity=wilson(60, 200), specificity=wilson(195, 200))
    assert (got.value, got.low, got.high) == (1.0, None, None)
    assert "contradiction: a rate of 0.950" in str(got.reason)


@pytest.mark.parametrize("empty", ["rate", "sensitivity", "specificity"])
def test_a_missing_rate_is_named(empty: str) -> None:
    rates = {name: wilson(9, 10) for name in ("rate", "sensitivity", "specificity")} | {empty: wilson(0, 0)}
    got = rogan_gladen(rates.pop("rate"), **rates)
    assert got == CorrectedRate(None, None, None, got.num, f"the {empty} has no value or no interval")


@given(st.lists(st.tuples(st.integers(0, 80), st.integers(1, 80)), min_size=3, max_size=3))
@settings(max_examples=40, deadline=None)
def test_bounds_hold_the_value_and_stay_in_range(counts: list[tuple[int, int]]) -> None:
    rate, se, sp = (wilson(min(k, n), n) for k, n in counts)
    got = rogan_gladen(rate, sensitivity=se, specificity=sp)
    assert (got.value is None) == (se.value + sp.value <= 1)  # type: ignore[operator]
    assert (got.low is None) == ("not identifiable" in str(got.reason) or "contradiction" in str(got.reason))
    if got.low is not None:
        assert 0 <= got.low <= got.value <= got.high <= 1  # type: ignore[operator]
        assert got.low < got.high  # type: ignore[operator]


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.sampled_from([0.8, 0.95]))
@settings(max_examples=60, deadline=None)
def test_independent_answers_are_worth_their_number(counts: tuple[int, int], confidence: float) -> None:
    k, n = counts
    interval = rate_interval([1] * k + [0] * (n - k), confidence=confidence)
    assert effective_count(interval, confidence=confidence) == pytest.approx(n, rel=1e-6)
    assert effective_count(wilson(k, n, confidence=confidence), confidence=confidence) == pytest.approx(n, rel=0.05)


def test_answers_of_one_prompt_are_worth_one() -> None:
    prompts = np.repeat(np.arange(60), 10)
    hits = np.repeat(np.random.default_rng(1).integers(0, 2, 60), 10)
    worth = effective_count(rate_interval(hits.tolist(), prompts.tolist()))
    assert worth == pytest.approx(60, rel=0.15)
    assert effective_count(Interval(0.5, 0.0, 1.0, 30)) == 1.0
    assert effective_count(Interval(0.5, 0.49, 0.51, 30)) == 30.0
    assert effective_count(Interval(0.5, None, None, 30)) is None


def test_bad_values() -> None:
    with raises(SettingError, "rate"):
        effective_count(Interval(1.5, 1.0, 2.0, 4))
    with raises(SettingError, "confidence"):
        rogan_gladen(wilson(1, 2), sensitivity=wilson(2, 2), specificity=wilson(2, 2), confidence=95)

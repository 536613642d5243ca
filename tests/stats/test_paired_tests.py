from __future__ import annotations

from fractions import Fraction
from itertools import product
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, binomtest, permutation_test

from bfpo.core.errors import SettingError
from bfpo.stats import (
    PairedTest,
    detectable_difference,
    holm,
    mcnemar,
    minimum_detectable_effect,
    paired_test,
    sign_flip,
)
from messages import raises


def answers(both: int, only_first: int, only_second: int, neither: int) -> tuple[list[int], list[int]]:
    first = [1] * both + [1] * only_first + [0] * only_second + [0] * neither
    second = [1] * both + [0] * only_first + [1] * only_second + [0] * neither
    return first, second


@pytest.mark.parametrize(
    ("table", "p_value"),
    [  # the exact p-values of statsmodels 0.15.0, contingency_tables.mcnemar
        ((30, 12, 4, 54), 0.076812744140625),
        ((0, 1, 7, 0), 0.0703125),
        ((101, 121, 59, 33), 4.4344492637551645e-06),
        ((5, 3, 3, 5), 1.0),
    ],
)
def test_mcnemar_is_that_of_statsmodels(table: tuple[int, int, int, int], p_value: float) -> None:
    got = mcnemar(*answers(*table))
    assert got.p_value == pytest.approx(p_value, rel=1e-9)
    assert got == PairedTest("exact McNemar", got.p_value, sum(table), sum(table))
    assert mcnemar(*reversed(answers(*table))).p_value == got.p_value


def test_mcnemar_by_hand() -> None:
    # 1 against 7: two-sided 2 (C(8,0) + C(8,1)) / 2^8.
    assert mcnemar(*answers(2, 1, 7, 3)).p_value == pytest.approx(2 * (1 + comb(8, 1)) / 2**8)


def plain_sign_flip(sums: list[float]) -> float:
    """Return the exact two-sided p-value by going through every choice of signs."""
    flips = [
        abs(sum(sign * each for sign, each in zip(signs, sums, strict=True)))
        for signs in product((1, -1), repeat=len(sums))
    ]
    return float(np.mean([each >= abs(sum(sums)) - 1e-9 for each in flips]))


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 10), st.integers(0, 10)), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_sign_flip_counts_every_flip_of_few_clusters(rows: list[tuple[int, int, int]]) -> None:
    clusters = [cluster for cluster, _, _ in rows]
    first, second = [a / 10 for _, a, _ in rows], [b / 10 for _, _, b in rows]
    sums = [sum(a - b for cluster, a, b in rows if cluster == own) / 10 for own in dict.fromkeys(clusters)]
    got = sign_flip(first, second, clusters)
    assert got.num_clusters == len(sums)
    assert got.p_value == pytest.approx(plain_sign_flip(sums), abs=1e-12)
    assert sign_flip(second, first, clusters).p_value == pytest.approx(got.p_value)
    assert sign_flip(first[::-1], second[::-1], clusters[::-1]).p_value == pytest.approx(got.p_value)


@given(st.integers(0, 6), st.integers(0, 6))
@settings(max_examples=30, deadline=None)
def test_sign_flip_of_one_answer_each_is_mcnemar(only_first: int, only_second: int) -> None:
    pairs = answers(3, only_first, only_second, 2)
    assert sign_flip(*pairs).p_value == pytest.approx(mcnemar(*pairs).p_value)


@given(st.integers(2, 6).flatmap(lambda low: st.lists(st.integers(-low, low), min_size=14, max_size=60)))
@settings(max_examples=30, deadline=None)
def test_sign_flip_of_seeds_is_a_sum_of_fractions(sums: list[int]) -> None:
    shares = {0: Fraction(1)}
    for each in sums:
        halves = [(at + sign * each, share / 2) for at, share in shares.items() for sign in (1, -1)]
        shares = {at: sum(share for to, share in halves if to == at) for at in {to for to, _ in halves}}
    exact = sum(share for at, share in shares.items() if abs(at) >= abs(sum(sums)))
    clusters = [place for place, each in enumerate(sums) for _ in range(max(1, abs(each)))]
    signs = [np.sign(sums[place]) for place in clusters]
    got = sign_flip([sign > 0 for sign in signs], [sign < 0 for sign in signs], clusters)
    assert got.p_value == pytest.approx(float(exact), rel=1e-12)


@pytest.mark.parametrize(("num", "shift"), [(40, 0.05), (300, 0.03), (300, 0.0)])
def test_sign_flip_of_any_values_is_near_scipys_drawn_one(num: int, shift: float) -> None:
    rng = np.random.default_rng(num)
    first = rng.random(num)
    second = np.clip(first + rng.normal(shift, 0.25, num), 0, 1)
    drawn = permutation_test(
        (first - second,),
        lambda flipped, axis: flipped.sum(axis=axis),
        permutation_type="samples",
        n_resamples=19_999,
        batch=2_000,
        random_state=rng,
    ).pvalue
    got = sign_flip(first.tolist(), second.tolist()).p_value
    assert got == pytest.approx(drawn, abs=5 * (drawn / 20_000) ** 0.5)


def test_sign_flip_is_exact_far_in_the_tail() -> None:
    assert sign_flip(*answers(0, 60, 0, 9)).p_value == pytest.approx(2 * 0.5**60)
    assert sign_flip(*answers(50, 400, 100, 20)).p_value == pytest.approx(binomtest(100, 500).pvalue, rel=1e-9)
    # 20 methods make 190 pairs: each of them can be told apart after Holm's correction.
    assert holm([sign_flip(*answers(5, 40, 0, 5)).p_value] * 190)[0] < 1e-9  # type: ignore[operator]
    tiny = [1e-9, *[0.0] * 20]
    assert sign_flip(tiny, [0.0] * 21).p_value == 1.0


def test_answers_of_one_prompt_are_not_independent() -> None:
    first, second = [1] * 40, [0] * 40
    assert sign_flip(first, second).p_value < 0.001  # type: ignore[operator]
    clustered = sign_flip(first, second, [number // 10 for number in range(40)])
    assert clustered == PairedTest("sign-flip", 2 / 2**4, 40, 4)
    assert sign_flip(first, second, ["one"] * 40).p_value == 1.0


def test_false_alarms_of_the_clustered_test() -> None:
    rng = np.random.default_rng(6)
    clusters = np.repeat(np.arange(8), 5).tolist()
    alarms = naive = 0
    for _ in range(150):
        shift = np.repeat(rng.normal(0, 0.2, size=8), 5)
        first = np.clip(0.5 + shift + rng.normal(0, 0.1, size=40), 0, 1).tolist()
        second = [0.5] * 40
        alarms += sign_flip(first, second, clusters).p_value <= 0.05  # type: ignore[operator]
        naive += sign_flip(first, second).p_value <= 0.05  # type: ignore[operator]
    assert alarms <= binom.ppf(0.999, 150, 0.05)
    assert naive > 2 * binom.ppf(0.999, 150, 0.05)  # what clustering is for


def test_the_test_fits_the_values() -> None:
    first, second = answers(3, 4, 1, 2)
    assert paired_test(first, second) == mcnemar(first, second)
    assert paired_test(first, second, list("abcdefghij")).test == "exact McNemar"
    assert paired_test(first, second, list("abcdefghii")).test == "sign-flip"
    assert paired_test([0.5, *first], [1, *second]).test == "sign-flip"


def test_nothing_to_compare() -> None:
    assert mcnemar([], []).p_value is None
    assert sign_flip([], []).p_value is None
    assert paired_test([], []).p_value is None
    assert mcnemar([1, 0], [1, 0]).p_value == 1.0
    assert sign_flip([0.5, 0.2], [0.5, 0.2]).p_value == 1.0


def test_holm_by_hand_and_by_statsmodels() -> None:
    assert holm([0.01, 0.04, None, 0.03]) == pytest.approx([0.03, 0.06, None, 0.06])
    # multipletests(..., method="holm") of statsmodels 0.15.0
    assert holm([0.01, 0.02, 0.03, 0.005, 0.8, 0.04]) == pytest.approx([0.05, 0.08, 0.09, 0.03, 0.8, 0.09])
    assert holm([]) == []
    assert holm([None]) == [None]


@given(st.lists(st.one_of(st.none(), st.floats(0, 1)), max_size=12), st.randoms())
def test_holm_is_never_below_the_raw_value(p_values: list[float | None], random: object) -> None:
    corrected = holm(p_values)
    asked = [(raw, new) for raw, new in zip(p_values, corrected, strict=True) if raw is not None and new is not None]
    assert [raw is None for raw in p_values] == [new is None for new in corrected]
    assert all(raw <= new <= min(1.0, len(asked) * raw + 1e-15) for raw, new in asked)
    assert [new for _, new in sorted(asked)] == sorted(new for _, new in asked)
    order = list(range(len(p_values)))
    random.shuffle(order)  # type: ignore[attr-defined]
    assert holm([p_values[place] for place in order]) == [corrected[place] for place in order]


@pytest.mark.parametrize(("num", "discordance"), [(100, 0.3), (400, 0.2), (50, 0.5)])
def test_the_detectable_effect_is_found_as_often_as_asked(num: int, discordance: float) -> None:
    effect = minimum_detectable_effect(num, discordance)
    assert effect is not None

    def found(true_effect: float) -> float:
        shares = [(discordance + true_effect) / 2, (discordance - true_effect) / 2, 1 - discordance]
        won, lost, _ = np.random.default_rng(7).multinomial(num, shares, size=10_000).T
        return float((np.abs(won - lost) > 1.959964 * np.sqrt(won + lost)).mean())

    assert 0.77 <= found(effect) <= 0.84
    assert found(effect / 2) < 0.45
    first = [1] * num
    share = round(num * discordance)
    assert detectable_difference(first, [0] * share + [1] * (num - share)) == pytest.approx(effect)


def test_more_prompts_see_less_and_nothing_is_nothing() -> None:
    effects = [minimum_detectable_effect(num, 0.3) for num in (50, 100, 1000, 10_000)]
    assert effects == sorted(effects, reverse=True)  # type: ignore[type-var]
    assert effects[3] == pytest.approx((1.959964 + 0.841621) * (0.3 / 10_000) ** 0.5, rel=0.01)
    assert minimum_detectable_effect(100, 0.3, power=0.95) > effects[1]  # type: ignore[operator]
    assert minimum_detectable_effect(0, 0.3) is None
    assert minimum_detectable_effect(100, 0.0) is None
    assert minimum_detectable_effect(20, 0.1) is None  # two prompts that differ can show nothing
    assert detectable_difference([], []) is None
    assert detectable_difference([1, 0], [1, 0]) is None


def test_answers_of_one_prompt_see_no_more_than_prompts() -> None:
    rng = np.random.default_rng(8)
    first, second = rng.integers(0, 2, 80), rng.integers(0, 2, 80)
    alone = detectable_difference(first.tolist(), second.tolist())
    repeated = detectable_difference(
        np.repeat(first, 9).tolist(), np.repeat(second, 9).tolist(), np.repeat(range(80), 9).tolist()
    )
    assert repeated == pytest.approx(alone)


@pytest.mark.parametrize(
    ("call", "key"),
    [
        (lambda: mcnemar([0.5], [1]), "first, second"),
        (lambda: mcnemar([1, 0], [1]), "first, second"),
        (lambda: sign_flip([2], [1]), "first"),
        (lambda: sign_flip([1], [1], ["a", "b"]), "clusters"),
        (lambda: holm([0.2, 1.2]), "p_values"),
        (lambda: holm([float("nan")]), "p_values"),
        (lambda: minimum_detectable_effect(-1, 0.2), "num_clusters"),
        (lambda: minimum_detectable_effect(10, 1.2), "discordance"),
        (lambda: minimum_detectable_effect(10, 0.2, power=0.01), "alpha, power"),
    ],
)
def test_bad_values(call: object, key: str) -> None:
    with raises(SettingError, key):
        call()  # type: ignore[operator]

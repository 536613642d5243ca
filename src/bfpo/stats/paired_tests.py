"""Paired comparison of two models: tests, Holm's correction, detectable effects, and win rates at equal length."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np

from bfpo.core.errors import SettingError
from bfpo.stats.clustered import clopper_pearson, relative_variance
from bfpo.stats.intervals import Interval, rate_interval
from bfpo.stats.resampling import (
    Floats,
    Ints,
    bootstrap_weights,
    check_confidence,
    in_unit_interval,
    label_codes,
    paired_values,
)

__all__ = [
    "MIN_PROMPTS",
    "PairedTest",
    "detectable_difference",
    "holm",
    "length_controlled_rate",
    "mcnemar",
    "minimum_detectable_effect",
    "paired_test",
    "sign_flip",
]

MIN_PROMPTS = 30
"""`length_controlled_rate` fits two parameters; with fewer prompts its interval would be uninformative."""

_CELLS = 65_536
_ROUNDING = 1e-12
_INVERSE_PENALTY = 100.0  # a prior sd of 10 log-odds: only keeps finite what the data do not bound


@dataclass(frozen=True, slots=True)
class PairedTest:
    """A two-sided p-value of "no difference", `None` without pairs."""

    test: str
    p_value: float | None
    num: int
    num_clusters: int


def paired_test(
    first: Sequence[bool | float], second: Sequence[bool | float], clusters: Sequence[Hashable] | None = None
) -> PairedTest:
    """Return McNemar's exact test for one binary answer per prompt, where the two agree, and else that of sign flips.

    Arguments, shapes and errors as for `sign_flip`.
    """
    left, right = paired_values(first, second)
    codes = label_codes("clusters", clusters, left.size)
    one_each = np.unique(codes).size == codes.size
    if one_each and _is_binary(left) and _is_binary(right):
        return mcnemar(first, second)
    return sign_flip(first, second, clusters)


def mcnemar(first: Sequence[bool | float], second: Sequence[bool | float]) -> PairedTest:
    """Return the exact McNemar test of two lists of zeros and ones, (N,) each; item i is the same prompt in both.

    Under the null hypothesis, a discordant pair favours either model with probability 1/2: a two-sided binomial test
    (McNemar 1947, Psychometrika 12(2)). Without discordant pairs p is 1, without pairs `None`. Raises `SettingError`
    for lengths that differ or values other than 0 and 1. Prompts must be independent; for several answers per prompt
    use `sign_flip`.
    """
    left, right = paired_values(first, second)
    if not (_is_binary(left) and _is_binary(right)):
        raise SettingError("first, second: McNemar's test needs zeros and ones; for other values use sign_flip")
    only_first, only_second = int((left > right).sum()), int((right > left).sum())
    p_value: float | None = None
    if left.size:
        from scipy.stats import binomtest

        differ = only_first + only_second
        p_value = float(binomtest(only_first, differ).pvalue) if differ else 1.0
    return PairedTest("exact McNemar", p_value, left.size, left.size)


def sign_flip(
    first: Sequence[bool | float], second: Sequence[bool | float], clusters: Sequence[Hashable] | None = None
) -> PairedTest:
    """Return the exact sign-flip (paired permutation) test of mean(first - second) on values in [0, 1], (N,) each.

    Item i of both lists is the same prompt (and seed). Under the null hypothesis the two models are exchangeable at
    each prompt, so the differences of a cluster change sign together (Fisher 1935; Good 2005, "Permutation, Parametric
    and Bootstrap Tests of Hypotheses"). p is the share of all sign patterns whose sum is as far from 0 as the observed
    one. None is drawn, so p has no lowest value that Holm's correction of many comparisons could not pass. One cluster
    gives 1, no value `None`. Seeds of a prompt flip together: the result holds for new prompts, but for these
    trainings. Raises `SettingError` for lengths that differ or values outside [0, 1].
    """
    left, right = paired_values(first, second)
    codes = label_codes("clusters", clusters, left.size)
    if left.size == 0:
        return PairedTest("sign-flip", None, 0, 0)
    sums: Floats = np.bincount(codes, left - right).astype(np.float64)
    return PairedTest("sign-flip", _share_as_far(_whole(sums)), left.size, sums.size)


def _whole(sums: Floats) -> Ints:
    """Return the sums as whole multiples of one unit, without zeros.

    Sums of binary answers, and of shares with small denominators, are exact multiples. Others are rounded to a unit of
    which their sizes have 65,536 in all, or 16 each: the signs of rounded differences are as exchangeable as those of
    the differences themselves, so the test stays exact and only its statistic is rounded.
    """
    total = float(np.abs(sums).sum())
    if total <= _ROUNDING * sums.size:
        return np.zeros(0, np.int64)
    per_one = max(1, int(max(_CELLS, 16 * sums.size) / total))
    per_one -= per_one % next(many for many in (2520, 840, 120, 12, 1) if many <= per_one)
    whole: Ints = np.rint(sums * per_one).astype(np.int64)
    whole = whole[whole != 0]
    return whole // np.int64(np.gcd.reduce(whole)) if whole.size else whole


def _share_as_far(whole: Ints) -> float:
    """Return the share of all choices of signs with |sum of the signed numbers| >= |sum of the numbers|."""
    sizes = np.sort(np.abs(whole))
    total, observed = int(sizes.sum()), abs(int(whole.sum()))
    # share[x]: of the choices for the numbers so far, those whose positive ones add up to x. Only sums of positive
    # terms, so a share far in the tail is as precise as one near the middle.
    share = np.zeros(total + 1)
    share[0], reach = 1.0, 0
    for size in sizes.tolist():
        half = share[: reach + 1] / 2
        share[: reach + 1] = half
        share[size : size + reach + 1] += half
        reach += size
    beyond = (total - observed) // 2 + 1  # 2 x - total <= -observed
    return min(1.0, 2 * float(share[:beyond].sum()))


def _is_binary(values: Floats) -> bool:
    return bool(np.isin(values, (0.0, 1.0)).all())


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return the p-values adjusted for multiple testing, in the same order (Holm 1979, Scand. J. Stat. 6(2)).

    Controls the family-wise error rate under any dependence. `None` (no test) stays `None` and is not counted. Raises
    `SettingError` for a value outside [0, 1].
    """
    for place, p_value in enumerate(p_values):
        if p_value is not None and not 0 <= p_value <= 1:
            raise SettingError(f"p_values: got {p_value} at place {place}; allowed: a number from 0 to 1, or None")
    ranked = sorted((p_value, place) for place, p_value in enumerate(p_values) if p_value is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p_value, place) in enumerate(ranked):
        # The k-th smallest of m is multiplied by m - k + 1; the running maximum keeps the order.
        highest = max(highest, min(1.0, (len(ranked) - rank) * p_value))
        adjusted[place] = highest
    return adjusted


def minimum_detectable_effect(
    num_clusters: int, discordance: float, *, alpha: float = 0.05, power: float = 0.8
) -> float | None:
    """Return the smallest difference of two paired rates that a two-sided test at `alpha` detects with `power`.

    `discordance` is the share of prompts on which the two models differ (in both directions), `num_clusters` the number
    of prompts, with one binary answer each. From the sample size of McNemar's test, sqrt(n) d = z(alpha/2)
    sqrt(discordance) + z(beta) sqrt(discordance - d^2) (Connor 1987, Biometrics 43(1)), solved for d; the exact test
    needs slightly more. `None` if no difference is detectable: no prompts, no discordance, or too few prompts even for
    a difference as large as the discordance. Raises `SettingError` for a share outside [0, 1], a negative count, or
    levels outside 0 < alpha < power < 1.
    """
    if not 0 <= discordance <= 1:
        raise SettingError(f"discordance: got {discordance}; allowed: a share from 0 to 1")
    return _solve(num_clusters, discordance, discordance, alpha, power)


def detectable_difference(
    first: Sequence[bool | float],
    second: Sequence[bool | float],
    clusters: Sequence[Hashable] | None = None,
    *,
    alpha: float = 0.05,
    power: float = 0.8,
) -> float | None:
    """Return the minimum detectable effect of a new comparison like this one, from the observed discordance.

    Values in [0, 1], (N,) each, paired item by item. The discordance is the mean square of the clusters' mean
    differences; for one binary answer per cluster it is the share that differs. It is not the power of the test already
    made, which is a function of its p-value (Hoenig & Heisey 2001, The American Statistician 55(1)). `None` and errors
    as in `minimum_detectable_effect`; lengths that differ are an error too.
    """
    left, right = paired_values(first, second)
    codes = label_codes("clusters", clusters, left.size)
    if left.size == 0:
        return _solve(0, 0.0, 0.0, alpha, power)
    differences = np.bincount(codes, left - right) / np.bincount(codes)
    square, reach = float((differences**2).mean()), float(np.abs(differences).mean())
    return _solve(differences.size, square, reach, alpha, power)


def _solve(num_clusters: int, square: float, reach: float, alpha: float, power: float) -> float | None:
    """Return d of Connor's formula with `square` as the discordance; `None` if d exceeds `reach`, its maximum."""
    from scipy.stats import norm

    if num_clusters < 0:
        raise SettingError(f"num_clusters: got {num_clusters}; a count, 0 or more, is needed")
    if not 0 < alpha < power < 1:
        raise SettingError(f"alpha, power: got {alpha}, {power}; needed: 0 < alpha < power < 1, such as 0.05 and 0.8")
    if num_clusters == 0 or square == 0:
        return None

    z_alpha, z_beta = float(norm.isf(alpha / 2)), float(norm.ppf(power))
    # (sqrt(n) d - z_alpha sqrt(s))^2 = z_beta^2 (s - d^2) is a quadratic a d^2 - 2 b d + c = 0. d is the
    # larger root, or the smaller one if the power is below 0.5 (z_beta < 0).
    a = num_clusters + z_beta**2
    b = sqrt(num_clusters * square) * z_alpha
    c = square * (z_alpha**2 - z_beta**2)
    inside = b**2 - a * c
    if inside < 0:
        return None
    effect = (b + sqrt(inside)) / a if z_beta >= 0 else (b - sqrt(inside)) / a
    return effect if effect <= reach else None


def length_controlled_rate(
    preferences: Sequence[float],
    longer_by: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    *,
    confidence: float = 0.95,
    num_resamples: int = 2000,
    random_seed: int = 0,
) -> Interval:
    """Return the win rate at equal length, by the length term of AlpacaEval 2 (Dubois et al. 2024, arXiv:2404.04475).

    A logistic regression of `preferences` in [0, 1] on a constant and tanh(`longer_by` / its standard deviation), where
    `longer_by` is the length of the answer minus that of the other answer, in characters. The rate is the prediction at
    0. Its bounds are the exact ones of an effective number of prompts, as in `rate_interval`, or of the variance of a
    bootstrap over `clusters` (prompts) if that leaves fewer. The paper's instruction-difficulty term needs the
    preferences of many models and is omitted. Fewer than `MIN_PROMPTS` prompts give no value. Raises `SettingError` for
    lengths that differ, values outside their range, or a confidence outside (0, 1).
    """
    check_confidence(confidence)
    wins, lengths = in_unit_interval("preferences", preferences), np.asarray(longer_by, dtype=np.float64)
    if lengths.shape != wins.shape or not np.isfinite(lengths).all():
        raise SettingError(f"longer_by: got {lengths.size} for {wins.size} preferences; a finite number for each")
    names = list(range(wins.size)) if clusters is None else list(clusters)
    codes = label_codes("clusters", names, wins.size)
    if len(set(codes.tolist())) < MIN_PROMPTS:
        return Interval(None, None, None, 0)
    if np.ptp(wins) == 0:  # length explains nothing, and all resamples are equal
        return rate_interval(preferences, clusters, confidence=confidence)
    spread = float(lengths.std(ddof=1))
    term = np.tanh(lengths / spread) if spread > 0 else np.zeros_like(lengths)
    value = _at_zero(wins, term, np.ones_like(wins))
    rates = [_at_zero(wins, term, weights) for weights in bootstrap_weights(names, num_resamples, random_seed)]
    sums, squares, sizes = (np.bincount(codes, each).astype(np.float64) for each in (wins, wins**2, np.ones_like(wins)))
    _, effective, relative = relative_variance(sums, squares, sizes)
    num = value * (1 - value) / max(value * (1 - value) * float(relative / effective), float(np.var(rates)))
    low, high = (float(bound) for bound in clopper_pearson(value, num, confidence))
    return Interval(value, low, high, wins.size)


def _at_zero(preferences: Floats, term: Floats, weights: Floats) -> float:
    """Return the prediction at `term` = 0; a preference p is a win of weight p and a loss of weight 1 - p."""
    from scipy.special import expit
    from sklearn.linear_model import LogisticRegression

    columns = np.column_stack([np.ones_like(term), term])
    model = LogisticRegression(C=_INVERSE_PENALTY, fit_intercept=False, solver="newton-cholesky", tol=1e-8)
    share = np.concatenate([weights * preferences, weights * (1 - preferences)])
    model.fit(np.concatenate([columns, columns]), np.repeat([1, 0], preferences.size), sample_weight=share)
    return float(expit(model.coef_[0, 0]))

"""Tests of a paired difference between two models, and Holm's correction for asking several times."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
from scipy.stats import binomtest, norm, permutation_test

from bfpo.core.errors import SettingError
from bfpo.stats.intervals import Interval, rate_interval
from bfpo.stats.resampling import (
    Floats,
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

_CHUNK_FLOATS = 4_000_000


@dataclass(frozen=True, slots=True)
class PairedTest:
    """A two-sided p-value of "no difference", `None` without pairs; `exact` is false where it was drawn at random."""

    test: str
    p_value: float | None
    num: int
    num_clusters: int
    exact: bool


def paired_test(
    first: Sequence[bool | float],
    second: Sequence[bool | float],
    clusters: Sequence[Hashable] | None = None,
    *,
    num_resamples: int = 9999,
    random_seed: int = 0,
) -> PairedTest:
    """Return the test that fits the values: exact McNemar for one yes-or-no answer per prompt, else sign flips.

    Arguments, shapes and errors as for `sign_flip`. On one yes-or-no answer per prompt both test the same and agree;
    McNemar's needs no random draws there.
    """
    left, right = paired_values(first, second)
    codes = label_codes("clusters", clusters, left.size)
    one_each = np.unique(codes).size == codes.size
    if one_each and _is_binary(left) and _is_binary(right):
        return mcnemar(first, second)
    return sign_flip(first, second, clusters, num_resamples=num_resamples, random_seed=random_seed)


def mcnemar(first: Sequence[bool | float], second: Sequence[bool | float]) -> PairedTest:
    """Return the exact McNemar test of two lists of zeros and ones, (N,) each, item i being the same prompt in both.

    Of the pairs that differ, half favour either model if there is no difference: a two-sided binomial test (McNemar
    1947, Psychometrika 12(2)). No pair that differs gives 1, no pair at all `None`. Raises `SettingError` for lengths
    that differ or values other than 0 and 1. Prompts must be independent; `sign_flip` takes several answers per prompt.
    """
    left, right = paired_values(first, second)
    if not (_is_binary(left) and _is_binary(right)):
        raise SettingError("first, second: McNemar's test needs zeros and ones; for other values use sign_flip")
    only_first, only_second = int((left > right).sum()), int((right > left).sum())
    p_value: float | None = None
    if left.size:
        differ = only_first + only_second
        p_value = float(binomtest(only_first, differ).pvalue) if differ else 1.0
    return PairedTest("exact McNemar", p_value, left.size, left.size, exact=True)


def sign_flip(
    first: Sequence[bool | float],
    second: Sequence[bool | float],
    clusters: Sequence[Hashable] | None = None,
    *,
    num_resamples: int = 9999,
    random_seed: int = 0,
) -> PairedTest:
    """Return the sign-flip (paired permutation) test of mean(first - second) on values in [0, 1], (N,) each.

    Item i of both lists is the same prompt (and seed). Without a difference the two models could change names at any
    prompt, so the signs of all differences of a cluster flip together (Fisher 1935; Good 2005, "Permutation, Parametric
    and Bootstrap Tests of Hypotheses"). Up to 13 clusters with a difference every flip is counted, else `num_resamples`
    are drawn and the observed one is counted with them, so that p is never 0 (Phipson & Smyth 2010, SAGMB 9(1)). One
    cluster gives 1, no value `None`. Several seeds of a prompt flip together: the result speaks about other prompts and
    these trainings. Raises `SettingError` for lengths that differ, values outside [0, 1] or fewer than one resample.
    """
    left, right = paired_values(first, second)
    codes = label_codes("clusters", clusters, left.size)
    if num_resamples < 1:
        raise SettingError(f"num_resamples: got {num_resamples}; at least 1 is needed")
    if left.size == 0:
        return PairedTest("sign-flip", None, 0, 0, exact=True)
    sums: Floats = np.bincount(codes, left - right).astype(np.float64)
    # A cluster without a difference is the same under both signs; 1e-12 is what rounding leaves of one.
    moving = sums[np.abs(sums) > 1e-12]
    exact = bool(2.0**moving.size <= num_resamples)
    p_value = _flip(moving, num_resamples, random_seed) if moving.size > 1 else 1.0
    return PairedTest("sign-flip", p_value, left.size, sums.size, exact)


def _flip(sums: Floats, num_resamples: int, random_seed: int) -> float:
    def total(flipped: Floats, axis: int = -1) -> Floats:
        # Equal sums in another order differ in their last bits; they are ties.
        return np.asarray(np.round(flipped.sum(axis=axis), 9), np.float64)

    result = permutation_test(
        (sums,),
        total,
        permutation_type="samples",
        vectorized=True,
        n_resamples=num_resamples,
        batch=max(1, _CHUNK_FLOATS // sums.size),
        random_state=np.random.default_rng(random_seed),
    )
    return float(result.pvalue)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return the p-values corrected for having asked m times, in the same order (Holm 1979, Scand. J. Stat. 6(2)).

    Rejecting what stays below 0.05 errs once or more in at most 5% of such families, whatever the dependence. `None`
    (nothing was asked) stays `None` and is not one of the m. Raises `SettingError` for a value outside [0, 1].
    """
    for place, p_value in enumerate(p_values):
        if p_value is not None and not 0 <= p_value <= 1:
            raise SettingError(f"p_values: got {p_value} at place {place}; allowed: a number from 0 to 1, or None")
    asked = sorted((p_value, place) for place, p_value in enumerate(p_values) if p_value is not None)
    corrected: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p_value, place) in enumerate(asked):
        highest = max(highest, min(1.0, (len(asked) - rank) * p_value))
        corrected[place] = highest
    return corrected


def _is_binary(values: Floats) -> bool:
    return bool(np.isin(values, (0.0, 1.0)).all())


def minimum_detectable_effect(
    num_clusters: int, discordance: float, *, alpha: float = 0.05, power: float = 0.8
) -> float | None:
    """Return the smallest difference of two paired rates that a two-sided test at `alpha` finds with `power`.

    `discordance` is the share of prompts that the two models answer differently (both ways together), `num_clusters`
    the number of prompts, one yes-or-no answer each. From the sample size of McNemar's test, sqrt(n) d = z(alpha/2)
    sqrt(discordance) + z(beta) sqrt(discordance - d^2) (Connor 1987, Biometrics 43(1)), solved for d; the exact test
    needs a little more. `None` where no difference could be found: no prompts, no discordance, or so few that even a
    difference as large as the discordance would be missed. Raises `SettingError` for a share outside [0, 1], a negative
    count, or levels outside 0 < alpha < power < 1.
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
    """Return the minimum detectable effect of another comparison like this one, from its own observed discordance.

    Values in [0, 1], (N,) each, paired item by item; with several answers per cluster the discordance is the mean
    square of the clusters' mean differences, which for one yes-or-no answer is the share that differs. Not the power of
    the test already made (that follows from its p-value: Hoenig & Heisey 2001, The American Statistician 55(1)).
    `None` and errors as in `minimum_detectable_effect`; lengths that differ raise too.
    """
    left, right = paired_values(first, second)
    codes = label_codes("clusters", clusters, left.size)
    if left.size == 0:
        return _solve(0, 0.0, 0.0, alpha, power)
    differences = np.bincount(codes, left - right) / np.bincount(codes)
    square, reach = float((differences**2).mean()), float(np.abs(differences).mean())
    return _solve(differences.size, square, reach, alpha, power)


def _solve(num_clusters: int, square: float, reach: float, alpha: float, power: float) -> float | None:
    """Return d of the formula above where the mean square is `square` and no difference exceeds `reach`."""
    if num_clusters < 0:
        raise SettingError(f"num_clusters: got {num_clusters}; a count, 0 or more, is needed")
    if not 0 < alpha < power < 1:
        raise SettingError(f"alpha, power: got {alpha}, {power}; needed: 0 < alpha < power < 1, such as 0.05 and 0.8")
    if num_clusters == 0 or square == 0:
        return None
    z_alpha, z_beta = float(norm.isf(alpha / 2)), float(norm.ppf(power))
    # (sqrt(n) d - z_alpha sqrt(s))^2 = z_beta^2 (s - d^2) is a quadratic a d^2 - 2 b d + c = 0; its larger root is d.
    a = num_clusters + z_beta**2
    b = sqrt(num_clusters * square) * z_alpha
    c = square * (z_alpha**2 - z_beta**2)
    inside = b**2 - a * c
    if inside < 0:
        return None
    effect = (b + sqrt(inside)) / a if z_beta >= 0 else (b - sqrt(inside)) / a
    return effect if effect <= reach else None


MIN_PROMPTS = 30
"""With fewer prompts two parameters are not fitted: the interval would say nothing."""

_INVERSE_PENALTY = 100.0  # a standard deviation of 10 log-odds: only keeps what the data do not bound finite


def length_controlled_rate(
    preferences: Sequence[float],
    longer_by: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    *,
    confidence: float = 0.95,
    num_resamples: int = 2000,
    random_seed: int = 0,
) -> Interval:
    """Return p(better) at equal length by the length term of AlpacaEval 2 (Dubois et al. 2024, arXiv:2404.04475).

    A logistic regression of `preferences` in [0, 1] on a constant and tanh(`longer_by` / its standard deviation), the
    characters that the answer has more than the other one; the rate is its prediction at 0, and the bounds are of the
    bootstrap over `clusters` (prompts). The paper's term of each instruction's difficulty needs the preferences of many
    other models and is left out. Fewer than `MIN_PROMPTS` prompts give no value. Raises `SettingError` for lengths that
    differ, values outside their range, or a confidence outside (0, 1).
    """
    check_confidence(confidence)
    wanted, lengths = in_unit_interval("preferences", preferences), np.asarray(longer_by, dtype=np.float64)
    if lengths.shape != wanted.shape or not np.isfinite(lengths).all():
        raise SettingError(f"longer_by: got {lengths.size} for {wanted.size} preferences; a finite number for each")
    names = list(range(wanted.size)) if clusters is None else list(clusters)
    codes = label_codes("clusters", names, wanted.size)
    if len(set(codes.tolist())) < MIN_PROMPTS:
        return Interval(None, None, None, 0)
    if np.ptp(wanted) == 0:  # length explains nothing, and no resample differs
        return rate_interval(preferences, clusters, confidence=confidence, num_resamples=1, random_seed=random_seed)
    spread = float(lengths.std(ddof=1))
    term = np.tanh(lengths / spread) if spread > 0 else np.zeros_like(lengths)
    value = _at_zero(wanted, term, np.ones_like(wanted))
    rates = [_at_zero(wanted, term, weights) for weights in bootstrap_weights(names, num_resamples, random_seed)]
    tail = (1 - confidence) / 2
    low, high = (float(bound) for bound in np.quantile(rates, [tail, 1 - tail]))
    return Interval(value, low, high, wanted.size)


def _at_zero(preferences: Floats, term: Floats, weights: Floats) -> float:
    """Return the prediction at `term` = 0; a preference is a win and a loss with its share as their weights."""
    from scipy.special import expit
    from sklearn.linear_model import LogisticRegression

    columns = np.column_stack([np.ones_like(term), term])
    model = LogisticRegression(C=_INVERSE_PENALTY, fit_intercept=False, solver="newton-cholesky", tol=1e-8)
    share = np.concatenate([weights * preferences, weights * (1 - preferences)])
    model.fit(np.concatenate([columns, columns]), np.repeat([1, 0], preferences.size), sample_weight=share)
    return float(expit(model.coef_[0, 0]))

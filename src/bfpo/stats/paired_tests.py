"""Tests of a paired difference between two models, and Holm's correction for asking several times."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest, permutation_test

from bfpo.core.errors import SettingError
from bfpo.stats.resampling import Floats, label_codes, paired_values

__all__ = ["PairedTest", "holm", "mcnemar", "paired_test", "sign_flip"]

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

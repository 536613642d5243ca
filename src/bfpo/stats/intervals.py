"""Confidence intervals of rates, means, paired differences and the spread over seeds."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
import numpy.typing as npt

from bfpo.core.errors import SettingError
from bfpo.stats.clustered import difference_bounds, rate_bounds
from bfpo.stats.resampling import Floats, check_confidence, in_unit_interval, label_codes, paired_values

__all__ = [
    "Interval",
    "between_seed_sd",
    "mean_interval",
    "paired_difference",
    "rate_interval",
    "upper_bound_of_zero",
    "wilson",
]


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its confidence bounds; all are `None` without observations (`num` = 0)."""

    value: float | None
    low: float | None
    high: float | None
    num: int


def wilson(successes: int, num: int, *, confidence: float = 0.95) -> Interval:
    """Return the rate `successes / num` with Wilson's score interval (Wilson 1927, JASA 22(158)), valid at 0 of n too.

    Its coverage is the confidence on average over rates, and lower at some of them. `num` = 0 gives an interval of
    `None`. Raises `SettingError` for impossible counts or a confidence outside (0, 1).
    """
    from scipy.stats import binomtest  # slow to import, so only where it computes

    check_confidence(confidence)
    if num < 0 or not 0 <= successes <= num:
        raise SettingError(f"successes, num: got {successes} of {num}; needed: 0 <= successes <= num")
    if num == 0:
        return Interval(None, None, None, 0)

    bounds = binomtest(int(successes), int(num)).proportion_ci(confidence_level=confidence, method="wilson")
    return Interval(successes / num, float(bounds.low), float(bounds.high), num)


def upper_bound_of_zero(num: int, *, confidence: float = 0.95) -> float | None:
    """Return the one-sided upper bound of a rate after 0 events in `num` independent trials; `None` without trials.

    The exact bound of Clopper & Pearson (1934), 1 - (1 - confidence)^(1/num); at 95% the "rule of three" 3/num (Hanley
    & Lippman-Hand 1983, JAMA 249(13)) approximates it from above. Answers to one prompt are not independent: pass the
    number of prompts. The upper bound of a *two*-sided interval is higher, about 3.7/num. Raises `SettingError` for a
    negative count or a confidence outside (0, 1).
    """
    from scipy.stats import binomtest  # slow to import, so only where it computes

    check_confidence(confidence)
    if num < 0:
        raise SettingError(f"num: got {num}; a count of trials, 0 or more, is needed")
    if num == 0:
        return None

    test = binomtest(0, int(num), alternative="less")
    return float(test.proportion_ci(confidence_level=confidence, method="exact").high)


def rate_interval(
    hits: Sequence[bool | float],
    clusters: Sequence[Hashable] | None = None,
    *,
    seeds: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
) -> Interval:
    """Return the mean of values in [0, 1] with an interval that covers new prompts and, with seeds, new trainings.

    One binary value per prompt (`clusters`; `None`: each value is its own) gets the exact interval of Clopper and
    Pearson. Values that share a prompt are not independent and get that interval for their effective number, see
    `rate_bounds`: at least the number of prompts, so 0 of n is as uncertain as one answer per prompt. With several
    trainings (`seeds`), the variance between their means is added. Raises `SettingError` for a value outside [0, 1] or
    lengths that differ.
    """
    check_confidence(confidence)
    values = in_unit_interval("hits", hits)
    if values.size == 0:
        return Interval(None, None, None, 0)
    codes = label_codes("clusters", clusters, values.size)
    variance, num_seeds = _seed_variance(values, seeds)
    sizes = _sums(codes, np.ones_like(values))
    low, high = rate_bounds(
        _sums(codes, values),
        _sums(codes, values**2),
        sizes,
        confidence,
        seed_variance=variance,
        num_seeds=num_seeds,
    )
    mean = float(values.mean())
    return Interval(mean, min(float(low), mean), max(float(high), mean), values.size)


def paired_difference(
    first: Sequence[bool | float],
    second: Sequence[bool | float],
    clusters: Sequence[Hashable] | None = None,
    *,
    seeds: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
) -> Interval:
    """Return mean(first - second) of values in [0, 1] measured on the same items, with an interval.

    Item i of both lists is the same prompt (and, with `seeds`, the same seed). The interval is over prompts and, with
    several seeds, trainings; see `difference_bounds`. If all differences are 0, it is wider than 0 by what so many
    prompts leave open. Raises `SettingError` for lengths that differ or values outside [0, 1].
    """
    check_confidence(confidence)
    left, right = paired_values(first, second)
    if left.size == 0:
        return Interval(None, None, None, 0)
    difference = left - right
    codes = label_codes("clusters", clusters, difference.size)
    variance, num_seeds = _seed_variance(difference, seeds)
    sizes = _sums(codes, np.ones_like(difference))
    low, high = difference_bounds(
        _sums(codes, difference) / sizes, sizes, confidence, seed_variance=variance, num_seeds=num_seeds
    )
    mean = float(difference.mean())
    return Interval(mean, min(float(low), mean), max(float(high), mean), difference.size)


def _sums(codes: npt.NDArray[np.int64], values: Floats) -> Floats:
    """Return the sum of the values of each code, (C,)."""
    return np.asarray(np.bincount(codes, values), np.float64)


def _seed_variance(values: Floats, seeds: Sequence[Hashable] | None) -> tuple[float, int]:
    """Return the variance of the mean that is due to its seeds, as their means show it, and the number of seeds.

    A seed counts by its number of values; one seed shows no variance.
    """
    if seeds is None:
        return 0.0, 1
    codes = label_codes("seeds", seeds, values.size)
    num = int(codes.max()) + 1
    if num < 2:
        return 0.0, num
    deviations = np.bincount(codes, values - values.mean()) / values.size
    variance = float((deviations**2).sum()) * num / (num - 1)
    return (variance if variance > 1e-18 else 0.0), num  # equal means leave a variance of rounding


def between_seed_sd(
    values: Sequence[float] | Floats, seeds: Sequence[Hashable], *, confidence: float = 0.95
) -> Interval:
    """Return the standard deviation of the mean score over seeds (n - 1 in the denominator); `num` counts the seeds.

    `values` are the scores of all trainings, (N,), and `seeds` names the training of each. This is the variation of a
    score over trainings on the same prompts (Bouthillier et al. 2021, arXiv:2103.03098). The bounds assume normal means
    (chi-square, n - 1 degrees of freedom) and are wide: with 3 seeds the upper bound is six times the estimate. One
    seed gives `None`. Equal means give 0 without bounds, since unobserved variation may still exist. Raises
    `SettingError` for lengths that differ or a value that is not finite.
    """
    from scipy.stats import chi2

    check_confidence(confidence)
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or not np.isfinite(data).all():
        raise SettingError("values: a flat list of finite numbers is needed")
    codes = label_codes("seeds", seeds, data.size)
    num_seeds = int(codes.max()) + 1 if codes.size else 0
    if num_seeds < 2:
        return Interval(None, None, None, num_seeds)
    means = np.bincount(codes, data) / np.bincount(codes)
    if np.ptp(means) <= 1e-12 * np.abs(means).max():
        return Interval(0.0, None, None, num_seeds)
    sd = float(means.std(ddof=1))
    tail = (1 - confidence) / 2

    # (n - 1) sd^2 / sigma^2 is chi-square distributed; its upper quantile gives the lower bound of sigma.
    upper, lower = chi2.ppf([1 - tail, tail], num_seeds - 1)
    freedom = float(num_seeds - 1)
    return Interval(sd, sd * float((freedom / upper) ** 0.5), sd * float((freedom / lower) ** 0.5), num_seeds)


def mean_interval(parts: Sequence[Interval], groups: Sequence[Hashable] | None = None) -> Interval:
    """Return the unweighted mean of estimates, with an interval computed from theirs; `num` counts the parts.

    MOVER (Zou & Donner 2008, Statistics in Medicine 27(10)): the distances from each estimate to its lower and upper
    bound are combined like standard errors, each side separately. The bounds keep the confidence level of the parts
    and the range of their scale; for symmetric intervals this is the delta method. Parts are taken as independent, as
    suites with different prompts are. Parts of one group share prompts: their distances are summed, the widest result
    under any dependence. A part without bounds gives a mean without bounds; a part without a value, or no part, gives
    `None`. Raises `SettingError` if the groups are not one per part.
    """
    if groups is not None and len(groups) != len(parts):
        raise SettingError(f"groups: got {len(groups)} for {len(parts)} parts; one per part is needed")
    values = [part.value for part in parts if part.value is not None]
    if not parts or len(values) < len(parts):
        return Interval(None, None, None, len(parts))
    mean = sum(values) / len(values)
    below: dict[Hashable, float] = {}
    above: dict[Hashable, float] = {}
    for place, part in enumerate(parts):
        if part.value is None or part.low is None or part.high is None:
            return Interval(mean, None, None, len(parts))
        group = place if groups is None else groups[place]
        below[group] = below.get(group, 0.0) + (part.value - part.low)
        above[group] = above.get(group, 0.0) + (part.high - part.value)
    # sqrt of the sum of squares over groups, divided by the number of parts, as for the standard error of a mean.
    reach = [sqrt(sum(distance**2 for distance in side.values())) / len(parts) for side in (below, above)]
    return Interval(mean, mean - reach[0], mean + reach[1], len(parts))

"""Bounds of a rate and of a paired difference from sums per cluster (prompt); vectorised over leading axes.

Axes: ... any, C clusters.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from bfpo.stats.resampling import Floats

__all__ = ["clopper_pearson", "difference_bounds", "rate_bounds", "relative_variance"]

# Weights, in clusters, of two assumptions against the data: that the answers to a prompt are all alike, and that values
# between 0 and 1 vary as much as zeros and ones. With 5 the bounds rise with every hit for up to 4 answers per prompt.
_PRIOR = 5.0
_PRIOR_GRADED = 2.0
_ADDED_FREEDOM = 4.0  # of the variance of a difference: what the two added clusters are worth


def clopper_pearson(rate: npt.ArrayLike, num: npt.ArrayLike, confidence: float) -> tuple[Floats, Floats]:
    """Return the bounds of Clopper & Pearson (1934, Biometrika 26(4)) after `rate * num` of `num`, not only integers.

    For integers the coverage is at least `confidence` at every true rate. The low bound of rate 0 is 0, the high bound
    of rate 1 is 1.
    """
    from scipy.special import betaincinv

    p, n = np.broadcast_arrays(np.asarray(rate, np.float64), np.asarray(num, np.float64))
    hits, tail = p * n, (1 - confidence) / 2
    inner = (p > 0) & (p < 1)
    below, above = np.where(p > 0, hits, 1.0), np.where(p < 1, n - hits, 1.0)
    low = np.where(p > 0, betaincinv(below, n - hits + 1, tail), 0.0)
    high = np.where(p < 1, betaincinv(hits + 1, above, 1 - tail), 1.0)
    # Far below one hit the quantile can pass the estimate by rounding alone.
    return np.where(inner, np.minimum(low, p), low), np.where(inner, np.maximum(high, p), high)


def relative_variance(sums: Floats, squares: Floats, sizes: Floats) -> tuple[Floats, Floats, Floats]:
    """Return the mean (...), its effective number of clusters (...), and its variance over the largest possible (...).

    `sums`, `squares`, `sizes` (..., C): per cluster the sum of its values in [0, 1], of their squares, and their
    number. Cluster means that are all 0 or 1 have the largest variance, p (1 - p) over the effective number of clusters
    (Kish 1965; the number of clusters where their sizes are equal). The variance relative to it is a product of two
    factors. One is the variance of cluster means over that of clusters whose values are all alike, estimated with C - 1
    in the denominator, at least that of independent values, and shrunk to 1. The weight of the data is the number of
    clusters with a hit, or with a miss if these are fewer, less one: a single hit does not show whether hits come
    together. The other is the variance of the values over p (1 - p), 1 for zeros and ones, shrunk to 1 likewise.
    """
    num = sizes.sum(axis=-1)
    mean = sums.sum(axis=-1) / num
    weights = sizes / num[..., None]
    effective = 1 / (weights**2).sum(axis=-1)
    spread = mean * (1 - mean)  # the variance of zeros and ones
    num_clusters = sizes.shape[-1]
    informed = np.minimum(np.minimum(1, sums).sum(axis=-1), np.minimum(1, sizes - sums).sum(axis=-1))
    between = ((weights * (sums / sizes - mean[..., None])) ** 2).sum(axis=-1) * effective
    between = between * num_clusters / max(num_clusters - 1, 1)
    within = np.maximum(squares.sum(axis=-1) / num - mean**2, 0.0)
    known = (spread > 0) & (within > 1e-9 * spread)  # equal values leave a variance of rounding
    graded = np.where(spread > 0, np.minimum(within / np.where(spread > 0, spread, 1.0), 1.0), 1.0)
    # 1 where all values of a cluster are alike, the smallest possible where they are independent.
    alike = np.where(known & (num_clusters > 1), between / np.where(known, within, 1.0), 1.0)
    alike = np.clip(alike, np.minimum(effective / num, 1.0), 1.0)
    weight = np.maximum(informed - 1, 0.0)
    relative = (weight * alike + _PRIOR) / (weight + _PRIOR)
    return mean, effective, relative * (informed * graded + _PRIOR_GRADED) / (informed + _PRIOR_GRADED)


def rate_bounds(
    sums: Floats,
    squares: Floats,
    sizes: Floats,
    confidence: float,
    *,
    seed_variance: float = 0.0,
    num_seeds: int = 1,
) -> tuple[Floats, Floats]:
    """Return the bounds (...) of a mean of values in [0, 1], from the arguments of `relative_variance`.

    Clopper & Pearson's interval for an effective number of answers (Korn & Graubard 1998, Survey Methodology 24(2);
    compared with others by Dean & Pagano 2015, Journal of Survey Statistics and Methodology 3(4)), which is at least
    the number of clusters: this is the exact interval for one binary value per cluster. The bounds never exclude what
    the cluster with the largest (smallest) mean alone, among clusters of 0 (of 1), leaves open. `seed_variance`: the
    variance of the mean between `num_seeds` trainings, added to that between clusters.
    """
    mean, effective, relative = relative_variance(sums, squares, sizes)
    num = effective / relative
    if seed_variance > 0:
        spread = mean * (1 - mean)
        # Of the variance between seeds alone: the effective number of answers is already on the safe side.
        total, quantile = _with_seeds(spread / num, np.full_like(mean, np.inf), seed_variance, num_seeds, confidence)
        num = spread / total * (_normal(confidence) / quantile) ** 2
    low, high = clopper_pearson(mean, num, confidence)
    shares = sums / sizes
    _, most = clopper_pearson(shares.max(axis=-1) / effective, effective, confidence)
    least, _ = clopper_pearson(1 - (1 - shares.min(axis=-1)) / effective, effective, confidence)
    return np.minimum(low, least), np.maximum(high, most)


def difference_bounds(
    means: Floats, sizes: Floats, confidence: float, *, seed_variance: float = 0.0, num_seeds: int = 1
) -> tuple[Floats, Floats]:
    """Return the bounds (...) of a mean of paired differences, from their means per cluster in [-1, 1], (..., C).

    The interval of Bonett & Price (2012, J. Educational and Behavioral Statistics 37(4)) for paired proportions, which
    adds one difference of +1 and one of -1 to the data, here to the clusters; so a difference that was not seen is not
    excluded. The quantile is Student's, with the effective number of clusters behind the variance (the sum of squares
    squared over the sum of fourth powers) as degrees of freedom: few clusters that differ say little about the spread.
    `seed_variance`, `num_seeds` as in `rate_bounds`.
    """
    weights = sizes / sizes.sum(axis=-1)[..., None]
    effective = 1 / (weights**2).sum(axis=-1)
    mean = (weights * means).sum(axis=-1)
    squares = (weights * (means - mean[..., None])) ** 2
    fourth = (squares**2).sum(axis=-1)
    freedom = squares.sum(axis=-1) ** 2 / np.where(fourth > 0, fourth, 1.0) + _ADDED_FREEDOM
    num = effective + 2
    centre = effective * mean / num
    second = (effective * (effective * squares.sum(axis=-1) + mean**2) + 2) / num
    own = (second - centre**2) / num
    if seed_variance > 0:
        own, quantile = _with_seeds(own, freedom, seed_variance, num_seeds, confidence)
    else:
        quantile = _student(freedom, confidence)
    half = quantile * np.sqrt(own)
    return np.maximum(-1.0, np.minimum(centre - half, mean)), np.minimum(1.0, np.maximum(centre + half, mean))


def _with_seeds(
    variance: Floats, freedom: Floats, seed_variance: float, num_seeds: int, confidence: float
) -> tuple[Floats, Floats]:
    """Return the variance with that between seeds, and Student's quantile with Satterthwaite's degrees of freedom.

    Both parts contain the variance of prompts within seeds: the sum is on the safe side, as the pigeonhole bootstrap
    is (Owen 2007, Annals of Applied Statistics 1(2)).
    """
    total = variance + seed_variance
    return total, _student(total**2 / (variance**2 / freedom + seed_variance**2 / (num_seeds - 1)), confidence)


def _student(freedom: Floats, confidence: float) -> Floats:
    from scipy.special import stdtrit

    return np.asarray(stdtrit(freedom, (1 + confidence) / 2), np.float64)


def _normal(confidence: float) -> float:
    from scipy.special import ndtri

    return float(ndtri((1 + confidence) / 2))

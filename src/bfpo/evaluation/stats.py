"""Intervals for rates and means: Wilson, bootstrap over prompts (and seeds), paired differences."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest

from bfpo.errors import SettingError

__all__ = ["Interval", "bootstrap_weights", "cluster_bootstrap", "paired_difference", "rate_interval", "wilson"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_CHUNK_FLOATS = 8_000_000


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its confidence bounds; all `None` where there was nothing to count (`num` = 0)."""

    value: float | None
    low: float | None
    high: float | None
    num: int


def wilson(successes: int, num: int, *, confidence: float = 0.95) -> Interval:
    """Return the rate `successes / num` with Wilson's score interval (Wilson 1927), which holds at 0 of n too.

    `num` = 0 gives an interval of `None`. Raises `SettingError` for counts that cannot be, or a confidence outside
    (0, 1).
    """
    _check_confidence(confidence)
    if num < 0 or not 0 <= successes <= num:
        raise SettingError(f"successes, num: got {successes} of {num}; needed: 0 <= successes <= num")
    if num == 0:
        return Interval(None, None, None, 0)
    bounds = binomtest(int(successes), int(num)).proportion_ci(confidence_level=confidence, method="wilson")
    return Interval(successes / num, float(bounds.low), float(bounds.high), num)


def rate_interval(
    hits: Sequence[bool | float],
    clusters: Sequence[Hashable] | None = None,
    *,
    seeds: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    num_resamples: int = 2000,
    random_seed: int = 0,
) -> Interval:
    """Return the mean of values in [0, 1] with the interval that fits how they were drawn.

    Independent zeros and ones get Wilson's interval. Values that share a prompt (`clusters`) or come from several
    trainings (`seeds`) are not independent and get the bootstrap of `cluster_bootstrap`. Where that bootstrap has no
    spread to show (0 of n, n of n, one cluster) the bounds are Wilson's for the number of *clusters*, so that nothing
    is ever certain. Raises `SettingError` for a value outside [0, 1] or lengths that differ.
    """
    values = _in_unit_interval("hits", hits)
    if values.size == 0:
        return Interval(None, None, None, 0)
    cluster_codes = _codes("clusters", clusters, values.size)
    seed_codes = _codes("seeds", seeds, values.size) if seeds is not None else None
    num_clusters = int(cluster_codes.max()) + 1
    several_seeds = seed_codes is not None and int(seed_codes.max()) > 0
    binary = bool(np.isin(values, (0.0, 1.0)).all())
    if binary and num_clusters == values.size and not several_seeds:
        return wilson(int(values.sum()), values.size, confidence=confidence)
    bootstrap = cluster_bootstrap(
        values, clusters, seeds=seeds, confidence=confidence, num_resamples=num_resamples, random_seed=random_seed
    )
    if bootstrap.low is not None and bootstrap.high is not None and bootstrap.low < bootstrap.high:
        return bootstrap
    mean = float(values.mean())
    bounds = _wilson_bounds(mean, num_clusters, confidence)
    return Interval(mean, min(bounds[0], mean), max(bounds[1], mean), values.size)


def cluster_bootstrap(
    values: Sequence[float] | Floats,
    clusters: Sequence[Hashable] | None = None,
    *,
    seeds: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    num_resamples: int = 2000,
    random_seed: int = 0,
) -> Interval:
    """Return the mean of `values` with a percentile bootstrap interval that redraws whole clusters.

    `clusters` names the prompt of each value (`None`: each value is its own). With `seeds`, prompts and seeds are
    redrawn independently and each value weighs the product of its two counts (the pigeonhole bootstrap: Owen 2007,
    Annals of Applied Statistics 1(2)), so that the interval speaks about other prompts *and* other trainings. One
    cluster and one seed leave nothing to redraw: the bounds are `None`. Raises `SettingError` for lengths that differ
    or a value that is not finite.
    """
    _check_confidence(confidence)
    if num_resamples < 1:
        raise SettingError(f"num_resamples: got {num_resamples}; at least 1 is needed")
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or not np.isfinite(data).all():
        raise SettingError("values: a flat list of finite numbers is needed")
    if data.size == 0:
        return Interval(None, None, None, 0)
    cluster_codes = _codes("clusters", clusters, data.size)
    seed_codes = _codes("seeds", seeds, data.size) if seeds is not None else np.zeros(data.size, dtype=np.int64)
    sums, counts = _table(data, cluster_codes, seed_codes)
    mean = float(data.mean())
    if sums.size == 1:
        return Interval(mean, None, None, data.size)
    means = _resampled_means(sums, counts, num_resamples, random_seed)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(mean, float(low), float(high), data.size)


def bootstrap_weights(clusters: Sequence[Hashable], num_resamples: int, random_seed: int = 0) -> Iterator[Floats]:
    """Yield, for each resample of whole clusters, how often each value is drawn, `(len(clusters),)`.

    For statistics that are no mean: they take these as the weights of their values.
    """
    codes = _codes("clusters", clusters, len(clusters))
    num_clusters = int(codes.max()) + 1 if codes.size else 0
    generator = np.random.default_rng(random_seed)
    for _ in range(num_resamples if num_clusters else 0):
        drawn = generator.multinomial(num_clusters, np.full(num_clusters, 1 / num_clusters))
        yield drawn[codes].astype(np.float64)


def paired_difference(
    first: Sequence[bool | float],
    second: Sequence[bool | float],
    clusters: Sequence[Hashable] | None = None,
    *,
    seeds: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    num_resamples: int = 2000,
    random_seed: int = 0,
) -> Interval:
    """Return mean(first - second) of values in [0, 1] measured on the same items, with a bootstrap interval.

    Item i of both lists is the same prompt (and, with `seeds`, the same seed). Where every difference is equal, the
    bounds reach as far as the share of other differences that n clusters cannot exclude (Wilson's upper bound of 0 of
    n). Raises `SettingError` for lengths that differ or values outside [0, 1].
    """
    left, right = _in_unit_interval("first", first), _in_unit_interval("second", second)
    if left.size != right.size:
        raise SettingError(f"first, second: got {left.size} and {right.size} values; they must be of the same items")
    if left.size == 0:
        return Interval(None, None, None, 0)
    difference = left - right
    interval = cluster_bootstrap(
        difference, clusters, seeds=seeds, confidence=confidence, num_resamples=num_resamples, random_seed=random_seed
    )
    if interval.low is not None and interval.high is not None and interval.low < interval.high:
        return interval
    num_clusters = int(_codes("clusters", clusters, difference.size).max()) + 1
    reach = _wilson_bounds(0.0, num_clusters, confidence)[1]
    mean = float(difference.mean())
    return Interval(mean, max(-1.0, mean - reach), min(1.0, mean + reach), difference.size)


def _resampled_means(sums: Floats, counts: Floats, num_resamples: int, random_seed: int) -> Floats:
    """Return (num_resamples,) means of resampled rows (clusters) and columns (seeds) of the (C, S) table."""
    num_clusters, num_seeds = sums.shape
    generator = np.random.default_rng(random_seed)
    cluster_share, seed_share = np.full(num_clusters, 1 / num_clusters), np.full(num_seeds, 1 / num_seeds)
    means: list[Floats] = []
    step = max(1, _CHUNK_FLOATS // num_clusters)
    for start in range(0, num_resamples, step):
        size = min(step, num_resamples - start)
        by_cluster = generator.multinomial(num_clusters, cluster_share, size=size).astype(np.float64)
        by_seed = generator.multinomial(num_seeds, seed_share, size=size).astype(np.float64)
        total = ((by_cluster @ sums) * by_seed).sum(axis=1)
        weight = ((by_cluster @ counts) * by_seed).sum(axis=1)
        # A redraw that meets only empty cells of an incomplete table has no mean.
        means.append(total[weight > 0] / weight[weight > 0])
    return np.concatenate(means)


def _table(data: Floats, cluster_codes: Ints, seed_codes: Ints) -> tuple[Floats, Floats]:
    """Return the sum and the number of values per (cluster, seed)."""
    shape = (int(cluster_codes.max()) + 1, int(seed_codes.max()) + 1)
    sums, counts = np.zeros(shape), np.zeros(shape)
    np.add.at(sums, (cluster_codes, seed_codes), data)
    np.add.at(counts, (cluster_codes, seed_codes), 1.0)
    return sums, counts


def _wilson_bounds(rate: float, num: int, confidence: float) -> tuple[float, float]:
    bounds = binomtest(round(rate * num), num).proportion_ci(confidence_level=confidence, method="wilson")
    return float(bounds.low), float(bounds.high)


def _codes(name: str, labels: Sequence[Hashable] | None, size: int) -> Ints:
    if labels is None:
        return np.arange(size, dtype=np.int64)
    if len(labels) != size:
        raise SettingError(f"{name}: got {len(labels)} for {size} values; one per value is needed")
    seen: dict[Hashable, int] = {}
    return np.array([seen.setdefault(label, len(seen)) for label in labels], dtype=np.int64)


def _in_unit_interval(name: str, values: Sequence[bool | float]) -> Floats:
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or not (np.isfinite(data) & (data >= 0) & (data <= 1)).all():
        raise SettingError(f"{name}: a flat list of numbers in [0, 1] is needed")
    return data


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise SettingError(f"confidence: got {confidence}; allowed: a number between 0 and 1, such as 0.95")

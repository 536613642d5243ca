"""Rates and paired differences from people's labels of a sample and a judge's predictions of all answers (PPI++).

Prediction-powered inference with power tuning (Angelopoulos, Duchi & Zrnic 2023, arXiv 2311.01453), where the labelled
answers are a sample of the predicted ones: the estimate is that of two-phase sampling with a regression (Cochran 1977,
Sampling Techniques, section 12.6). Axes: ... any, C clusters (prompts) with labels.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bfpo.core.errors import SettingError
from bfpo.stats.clustered import clopper_pearson, difference_bounds, rate_bounds, relative_variance
from bfpo.stats.intervals import Interval
from bfpo.stats.resampling import Floats, check_confidence, in_unit_interval, label_codes

__all__ = [
    "PoweredInterval",
    "Predictions",
    "half_width",
    "labels_for",
    "powered_difference",
    "powered_difference_bounds",
    "powered_rate",
    "powered_rate_bounds",
]

# Weight, in labels, of the assumption that the predictions say nothing; with less, few labels promise too much.
_PRIOR = 8.0
_NOTHING = Interval(None, None, None, 0)


@dataclass(frozen=True, slots=True)
class PoweredInterval(Interval):
    """An estimate from `num` labels and the predictions of `num_predicted` answers.

    `people`: the interval of the labels alone. `weight`: the tuned weight of the predictions, 0 if they do not help.
    `residual`: the share of the labels' variance that they leave. `effective`: the number of labels with the same
    interval if there were no predictions.
    """

    num_predicted: int = 0
    people: Interval = _NOTHING
    weight: float = 0.0
    residual: float = 1.0
    effective: float = 0.0


@dataclass(frozen=True, slots=True)
class Predictions:
    """Predictions in [0, 1] of all answers, (N,), the prompt of each, and which of them have a label, (n,) places.

    `inclusion`: the probability with which each labelled answer was chosen to be labelled, (n,), up to a common factor;
    `None`: the same for all.
    """

    values: Sequence[float]
    clusters: Sequence[Hashable]
    labelled: Sequence[int]
    inclusion: Sequence[float] | None = None


def powered_rate(
    labels: Sequence[bool | float], predictions: Predictions, *, confidence: float = 0.95
) -> PoweredInterval:
    """Return the mean of labels in [0, 1], (n,), over all answers; bounds as of `powered_rate_bounds`.

    Holds for any judge, since the labels correct its error, if the labelled answers are a random sample. Raises
    `SettingError` for lengths that differ or values outside [0, 1].
    """
    values = in_unit_interval("labels", labels)
    return _powered(values, in_unit_interval("predictions", predictions.values), predictions, confidence, rates=True)


def powered_difference(
    first: Sequence[bool | float], second: Sequence[bool | float], predictions: Predictions, *, confidence: float = 0.95
) -> PoweredInterval:
    """Return mean(first - second) over all items, from the labels of both models for n of them.

    `predictions.values` are those of the first model minus those of the second. Bounds as of
    `powered_difference_bounds`; raises as `powered_rate`.
    """
    left, right = in_unit_interval("first", first), in_unit_interval("second", second)
    if left.size != right.size:
        raise SettingError(f"first, second: got {left.size} and {right.size} values; their lengths must match")
    values = np.asarray(predictions.values, np.float64)
    if values.ndim != 1 or not (np.abs(values) <= 1).all():
        raise SettingError("predictions: a flat list of differences in [-1, 1] is needed")
    return _powered(left - right, values, predictions, confidence, rates=False)


def _powered(
    labels: Floats, values: Floats, predictions: Predictions, confidence: float, *, rates: bool
) -> PoweredInterval:
    check_confidence(confidence)
    places = np.asarray(predictions.labelled, np.int64)
    every = label_codes("clusters", predictions.clusters, values.size)
    if places.size != labels.size:
        raise SettingError(f"labelled: got {places.size} places for {labels.size} labels; one per label is needed")
    if labels.size == 0:
        return PoweredInterval(None, None, None, 0, values.size)
    weights = _weights(predictions.inclusion, labels.size)
    codes = label_codes("clusters", every[places].tolist(), labels.size)

    def sums(of: Floats) -> Floats:
        return np.asarray(np.bincount(codes, weights * of), np.float64)

    mean_values, num_clusters = float(values.mean()), len(np.unique(every))
    sizes, one, two = sums(np.ones_like(labels)), sums(labels), sums(values[places])
    if rates:
        squares = sums(labels**2)
        found = powered_rate_bounds(one, squares, two, sizes, mean_values, num_clusters, confidence)
        alone = rate_bounds(one, squares, sizes, confidence)
    else:
        found = powered_difference_bounds(one / sizes, two / sizes, sizes, mean_values, num_clusters, confidence)
        alone = difference_bounds(one / sizes, sizes, confidence)
    mean = float(one.sum() / sizes.sum())
    people = Interval(mean, min(float(alone[0]), mean), max(float(alone[1]), mean), labels.size)
    value = float(found.value)
    return PoweredInterval(
        value,
        min(float(found.low), value),
        max(float(found.high), value),
        labels.size,
        values.size,
        people,
        float(found.weight),
        float(found.residual),
        float(found.effective),
    )


def _weights(inclusion: Sequence[float] | None, size: int) -> Floats:
    """Return the weights of labels, inverse to their probability of inclusion, with mean 1."""
    given = np.ones(size) if inclusion is None else np.asarray(inclusion, np.float64)
    if given.shape != (size,) or not (np.isfinite(given) & (given > 0)).all():
        raise SettingError("inclusion: a number above 0 for each label is needed")
    weights = 1 / given
    return np.asarray(weights / weights.mean(), np.float64)


@dataclass(frozen=True, slots=True)
class _Bounds:
    """Arrays (...): the estimate, its bounds, and the fields of `PoweredInterval`."""

    value: Floats
    low: Floats
    high: Floats
    weight: Floats
    residual: Floats
    effective: Floats


def powered_rate_bounds(
    sums: Floats,
    squares: Floats,
    predicted: Floats,
    sizes: Floats,
    mean_predicted: npt.ArrayLike,
    num_clusters: int,
    confidence: float,
) -> _Bounds:
    """Return the estimate of a rate with bounds, (...), from sums over the labelled answers of each cluster, (..., C).

    `sums`, `squares`, `sizes` as in `relative_variance`, weighted; `predicted`: sums of predictions.
    `mean_predicted`: the mean prediction of all answers, to `num_clusters` prompts. The bounds are those of Clopper &
    Pearson for the number of labels whose variance the estimate has, (1/N + (1/n - 1/N) residual) of one label's, with
    n the effective number of labels and N the prompts. A normal interval, as in the paper, covers too rarely where
    labels are few or nearly all alike.
    """
    mean, effective, relative = relative_variance(sums, squares, sizes)
    informed = np.minimum(np.minimum(1, sums).sum(axis=-1), np.minimum(1, sizes - sums).sum(axis=-1))
    tuned = _tuned(sums / sizes, predicted / sizes, sizes, mean_predicted, informed)
    # Unequal weights that go with the values leave more variance than Kish's effective number says.
    varies = tuned.variance > 1e-12
    of_mean = np.where(varies, mean * (1 - mean) / np.where(varies, tuned.variance, 1.0), np.inf)
    num = _effective(np.minimum(effective / relative, of_mean), num_clusters, tuned.residual)
    value = np.clip(mean - tuned.shift, 0.0, 1.0)
    value = np.where(np.minimum(value, 1 - value) < 1e-12, np.round(value), value)  # all alike, up to rounding
    low, high = clopper_pearson(value, num, confidence)
    return _Bounds(value, low, high, tuned.weight, tuned.residual, num)


def powered_difference_bounds(
    means: Floats,
    predicted: Floats,
    sizes: Floats,
    mean_predicted: npt.ArrayLike,
    num_clusters: int,
    confidence: float,
) -> _Bounds:
    """Return the estimate of a paired difference with bounds, (...), from means per labelled cluster, (..., C).

    The interval of `difference_bounds` for the effective number of labels, as in `powered_rate_bounds`.
    """
    share = sizes / sizes.sum(axis=-1)[..., None]
    mean = (share * means).sum(axis=-1)
    num_labels = 1 / (share**2).sum(axis=-1)
    tuned = _tuned(means, predicted, sizes, mean_predicted, np.minimum(1, np.abs(means)).sum(axis=-1))
    from scipy.special import stdtrit

    num = _effective(num_labels, num_clusters, tuned.residual)
    value = np.clip(mean - tuned.shift, -1.0, 1.0)
    squares = (share * (means - mean[..., None])) ** 2
    fourth = (squares**2).sum(axis=-1)
    freedom = squares.sum(axis=-1) ** 2 / np.where(fourth > 0, fourth, 1.0) + 4.0  # as in `difference_bounds`
    centre = num * value / (num + 2)
    second = (num * (num_labels * squares.sum(axis=-1) + value**2) + 2) / (num + 2)
    half = np.asarray(stdtrit(freedom, (1 + confidence) / 2)) * np.sqrt((second - centre**2) / (num + 2))
    low, high = np.maximum(-1.0, np.minimum(centre - half, value)), np.minimum(1.0, np.maximum(centre + half, value))
    return _Bounds(value, low, high, tuned.weight, tuned.residual, num)


@dataclass(frozen=True, slots=True)
class _Tuned:
    """Arrays (...): the tuned weight, the share of variance left, the shift of the mean, and the mean's variance."""

    weight: Floats
    residual: Floats
    shift: Floats
    variance: Floats


def _tuned(means: Floats, predicted: Floats, sizes: Floats, mean_predicted: npt.ArrayLike, informed: Floats) -> _Tuned:
    """Tune the weight of the predictions on the labels: their regression, shrunk towards 0.

    `informed`: the number of labels of the rarer kind. With the shrunk weight s b the share of variance left is
    1 - (2 s - s^2) r^2, where r^2 is corrected for the degree of freedom that the slope b costs. A negative slope is 0.
    """
    share = sizes / sizes.sum(axis=-1)[..., None]
    at, of = (share * means).sum(axis=-1), (share * predicted).sum(axis=-1)
    own, other = share * (means - at[..., None]), share * (predicted - of[..., None])
    yy, ff, yf = (own**2).sum(axis=-1), (other**2).sum(axis=-1), np.maximum((own * other).sum(axis=-1), 0.0)
    known = (yy > 1e-12 * share.max(axis=-1) ** 2) & (ff > 1e-12 * share.max(axis=-1) ** 2)
    slope = np.where(known, yf / np.where(known, ff, 1.0), 0.0)
    num = means.shape[-1]
    explained = np.where(known, yf**2 / np.where(known, yy * ff, 1.0), 0.0)
    explained = np.clip(1 - (1 - explained) * (num - 1) / max(num - 2, 1), 0.0, 1.0)
    weight = np.maximum(informed - 1, 0.0)
    shrunk = weight / (weight + _PRIOR)
    shift = shrunk * slope * (of - np.asarray(mean_predicted, np.float64))
    return _Tuned(shrunk * slope, 1 - (2 * shrunk - shrunk**2) * explained, shift, yy)


def _effective(num_labels: npt.ArrayLike, num_clusters: npt.ArrayLike, residual: npt.ArrayLike) -> Floats:
    """Return the number of labels whose variance alone is that of n labels and predictions of N prompts."""
    n, total = np.asarray(num_labels, np.float64), np.asarray(num_clusters, np.float64)
    return np.asarray(1 / (1 / total + np.maximum(1 / n - 1 / total, 0.0) * np.asarray(residual)), np.float64)


# ----------------------------------------------------------------------------------------------------------- planning


def half_width(
    num_labels: float, num_clusters: int, *, rate: float = 0.5, residual: float = 1.0, confidence: float = 0.95
) -> float:
    """Return half the width of the interval of a rate that so many labels give; `residual` 1: the judge is no help."""
    low, high = clopper_pearson(rate, _effective(num_labels, num_clusters, residual), confidence)
    return float(high - low) / 2


def labels_for(wanted: float, num_clusters: int, width: Callable[[float], float]) -> int | None:
    """Return the fewest labels of at most `num_clusters` prompts with `width(labels) <= wanted`; `None`: all of them
    are too few.
    """
    if width(num_clusters) > wanted:
        return None
    low, high = 0, num_clusters  # width(low) > wanted >= width(high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if width(middle) <= wanted else (middle, high)
    return high

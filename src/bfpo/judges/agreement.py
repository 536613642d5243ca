"""Agreement of judges beyond chance: Cohen's and Fleiss' kappa with intervals, and disagreements on single texts."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bfpo.core.errors import SettingError
from bfpo.judges.panel import Opinion
from bfpo.stats import Interval, bootstrap_weights

__all__ = ["cohen_kappa", "disagreement", "fleiss_kappa"]

Floats = npt.NDArray[np.float64]
Ratings = Sequence[bool | None]


def cohen_kappa(
    first: Ratings,
    second: Ratings,
    clusters: Sequence[Hashable] | None = None,
    *,
    confidence: float = 0.95,
    num_resamples: int = 2000,
    random_seed: int = 0,
) -> Interval:
    """Return Cohen's kappa (Cohen 1960) of two raters, over the items that both rated.

    `None` means not rated. The interval is a percentile bootstrap over `clusters` (prompts). The value is `None` if
    both raters give one and the same label to every item: chance agreement is then 1. There are no bounds if no
    resample differs, as of raters who never disagree. Raises `SettingError` for different lengths.
    """
    if len(first) != len(second):
        raise SettingError(f"ratings: got {len(first)} of one rater and {len(second)} of the other")
    both = [n for n, pair in enumerate(zip(first, second, strict=True)) if None not in pair]
    cells = np.zeros((len(both), 4))
    cells[np.arange(len(both)), [2 * bool(first[n]) + bool(second[n]) for n in both]] = 1
    return _bootstrapped(cells, _cohen, _chosen(clusters, both), confidence, num_resamples, random_seed)


def _cohen(sums: Floats) -> Floats:
    """Return kappa from the counts of (no, no), (no, yes), (yes, no), (yes, yes), (..., 4) -> (...)."""
    total = sums.sum(axis=-1)
    agreed = (sums[..., 0] + sums[..., 3]) / total
    first, second = (sums[..., 2] + sums[..., 3]) / total, (sums[..., 1] + sums[..., 3]) / total
    return _beyond_chance(agreed, first * second + (1 - first) * (1 - second))


def fleiss_kappa(
    ratings: Sequence[Ratings],
    clusters: Sequence[Hashable] | None = None,
    *,
    confidence: float = 0.95,
    num_resamples: int = 2000,
    random_seed: int = 0,
) -> Interval:
    """Return Fleiss' kappa (Fleiss 1971) of two labels; `ratings` holds one rating per item for each rater.

    It covers the items that every rater rated, since Fleiss' kappa assumes a fixed number of ratings; otherwise as
    `cohen_kappa`. Raises `SettingError` for fewer than two raters or different lengths.
    """
    if len(ratings) < 2 or len({len(one) for one in ratings}) != 1:
        raise SettingError(f"ratings: got {[len(one) for one in ratings]} of the raters; needed: two raters or more")
    num_raters = len(ratings)
    items = list(zip(*ratings, strict=True))
    whole = [n for n, item in enumerate(items) if None not in item]
    yes = np.array([sum(map(bool, items[n])) for n in whole], np.float64)
    no = num_raters - yes
    agreed = (yes * (yes - 1) + no * (no - 1)) / (num_raters * (num_raters - 1))
    columns = np.stack([agreed, yes / num_raters, np.ones_like(yes)], axis=1)
    return _bootstrapped(columns, _fleiss, _chosen(clusters, whole), confidence, num_resamples, random_seed)


def _fleiss(sums: Floats) -> Floats:
    """Return kappa from the sums over items of (agreeing share of rater pairs, share of yes, 1), (..., 3) -> (...)."""
    agreed, yes = sums[..., 0] / sums[..., 2], sums[..., 1] / sums[..., 2]
    return _beyond_chance(agreed, yes**2 + (1 - yes) ** 2)


def _beyond_chance(agreed: Floats, by_chance: Floats) -> Floats:
    """Return (agreed - chance) / (1 - chance), NaN where chance agreement is 1."""
    room = 1 - by_chance
    return np.where(room > 1e-12, (agreed - by_chance) / np.where(room > 1e-12, room, 1), np.nan)


def _chosen(clusters: Sequence[Hashable] | None, places: Sequence[int]) -> list[Hashable]:
    return [places[n] if clusters is None else clusters[place] for n, place in enumerate(places)]


def _bootstrapped(
    columns: Floats,
    statistic: Callable[[Floats], Floats],
    clusters: Sequence[Hashable],
    confidence: float,
    num_resamples: int,
    random_seed: int,
) -> Interval:
    """Return a statistic of the column sums of (N, C) rows, with bounds from resampled clusters, if these differ."""
    if not len(columns):
        return Interval(None, None, None, 0)
    value = float(statistic(columns.sum(axis=0)))
    if np.isnan(value):
        return Interval(None, None, None, len(columns))
    if len(set(clusters)) == 1:
        return Interval(value, None, None, len(columns))
    weights = bootstrap_weights(clusters, num_resamples, random_seed)
    drawn = np.array([statistic(weights_N @ columns) for weights_N in weights])
    known = drawn[~np.isnan(drawn)]  # a draw with a single label has no kappa
    if not len(known) or np.ptp(known) < 1e-12:  # no spread is not certainty
        return Interval(value, None, None, len(columns))
    low, high = np.quantile(known, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(value, float(low), float(high), len(columns))


@dataclass(frozen=True, slots=True)
class Disagreement:
    """Opinions on one completion and their distance: the largest p(safe) minus the smallest, in [0, 1]."""

    distance: float
    p_safe: dict[str, float]


def disagreement(opinions: Mapping[str, Opinion | float]) -> Disagreement | None:
    """Return the disagreement of opinions (or labels as probabilities) by name, `None` if all labels are the same.

    Unscored opinions are ignored. A probability above 0.5 means safe.
    """
    labels: set[bool] = set()
    p_safe: dict[str, float] = {}
    for name, opinion in opinions.items():
        if isinstance(opinion, Opinion):
            if opinion.p_safe is None:
                continue
            labels.add(opinion.label == "safe")
            p_safe[name] = opinion.p_safe
        else:
            labels.add(opinion > 0.5)
            p_safe[name] = float(opinion)
    if len(labels) < 2:
        return None
    return Disagreement(max(p_safe.values()) - min(p_safe.values()), p_safe)

"""One-sided bounds that hold their confidence whatever the truth is: of a paired difference, and of a rate.

Axes: T trials (any leading axes), C clusters (prompts), b and c the numbers of prompts that favour either model.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from bfpo.core.errors import SettingError
from bfpo.stats.clustered import difference_bounds
from bfpo.stats.intervals import rate_interval
from bfpo.stats.resampling import Floats, label_codes, paired_values

__all__ = ["difference_floor", "rate_bound"]

_MOST_ERRORS = 2.8  # standard errors in the statistic that orders outcomes, with which it rises with b where c is small
_TAIL = 9.0  # standard deviations of a binomial beyond which nothing is added
_ROUNDED = 1e-7  # of a bound, downwards


def difference_floor(
    first: Sequence[bool | float],
    second: Sequence[bool | float],
    clusters: Sequence[Hashable] | None = None,
    *,
    confidence: float = 0.95,
) -> float | None:
    """Return the one-sided lower bound of mean(first - second) over paired values in [0, 1], (N,) each; `None`: N = 0.

    One binary value per prompt (`clusters`; `None`: each value is its own) gets an exact bound: the bound of Buehler
    (1957, JASA 52(280)), the largest that is right with at least `confidence` whatever the shares of prompts are that
    favour either model, for outcomes ordered by the lower bound of Bonett & Price (2012) with a normal quantile. One
    side of `difference_bounds` is wrong up to 1.8 times as often as it says where few prompts differ: its two sides err
    unequally. Graded values, and several values per prompt, get the smaller of that side and of the exact bound for
    their effective number of prompts with the same mean and variance. The upper bound is minus the lower one of the
    swapped lists. Raises `SettingError` for lengths that differ, values outside [0, 1] or a confidence outside
    (0.5, 1).
    """
    _check(confidence)
    left, right = paired_values(first, second)
    if left.size == 0:
        return None
    codes = label_codes("clusters", clusters, left.size)
    sizes = np.bincount(codes).astype(np.float64)
    means: Floats = np.bincount(codes, left - right) / sizes
    weights = sizes / sizes.sum()
    num = max(1, int(1 / float((weights**2).sum()) + 1e-9))
    mean, square = float((weights * means).sum()), float((weights * means**2).sum())
    exact = _buehler(num * mean, num * square, num, confidence)
    if sizes.max() > 1 or not np.isin(means, (-1.0, 0.0, 1.0)).all():
        exact = min(exact, float(difference_bounds(means, sizes, 2 * confidence - 1)[0]))
    return min(exact, mean)


def rate_bound(
    hits: Sequence[bool | float],
    clusters: Sequence[Hashable] | None = None,
    *,
    confidence: float = 0.95,
    upper: bool = False,
) -> float | None:
    """Return the one-sided lower (or `upper`) bound of a mean of values in [0, 1], as `rate_interval` has it.

    Exact (Clopper & Pearson 1934) for one binary value per prompt. `None` without values; raises as `difference_floor`.
    """
    _check(confidence)
    found = rate_interval(hits, clusters, confidence=2 * confidence - 1)
    return found.high if upper else found.low


def _check(confidence: float) -> None:
    if not 0.5 < confidence < 1:
        raise SettingError(f"confidence: got {confidence}; allowed: a number between 0.5 and 1, such as 0.95")


def _statistic(total: Floats | float, squares: Floats | float, num: int, errors: float) -> Floats:
    """Return the lower bound of Bonett & Price, by sum and sum of squares of `num` differences."""
    centre = np.asarray(total, np.float64) / (num + 2)
    spread = (np.asarray(squares, np.float64) + 2) / (num + 2) - centre**2
    return np.asarray(centre - errors * np.sqrt(spread / (num + 2)))


def _buehler(total: float, squares: float, num: int, confidence: float) -> float:
    """Return the largest difference under which an outcome of at least this statistic is rarer than 1 - confidence."""
    from scipy.optimize import brentq
    from scipy.special import ndtri

    # The quantile of the confidence makes the chance depend little on the rates, so the worst ones cost little.
    most = _most_against(total, squares, num, min(float(ndtri(confidence)), _MOST_ERRORS))
    if most[0] == num:  # all outcomes
        return -1.0
    found = brentq(lambda difference: _worst_chance(difference, most, num) - (1 - confidence), -1.0, 1.0, xtol=_ROUNDED)
    return max(-1.0, float(found) - 2 * _ROUNDED)


def _most_against(total: float, squares: float, num: int, errors: float) -> Floats:
    """Return for b = 0 ... num the largest c with at least the statistic of the data, -1 if none has, (num + 1,).

    It falls with c. It rises with b except near c = num; the running maximum makes the set of outcomes grow with b
    there too, and sets of a lower statistic still contain those of a higher one, as an ordering needs.
    """
    least = _statistic(total, squares, num, errors) - 1e-12
    favour = np.arange(num + 1, dtype=np.float64)
    low: Floats = np.full(num + 1, -1.0)  # c of the set
    high: Floats = num - favour + 1  # c outside
    while (open_ := high - low > 1).any():
        middle = np.floor((low + high) / 2)
        inside = _statistic(favour - middle, favour + middle, num, errors) >= least
        low, high = np.where(open_ & inside, middle, low), np.where(open_ & ~inside, middle, high)
    return np.asarray(np.minimum(np.maximum.accumulate(low), num - favour))


def _worst_chance(difference: float, most: Floats, num: int) -> float:
    """Return the largest chance of the outcomes c <= `most`[b], over the rates whose difference is this."""
    least, largest = max(0.0, -difference), (1 - difference) / 2  # of the prompts that favour the second model
    shares = np.unique(np.concatenate([[0.0, 1.0], np.geomspace(1e-6, 1.0, 24), np.linspace(0.0, 1.0, 17)]))
    highest = 0.0
    for _ in range(3):
        chances = _chances(least + (largest - least) * shares, difference, most, num)
        best = int(chances.argmax())
        highest = max(highest, float(chances[best]))
        shares = np.linspace(shares[max(best - 1, 0)], shares[min(best + 1, len(shares) - 1)], 9)
    return highest


def _chances(against: Floats, difference: float, most: Floats, num: int) -> Floats:
    """Return the probabilities (R,) of c <= `most`[b] under rates `against`, (R,): b is binomial, and c given b."""
    from scipy.special import bdtr, gammaln, xlog1py, xlogy

    favour = np.clip(against + difference, 0.0, 1.0)[:, None]
    reach = _TAIL * np.sqrt(num * favour * (1 - favour)) + _TAIL
    first = np.maximum(0.0, np.floor(num * favour - reach))
    places = first + np.arange(min(num, int(2 * reach.max()) + 1) + 1)
    inside = places <= num
    places = np.minimum(places, num)
    rest = num - places
    logs = gammaln(num + 1) - gammaln(places + 1) - gammaln(rest + 1)
    masses = np.where(inside, np.exp(logs + xlogy(places, favour) + xlog1py(rest, -favour)), 0.0)
    share = np.minimum(against[:, None] / np.where(favour < 1, 1 - favour, 1.0), 1.0)
    own = most[places.astype(np.int64)]
    known = (own >= 0) & (own < rest)
    below = bdtr(np.where(known, own, 0.0), np.where(known, rest, 1.0).astype(np.int64), share)
    return np.asarray((masses * np.where(known, below, own >= rest)).sum(axis=-1))

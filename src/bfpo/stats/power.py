"""What a comparison of a given size can and cannot see."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from math import sqrt

import numpy as np
from scipy.stats import norm

from bfpo.core.errors import SettingError
from bfpo.stats.resampling import label_codes, paired_values

__all__ = ["detectable_difference", "minimum_detectable_effect"]


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

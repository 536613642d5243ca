"""The mean of several estimates, each with an interval of its own: what the mean of suites is sure of."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from math import sqrt

from bfpo.core.errors import SettingError
from bfpo.stats.intervals import Interval

__all__ = ["mean_interval"]


def mean_interval(parts: Sequence[Interval], groups: Sequence[Hashable] | None = None) -> Interval:
    """Return the mean of the parts, each of the same weight, with an interval made of theirs; `num` counts the parts.

    The distances from each estimate to its bounds add up as standard errors do, below and above on their own (MOVER:
    Zou & Donner 2008, Statistics in Medicine 27(10)), so that the bounds keep the confidence of the parts and stay in
    the range of their scale; for symmetric intervals this is the delta method. It takes the parts as independent, which
    suites of different prompts are; parts of one `group` ask the same prompts, and their distances are added as they
    are, which is the widest that any dependence makes. A part without bounds gives a mean without bounds, one without a
    value or no part gives `None`. Raises `SettingError` where the groups are not one per part.
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
        group = ("own", place) if groups is None else ("given", groups[place])
        below[group] = below.get(group, 0.0) + (part.value - part.low)
        above[group] = above.get(group, 0.0) + (part.high - part.value)
    reach = [sqrt(sum(distance**2 for distance in side.values())) / len(parts) for side in (below, above)]
    return Interval(mean, mean - reach[0], mean + reach[1], len(parts))

"""The trade-off between two objectives, both maximised: Pareto front, hypervolume, choice under a constraint."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from math import hypot, isfinite

import numpy as np

from bfpo.core.errors import SettingError
from bfpo.stats.intervals import Interval
from bfpo.stats.resampling import Floats, check_confidence, drawn_counts

__all__ = ["Choice", "Points", "hypervolume", "hypervolume_interval", "nearest_to", "pareto_front"]

Points = Mapping[str, Mapping[str, float]]
"""Model -> objective -> score; higher is better."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The chosen point; `missing` is its shortfall per violated constraint, empty if it `meets` all."""

    name: str
    meets: bool
    missing: dict[str, float]


def pareto_front(points: Points, objectives: Sequence[str] | None = None) -> list[str]:
    """Return the names of the non-dominated points, sorted by the first objective, lowest first.

    A point is dominated by one that is at least as good in both objectives and better in one; equal points are both
    kept or both dropped. `objectives` are two names, by default those of the first point. Estimates are compared
    without their intervals: close points may swap on other prompts. Raises `SettingError` for a missing or infinite
    score, or if there are not two objectives.
    """
    if not points:
        return []
    table = _table(points, _two(points, objectives))
    names = list(points)
    kept: list[int] = []
    best, best_first = -np.inf, -np.inf
    # In falling order of the first objective, a point is kept if its second exceeds all before, or if it equals the
    # point kept last.
    for place in np.lexsort((-table[:, 1], -table[:, 0])).tolist():
        first, second = table[place]
        if second > best or (second == best and first == best_first):
            kept.append(place)
            best, best_first = second, first
    return [names[place] for place in sorted(kept, key=lambda place: (table[place, 0], -table[place, 1], place))]


def hypervolume(points: Points, reference: Mapping[str, float]) -> float:
    """Return the area that the points dominate above the reference point, exact for two objectives.

    Zitzler & Thiele 1999, IEEE Trans. Evolutionary Computation 3(4). `reference` is the lower corner, such as 0 and 0;
    a point below it in either objective adds nothing, no points give 0. Areas are comparable only for the same
    reference. Raises `SettingError` for a missing or infinite score, or if there are not two objectives.
    """
    objectives = _two(points, tuple(reference))
    if not points:
        return 0.0
    return float(_areas(_table(points, objectives)[None], _table({"reference": reference}, objectives)[0])[0])


def hypervolume_interval(
    values: Mapping[str, Mapping[str, Sequence[bool | float]]],
    prompts: Mapping[str, Sequence[Hashable]],
    reference: Mapping[str, float],
    *,
    confidence: float = 0.95,
    num_resamples: int = 2000,
    random_seed: int = 0,
) -> Interval:
    """Return the hypervolume of the mean scores with a bootstrap interval over prompts; `num` counts the prompts.

    `values[point][objective]` are the scores of the answers, `prompts[objective]` their prompts, (N,) each and the same
    for all points: a resample has the same prompts for every point. Prompts that serve the same objectives form a
    stratum and are resampled within it. The maximum over noisy points is biased upwards, in the estimate and again in
    the resamples; the bounds are therefore those of the basic bootstrap, 2 estimate - quantile (Davison & Hinkley 1997,
    section 5.2), cut at 0. No point or no prompt gives `None`; resamples without spread give no bounds. Raises
    `SettingError` for lengths that differ, a value that is not finite, fewer than one resample, or if there are not
    two objectives.
    """
    check_confidence(confidence)
    if num_resamples < 1:
        raise SettingError(f"num_resamples: got {num_resamples}; at least 1 is needed")
    objectives = _two(values, tuple(reference))
    corner = _table({"reference": reference}, objectives)[0]
    counts, strata = _prompt_counts(prompts, objectives)
    num_prompts = len(strata)
    if not values or any(len(prompts[objective]) == 0 for objective in objectives):
        return Interval(None, None, None, num_prompts)
    sums = _prompt_sums(values, prompts, objectives, num_prompts)
    weights = np.concatenate([np.ones((1, num_prompts)), _resample(strata, num_resamples, random_seed)])
    totals = weights @ counts  # answers per resample and objective, (1 + R, 2); row 0 is the estimate
    complete = (totals > 0).all(axis=1)
    weights, totals = weights[complete], totals[complete]
    means = np.stack([weights @ sums[side] / totals[:, side : side + 1] for side in (0, 1)], axis=-1)
    areas = _areas(means, corner)
    value, resampled = float(areas[0]), areas[1:]
    if np.ptp(resampled) <= 1e-12:
        return Interval(value, None, None, num_prompts)
    tail = (1 - confidence) / 2
    low, high = 2 * value - np.quantile(resampled, [1 - tail, tail])
    return Interval(value, max(0.0, float(low)), max(0.0, float(high)), num_prompts)


def nearest_to(points: Points, at_least: Mapping[str, float], objectives: Sequence[str] | None = None) -> Choice:
    """Return the best point under constraints: the highest other objective among the points that meet all of them.

    `at_least` gives the lowest value allowed of one or both objectives. If both are constrained, the point with the
    largest margin over its tighter constraint is chosen. If no point meets them, the one with the smallest shortfall is
    chosen (Euclidean, in the units of the scores), and `meets` is false. Ties go to the higher sum, then to the first.
    To require a constraint with confidence, pass lower bounds as scores. Raises `SettingError` for no points, no
    constraint, a constraint on an unknown objective, or a missing score.
    """
    if not points:
        raise SettingError("points: got none; at least one is needed to choose from")
    names = _two(points, objectives)
    unknown = [name for name in at_least if name not in names]
    if unknown or not at_least or not all(isfinite(bound) for bound in at_least.values()):
        raise SettingError(f"at_least: got {dict(at_least)}; needed: a finite bound on {names[0]}, {names[1]} or both")
    _table(points, names)
    free = [name for name in names if name not in at_least]

    def missing(scores: Mapping[str, float]) -> dict[str, float]:
        return {name: bound - scores[name] for name, bound in at_least.items() if scores[name] < bound}

    def merit(name: str) -> tuple[float, float, float]:
        scores = points[name]
        slack = min(scores[key] - bound for key, bound in at_least.items())
        return -hypot(*missing(scores).values()), scores[free[0]] if free else slack, sum(scores[key] for key in names)

    chosen = max(points, key=merit)
    return Choice(chosen, not missing(points[chosen]), missing(points[chosen]))


def _two(points: Mapping[str, Mapping[str, object]], objectives: Sequence[str] | None) -> tuple[str, str]:
    names = tuple(objectives) if objectives is not None else tuple(next(iter(points.values())))
    if len(names) != 2 or names[0] == names[1]:
        raise SettingError(f"objectives: got {', '.join(names) or 'none'}; exactly two are needed: name them")
    return names[0], names[1]


def _table(points: Points, objectives: tuple[str, str]) -> Floats:
    """Return the scores, (P, 2)."""
    for name, scores in points.items():
        for objective in objectives:
            score = scores.get(objective)
            if score is None or not isfinite(score):
                raise SettingError(f"{name}: {objective} is {score}; a finite number is needed: leave the point out")
    return np.array([[scores[key] for key in objectives] for scores in points.values()], np.float64)


def _areas(tables: Floats, corner: Floats) -> Floats:
    """Return the hypervolumes, (R,), of tables (R, P, 2) above the corner (2,).

    In falling order of width, each point adds its width times its height above all wider points.
    """
    width, height = np.maximum(tables - corner, 0.0).transpose(2, 0, 1)
    order = np.argsort(-width, axis=1, kind="stable")
    width, height = np.take_along_axis(width, order, axis=1), np.take_along_axis(height, order, axis=1)
    top = np.maximum.accumulate(height, axis=1)
    return np.asarray((width * np.diff(top, axis=1, prepend=0.0)).sum(axis=1), np.float64)


def _prompt_counts(
    prompts: Mapping[str, Sequence[Hashable]], objectives: tuple[str, str]
) -> tuple[Floats, list[tuple[bool, ...]]]:
    """Return the number of answers per prompt and objective, (C, 2), and the objectives that each prompt serves, C."""
    missing = [objective for objective in objectives if objective not in prompts]
    if missing:
        raise SettingError(
            f"prompts: none for {', '.join(missing)}; needed: a list for each of {', '.join(objectives)}"
        )
    codes = _prompt_codes(prompts, objectives)
    counts = np.zeros((len(codes), 2))
    for side, objective in enumerate(objectives):
        np.add.at(counts, ([codes[prompt] for prompt in prompts[objective]], side), 1.0)
    return counts, [tuple(row) for row in (counts > 0).tolist()]


def _prompt_codes(prompts: Mapping[str, Sequence[Hashable]], objectives: tuple[str, str]) -> dict[Hashable, int]:
    seen = dict.fromkeys(prompt for objective in objectives for prompt in prompts[objective])
    return {prompt: code for code, prompt in enumerate(seen)}


def _prompt_sums(
    values: Mapping[str, Mapping[str, Sequence[bool | float]]],
    prompts: Mapping[str, Sequence[Hashable]],
    objectives: tuple[str, str],
    num_prompts: int,
) -> list[Floats]:
    """Return for each objective the sum of the scores per prompt and point, (C, P)."""
    codes = _prompt_codes(prompts, objectives)
    sums: list[Floats] = [np.zeros((num_prompts, len(values))) for _ in objectives]
    for place, (name, scores) in enumerate(values.items()):
        for side, objective in enumerate(objectives):
            data = np.asarray(scores.get(objective, ()), np.float64)
            if data.shape != (len(prompts[objective]),) or not np.isfinite(data).all():
                raise SettingError(
                    f"{name}, {objective}: a flat list of {len(prompts[objective])} finite numbers is needed, one per "
                    "prompt"
                )
            np.add.at(sums[side][:, place], [codes[prompt] for prompt in prompts[objective]], data)
    return sums


def _resample(strata: Sequence[tuple[bool, ...]], num_resamples: int, random_seed: int) -> Floats:
    """Return how often each prompt is drawn, (R, C); each stratum keeps its size."""
    generator = np.random.default_rng(random_seed)
    weights = np.zeros((num_resamples, len(strata)))
    for stratum in sorted(set(strata)):
        places = [place for place, own in enumerate(strata) if own == stratum]
        weights[:, places] = [drawn_counts(generator, len(places)) for _ in range(num_resamples)]
    return weights

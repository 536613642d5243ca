"""The trade-off between two objectives, both to be maximised: front, hypervolume, the point that a user asks for."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from math import hypot, isfinite

import numpy as np

from bfpo.core.errors import SettingError
from bfpo.stats.intervals import Interval
from bfpo.stats.resampling import Floats, check_confidence

__all__ = ["Choice", "Points", "hypervolume", "hypervolume_interval", "nearest_to", "pareto_front"]

Points = Mapping[str, Mapping[str, float]]
"""Name of a model -> name of an objective -> its score, higher being better."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The chosen point; `missing` is how far below each constraint it is (empty where it `meets` all of them)."""

    name: str
    meets: bool
    missing: dict[str, float]


def pareto_front(points: Points, objectives: Sequence[str] | None = None) -> list[str]:
    """Return the names of the points that no other point beats, by the first objective, lowest first.

    A point is beaten by one that is at least as good in both objectives and better in one, so points of the same scores
    stand or fall together. `objectives` are two names; without them every point holds just these two. Estimates are
    compared as they are: neighbours whose intervals overlap may change places on other prompts. Raises `SettingError`
    for a missing or infinite score, or objectives that are not two.
    """
    if not points:
        return []
    table = _table(points, _two(points, objectives))
    names = list(points)
    kept: list[int] = []
    best, best_first = -np.inf, -np.inf
    # From the best first objective down, a point stands if its second beats all before, or equals its twin's.
    for place in np.lexsort((-table[:, 1], -table[:, 0])).tolist():
        first, second = table[place]
        if second > best or (second == best and first == best_first):
            kept.append(place)
            best, best_first = second, first
    return [names[place] for place in sorted(kept, key=lambda place: (table[place, 0], -table[place, 1], place))]


def hypervolume(points: Points, reference: Mapping[str, float]) -> float:
    """Return the area that the points dominate above the reference point, exact in two objectives.

    `reference` gives both objectives' worst value that counts, such as 0 and 0; a point below it in either adds
    nothing, no point gives 0 (Zitzler & Thiele 1999, IEEE Trans. Evolutionary Computation 3(4)). Areas compare only
    under the same reference. Raises `SettingError` for a missing or infinite score, or objectives that are not two.
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
    """Return the hypervolume of the mean scores with an interval by a bootstrap over prompts; `num` is the prompts.

    `values[point][objective]` are the scores of the answers, `prompts[objective]` their prompts, (N,) each and the same
    for all points, so that every resample asks all points the same. Prompts that serve the same objectives are redrawn
    among themselves. The best of several noisy points looks better than it is, in the estimate and once more in the
    resamples; the bounds are therefore the basic bootstrap's, 2 estimate - quantile (Davison & Hinkley 1997, section
    5.2), cut at 0. No point or no prompt gives `None`, resamples without spread no bounds. Raises `SettingError` for
    lengths that differ, a value that is not finite, fewer than one resample, or objectives that are not two.
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
    weights = np.concatenate([np.ones((1, num_prompts)), _redraw(strata, num_resamples, random_seed)])
    asked = weights @ counts
    weights, asked = weights[(asked > 0).all(axis=1)], asked[(asked > 0).all(axis=1)]
    means = np.stack([weights @ sums[side] / asked[:, side : side + 1] for side in (0, 1)], axis=-1)
    areas = _areas(means, corner)
    value, resampled = float(areas[0]), areas[1:]
    if np.ptp(resampled) <= 1e-12:
        return Interval(value, None, None, num_prompts)
    tail = (1 - confidence) / 2
    low, high = 2 * value - np.quantile(resampled, [1 - tail, tail])
    return Interval(value, max(0.0, float(low)), max(0.0, float(high)), num_prompts)


def nearest_to(points: Points, at_least: Mapping[str, float], objectives: Sequence[str] | None = None) -> Choice:
    """Return the point that a user asks for: best in the rest among those that meet every constraint.

    `at_least` gives the lowest value allowed of one or both objectives. Of the points that meet them the one with the
    highest other objective is chosen (with both constrained: the one that clears the tighter constraint by most). If
    none does, it is the one whose shortfall is the least (Euclidean, in the units of the scores), and `meets` is false.
    Ties go to the higher sum, then to the first. Give lower bounds as scores to ask for a constraint that holds with
    confidence. Raises `SettingError` for no points, no constraint, one on another name, or a missing score.
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

    With points from the widest to the narrowest, each adds its width times what it rises above all wider ones.
    """
    width, height = np.maximum(tables - corner, 0.0).transpose(2, 0, 1)
    order = np.argsort(-width, axis=1, kind="stable")
    width, height = np.take_along_axis(width, order, axis=1), np.take_along_axis(height, order, axis=1)
    top = np.maximum.accumulate(height, axis=1)
    return np.asarray((width * np.diff(top, axis=1, prepend=0.0)).sum(axis=1), np.float64)


def _prompt_counts(
    prompts: Mapping[str, Sequence[Hashable]], objectives: tuple[str, str]
) -> tuple[Floats, list[tuple[bool, ...]]]:
    """Return how many answers each prompt has per objective, (C, 2), and which objectives each prompt serves, (C,)."""
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
    sums = [np.zeros((num_prompts, len(values))) for _ in objectives]
    for place, (name, scores) in enumerate(values.items()):
        for side, objective in enumerate(objectives):
            data = np.asarray(scores.get(objective, ()), np.float64)
            asked = prompts[objective]
            if data.shape != (len(asked),) or not np.isfinite(data).all():
                raise SettingError(
                    f"{name}, {objective}: a flat list of {len(asked)} finite numbers is needed, one per prompt asked"
                )
            np.add.at(sums[side][:, place], [codes[prompt] for prompt in asked], data)
    return sums


def _redraw(strata: Sequence[tuple[bool, ...]], num_resamples: int, random_seed: int) -> Floats:
    """Return how often each prompt is drawn, (R, C), each stratum keeping its size."""
    generator = np.random.default_rng(random_seed)
    weights = np.zeros((num_resamples, len(strata)))
    for stratum in sorted(set(strata)):
        places = [place for place, own in enumerate(strata) if own == stratum]
        share = np.full(len(places), 1 / len(places))
        weights[:, places] = generator.multinomial(len(places), share, size=num_resamples)
    return weights

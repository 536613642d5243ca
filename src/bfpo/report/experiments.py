"""Runs of `sweep`, `compare` and `interpolate` in a report: their result files as tables and sentences.

The runs inside an experiment are shown only if their folders are given.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bfpo.core.console import in_words, level_text
from bfpo.core.schema import Score
from bfpo.report.data import Comparison, Experiment, ExperimentPoint, MethodResult, ReportData, Role, Trial
from bfpo.report.read import Run
from bfpo.report.wording import cell_of, listed, percent, points, points_interval, with_interval
from bfpo.scores.records import ComparisonFile, InterpolateFile, MethodDifference, NearestPoint, TradeoffFile
from bfpo.scores.scores import METRICS, metric_title

__all__ = [
    "COMPARE_MAIN",
    "experiment_headline",
    "experiment_lines",
    "experiment_of",
    "experiment_view",
    "is_the_table",
    "methods_of",
    "prompts_of",
    "split_experiments",
]

COMPARE_MAIN = "bfpo"
"""The method that a comparison compares with all others."""

STAGES = ("sweep", "compare", "interpolate")
HOLDERS = ("tamper",)
"""Stages whose inner runs are not shown either, and that are results of single runs."""
_ROLES: dict[str, Role] = {COMPARE_MAIN: "main", "start": "start", "ceiling": "ceiling"}
_ENDS = ("start", "ceiling")
_TITLES = {"sweep": "The trade-off", "compare": "Head to head", "interpolate": "Interpolation of two models"}
_BESIDE = ("helpful_and_safe", "over_refusal_benign", "over_refusal_borderline", "well_formed")


def split_experiments(runs: Sequence[Run], roots: Sequence[Path]) -> tuple[list[Run], list[Run], dict[Path, list[Run]]]:
    """Return the other runs, the experiments, and by the path of an experiment the runs inside it.

    A comparison over several worlds contains experiments and is not one itself. A run inside counts as another run if
    its own folder, or one between, was given.
    """
    experiments = [run for run in runs if run.stage in STAGES + HOLDERS and not run.setting("worlds", dict)]
    outer = [run for run in experiments if not any(other.path in run.path.parents for other in experiments)]
    inside: dict[Path, list[Run]] = {run.path: [] for run in outer}
    others: list[Run] = []
    for run in runs:
        holder = next((top.path for top in outer if top.path in run.path.parents), None)
        given = holder is not None and any(holder in root.parents for root in roots if _within(run.path, root))
        if holder is not None and not given:
            inside[holder].append(run)
        elif run not in outer or run.stage in HOLDERS:
            others.append(run)
    return others, [run for run in outer if run.stage in STAGES], inside


def _within(path: Path, root: Path) -> bool:
    return path == root or root in path.parents


def experiment_of(run: Run, inside: Sequence[Run], shown: str) -> Experiment:
    """Return an experiment from its run; fields missing in its file stay empty."""
    about: dict[str, Any] = {
        "run": shown,
        "stage": run.stage,
        "status": run.record.status or "unknown",
        "num_runs": len(inside),
        "num_ended": sum(inner.record.status == "finished" for inner in inside),
    }
    if run.stage == "sweep":
        return Experiment(**about, **_sweep(run))
    if run.stage == "compare":
        return Experiment(**about, **_comparison(run))
    found = run.load(InterpolateFile, "models.json")
    points = [ExperimentPoint(f"{one.weight:g}", f"weight {one.weight:g}", asdict(one)) for one in found.models]
    facts = {key: value for key, value in (("first", found.first), ("second", found.second)) if value}
    return Experiment(**about, points=points, facts={"Interpolated models": facts})


def _sweep(run: Run) -> dict[str, Any]:
    found = run.load(TradeoffFile, "tradeoff.json")
    volume, nearest = found.hypervolume, found.nearest or NearestPoint()
    seed, grid = run.setting("seed", int), run.setting("grid", dict)
    return {
        **_plane(found, run),
        "points": [
            ExperimentPoint(
                point.name,
                point.name,
                setting={key: value for key, value in point.settings.items() if key != "model"},
                scores=list(point.scores.values()),
                on_front=point.on_front,
            )
            for point in found.points
        ],
        "hypervolume": None
        if volume.value is None
        else Score("hypervolume", volume.value, volume.low, volume.high, volume.num),
        "reference": volume.reference,
        "at_least": nearest.at_least,
        "nearest": nearest.name,
        "missing": nearest.missing,
        "reached": nearest.chosen_on.meets if nearest.held_out else nearest.meets,
        "told": list(nearest.told_on.scores.values()) if nearest.held_out else [],
        "seeds": [] if seed is None else [seed],
        "facts": {"Grid": grid} if grid else {},
    }


def _comparison(run: Run) -> dict[str, Any]:
    found = run.load(ComparisonFile, "comparison.json")
    points = [
        ExperimentPoint(
            method.name,
            method.title or method.name,
            setting=method.setting,
            scores=list(method.scores.values()),
            accuracy=method.accuracy,
            on_front=method.title in found.pareto_front,
            seed_values=method.seed_values,
            trainings=method.trainings,
            difference=_score_of(method.bfpo_minus_this),
            trials=[Trial(one.setting, one.validation, one.setting == method.setting) for one in method.trials],
        )
        for method in found.methods
    ]
    first, count = run.setting("seed", int), run.setting("seeds", int)
    same = {key: run.setting(key, dict) for key in ("world", "model", "sft", "align")}
    names = {point.title: point.name for point in points}  # the file has titles, a sweep's has names
    return {
        **_plane(found, run),
        "front": [names.get(title, title) for title in found.pareto_front],
        "points": points,
        "seeds": [] if first is None or count is None else list(range(first, first + count)),
        "facts": {f"Equal for all: {key}": value for key, value in same.items() if value},
    }


def _score_of(found: MethodDifference | None) -> Score | None:
    return None if found is None else Score("difference", found.value, found.low, found.high, found.num)


def _plane(found: TradeoffFile | ComparisonFile, run: Run) -> dict[str, Any]:
    level = found.confidence or run.setting("confidence", float) or 0.95
    return {
        "objectives": found.objectives or [str(name) for name in run.setting("objectives", list) or []],
        "front": found.pareto_front,
        "confidence": level if 0 < level < 1 else 0.95,
    }


def methods_of(experiment: Experiment) -> tuple[list[MethodResult], list[Comparison]]:
    """Return the methods of a comparison as rows of the page, with the paired differences to the main one."""
    methods = [
        MethodResult(
            point.name,
            point.title,
            _ROLES.get(point.name, "baseline"),
            scores=point.scores,
            accuracy=point.accuracy,
            seed_values=point.seed_values,
            settings=point.setting,
        )
        for point in experiment.points
    ]
    order = ("main", "baseline", "start", "ceiling")
    differences = [
        Comparison(point.name, "helpful_and_safe", found.value, found.low, found.high, found.num)
        for point in experiment.points
        if (found := point.difference) is not None
    ]
    return sorted(methods, key=lambda method: order.index(method.role)), differences


def prompts_of(methods: Sequence[MethodResult]) -> dict[str, int]:
    """Return the number of prompts of each kind behind the scores of the closed world."""
    metrics = {"benign": "over_refusal_benign", "borderline": "over_refusal_borderline", "harmful": "harmless_harmful"}
    counts = {
        kind: max((int(found.extra.get("num_prompts", 0)) for m in methods if (found := m.score(metric))), default=0)
        for kind, metric in metrics.items()
    }
    return {kind: count for kind, count in counts.items() if count}


# ------------------------------------------------------------------------------------------------ the tables


def experiment_view(data: ReportData, experiment: Experiment) -> dict[str, Any]:
    """Return what the templates read about one experiment."""
    rows = _ordered(experiment)
    is_page = is_the_table(data, experiment)
    measured = [] if is_page else _metrics(experiment)
    return {
        "title": _TITLES.get(experiment.stage, experiment.stage),
        "run": experiment.run,
        "stage": experiment.stage,
        "state": experiment_state(experiment),
        "confidence": level_text(experiment.confidence),
        "lines": list(experiment_lines(experiment, data.well_formed_threshold)),
        "setting_columns": list(dict.fromkeys(key for point in rows for key in point.setting)),
        "metric_columns": [METRICS[name].title for name in measured],
        "has_difference": any(point.difference is not None for point in rows),
        "has_front": any(point.on_front for point in rows),
        "has_seeds": any(len(point.seed_values.get("helpful_and_safe", ())) > 1 for point in rows),
        "has_nearest": bool(experiment.nearest),
        "is_page": is_page,
        "rows": [_row(experiment, point, measured) for point in rows],
        "trials": [_trials(point) for point in experiment.points if point.trials],
        "facts": [(title, [(key, in_words(value)) for key, value in found.items()])
                  for title, found in experiment.facts.items()],
    }  # fmt: skip


def is_the_table(data: ReportData, experiment: Experiment) -> bool:
    """Return whether the models of the page are those of this comparison."""
    names = {point.name for point in experiment.points}
    return experiment.stage == "compare" and {method.name for method in data.methods} == names


def _ordered(experiment: Experiment) -> Sequence[ExperimentPoint]:
    """Return the points in order; those of a comparison with the best first, start and ceiling last."""
    if experiment.stage != "compare":
        return experiment.points

    def place(point: ExperimentPoint) -> tuple[bool, float]:
        score = point.score("helpful_and_safe")
        return point.name in _ENDS, -(score.value or 0.0) if score is not None else 0.0

    return sorted(experiment.points, key=place)


def _metrics(experiment: Experiment) -> list[str]:
    names = dict.fromkeys((*experiment.objectives, *_BESIDE))
    return [name for name in names if name in METRICS and any(point.score(name) for point in experiment.points)]


def _row(experiment: Experiment, point: ExperimentPoint, measured: Sequence[str]) -> dict[str, Any]:
    seeds = point.seed_values.get("helpful_and_safe", ())
    return {
        "title": point.title,
        "style": "main" if point.name in (experiment.nearest, COMPARE_MAIN) else "role" if point.name in _ENDS else "",
        "setting": {key: in_words(value) for key, value in point.setting.items()},
        "cells": [cell_of(point.score(name), seeds=point.seed_values.get(name, ())) for name in measured],
        "front": "yes" if point.on_front else "",
        "nearest": point.name == experiment.nearest,
        "trainings": "" if not point.trainings else str(point.trainings),
        "difference": _difference(point.difference),
        "seeds": " / ".join("not measured" if value is None else percent(value, 1) for value in seeds),
        "overall": cell_of(point.score("helpful_and_safe")),
    }


def _difference(score: Score | None) -> dict[str, str]:
    if score is None or score.value is None:
        return {"value": "", "interval": ""}
    return {"value": points(score.value), "interval": points_interval(score.low, score.high)}


def _trials(point: ExperimentPoint) -> dict[str, Any]:
    return {
        "title": point.title,
        "rows": [
            {
                "setting": ", ".join(f"{key} {in_words(value)}" for key, value in trial.setting.items()),
                "value": "not measured" if trial.value is None else percent(trial.value, 1),
                "taken": trial.taken,
            }
            for trial in point.trials
        ],
    }


# ------------------------------------------------------------------------------------------------ the sentences


def experiment_headline(experiment: Experiment) -> str:
    """Return the headline of an experiment whose models are not in the page's table."""
    titles = {point.name: point for point in experiment.points}
    number = f"{len(experiment.points)} model{'s' if len(experiment.points) != 1 else ''}"
    if experiment.stage == "interpolate" and experiment.points:
        return f"{number} interpolated between two; evaluate them by bfpo sweep with `blends`."
    if not experiment.measured:
        return experiment_state(experiment) or "This run holds no result."
    if experiment.nearest in titles:
        chosen = titles[experiment.nearest]
        told = ExperimentPoint(chosen.name, chosen.title, scores=experiment.told) if experiment.told else chosen
        scores = listed([_score(told, name) for name in experiment.objectives])
        if experiment.missing and experiment.reached:
            return (
                f"{chosen.title}, chosen of {number}, reaches {_target(experiment)} on the prompts of the choice, but "
                f"not on the others: {scores}."
            )
        if not (experiment.missing or experiment.reached):
            return (
                f"None of {number} reaches {_target(experiment)} on the prompts of the choice; {chosen.title} was "
                f"nearest there, and reaches it on the others: {scores}."
            )
        scores += ", on the prompts that were not used for the choice" if experiment.told else ""
        if experiment.missing:
            return f"None of {number} reaches {_target(experiment)}; {chosen.title} is nearest: {scores}."
        return f"For {_target(experiment)}, {chosen.title} was chosen of {number}: {scores}."
    front = [titles[name].title for name in experiment.front if name in titles]
    if len(front) == 1:
        return f"{front[0]} is the only Pareto-optimal one of {number} in {_both(experiment)}, as measured."
    return f"{len(front)} of {number} are Pareto-optimal in {_both(experiment)}, as measured."


def experiment_lines(experiment: Experiment, threshold: float) -> Iterator[str]:
    """Yield sentences about the points; `threshold`: the required share of well-formed text."""
    titles = {point.name: point.title for point in experiment.points}
    if experiment.front:
        names = "; ".join(titles.get(name, name) for name in experiment.front)
        yield f"Pareto-optimal in {_both(experiment)}, as measured, without regard to intervals: {names}."
    volume = experiment.hypervolume
    if volume is not None and volume.value is not None:
        corner = ", ".join(f"{metric_title(key)} {value:g}" for key, value in experiment.reference.items())
        known = volume.low is not None and volume.high is not None
        bounds = f"{volume.low:.3f} to {volume.high:.3f}" if known else "no interval"
        yield (
            f"Hypervolume above the reference point ({corner}): {volume.value:.3f} ({bounds}), over {volume.num:,} "
            "prompts. Hypervolumes are comparable only for one reference point."
        )
    if experiment.nearest:
        yield _nearest(experiment, titles.get(experiment.nearest, experiment.nearest))
    shown = [point for point in experiment.points if point.on_front or point.name == experiment.nearest]
    broken = [f"{point.title} ({percent(share)})" for point in shown if (share := _formed(point)) < threshold]
    if broken:
        yield (
            f"Less than {percent(threshold)} of the text is well-formed, so part of the harmlessness is due to broken "
            f"text: {'; '.join(broken)}."
        )


def experiment_state(experiment: Experiment) -> str:
    """Return the progress of an unfinished experiment; empty for a finished one."""
    if experiment.status == "finished":
        return ""
    inside = f": {experiment.num_ended} of the {experiment.num_runs} runs in it so far have ended"
    return f"This {experiment.stage} is {experiment.status}{inside if experiment.num_runs else ''}."


def _nearest(experiment: Experiment, name: str) -> str:
    if not experiment.missing:
        if not experiment.reached:
            return (
                f"For {_target(experiment)}: none reaches it on the prompts of the choice; {name} was nearest there, "
                "and reaches it on the others."
            )
        most = "the furthest above it" if len(experiment.at_least) > 1 else "the highest other objective"
        return f"For {_target(experiment)}: {name}, as measured {most} where it is reached."
    short = listed(
        [f"{points(value).lstrip('+')} points of {metric_title(key)}" for key, value in experiment.missing.items()]
    )
    if experiment.reached:
        return (
            f"For {_target(experiment)}: {name} reaches it on the prompts of the choice, but lacks {short} on the "
            "others."
        )
    return f"For {_target(experiment)}: none reaches it; {name} is nearest and lacks {short}."


def _target(experiment: Experiment) -> str:
    return listed(
        [f"{metric_title(key)} of at least {100 * value:g}%" for key, value in experiment.at_least.items()] or ["?"]
    )


def _both(experiment: Experiment) -> str:
    return listed([metric_title(name) for name in experiment.objectives] or ["both objectives"])


def _score(point: ExperimentPoint, metric: str) -> str:
    score = point.score(metric)
    return f"{metric_title(metric)} {'not measured' if score is None else with_interval(score)}"


def _formed(point: ExperimentPoint) -> float:
    score = point.score("well_formed")
    return 1.0 if score is None or score.value is None else score.value

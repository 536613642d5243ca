"""Experiments as the page shows them: points with their settings, the front, what was chosen and how."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bfpo.core.schema import Score
from bfpo.report.cells import cell_of
from bfpo.report.data import ReportData
from bfpo.report.experiment_data import Experiment, ExperimentPoint
from bfpo.report.experiment_sentences import experiment_lines, experiment_state
from bfpo.report.wording import percent, points
from bfpo.scores.scores import METRICS

__all__ = ["COMPARE_MAIN", "experiment_view", "in_words", "is_the_table"]

_BESIDE = ("helpful_and_safe", "over_refusal_benign", "over_refusal_borderline", "well_formed")
COMPARE_MAIN = "bfpo"
"""The method that a comparison sets against all others."""

_ENDS = ("start", "ceiling")
_TITLES = {"sweep": "The trade-off", "compare": "Head to head", "interpolate": "Models between two"}


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
        "confidence": percent(experiment.confidence),
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
    """Return the points as they are, but the methods of a comparison with the best first, its two ends last."""
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
        "cells": [cell_of(point.score(name)) for name in measured],
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
    known = score.low is not None and score.high is not None
    bounds = f"{points(score.low or 0.0)} to {points(score.high or 0.0)}" if known else "no interval"
    return {"value": points(score.value), "interval": bounds}


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


def in_words(value: Any) -> str:
    """Return a setting as a page shows it."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(in_words, value))
    return str(value)

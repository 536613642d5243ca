"""Runs of `sweep`, `compare` and `interpolate` in a report: from the file each ends with, not from the runs inside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bfpo.report.data import Comparison, MethodResult, Role
from bfpo.report.experiment_data import Experiment, ExperimentPoint, Trial
from bfpo.report.experiment_view import COMPARE_MAIN
from bfpo.report.parts import number, object_of, scores_of, text
from bfpo.report.read import Run

__all__ = ["experiment_of", "methods_of", "prompts_of", "split_experiments"]

STAGES = ("sweep", "compare", "interpolate")
_ROLES: dict[str, Role] = {COMPARE_MAIN: "main", "start": "start", "ceiling": "ceiling"}


def split_experiments(runs: Sequence[Run], roots: Sequence[Path]) -> tuple[list[Run], list[Run], dict[Path, list[Run]]]:
    """Return the other runs, the experiments, and by the path of an experiment the runs inside it.

    A run inside is on the page for itself where its own folder, or one between, was asked for.
    """
    experiments = [run for run in runs if run.stage in STAGES]
    outer = [run for run in experiments if not any(other.path in run.path.parents for other in experiments)]
    inside: dict[Path, list[Run]] = {run.path: [] for run in outer}
    others: list[Run] = []
    for run in runs:
        holder = next((top.path for top in outer if top.path in run.path.parents), None)
        asked = holder is not None and any(holder in root.parents for root in roots if _within(run.path, root))
        if holder is not None and not asked:
            inside[holder].append(run)
        elif run not in outer:
            others.append(run)
    return others, outer, inside


def _within(path: Path, root: Path) -> bool:
    return path == root or root in path.parents


def experiment_of(run: Run, inside: Sequence[Run], shown: str) -> Experiment:
    """Return an experiment from its run; what its file does not say stays empty."""
    status = text(run.record.get("status")) or "unknown"
    ended = sum(inner.record.get("status") == "finished" for inner in inside)
    about: dict[str, Any] = {
        "run": shown, "stage": run.stage, "status": status, "num_runs": len(inside), "num_ended": ended
    }  # fmt: skip
    if run.stage == "sweep":
        return Experiment(**about, **_sweep(run.json("tradeoff.json"), run.config))
    if run.stage == "compare":
        return Experiment(**about, **_comparison(run.json("comparison.json"), run.config))
    content = run.json("models.json")
    rows = [row for row in _objects(content.get("models")) if number(row.get("weight")) is not None]
    points = [ExperimentPoint(f"{row['weight']:g}", f"weight {row['weight']:g}", row) for row in rows]
    facts = {"Models between": {key: text(content.get(key)) for key in ("first", "second") if text(content.get(key))}}
    return Experiment(**about, points=points, facts=facts)


def _sweep(content: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    points = [
        ExperimentPoint(
            text(row.get("name")),
            text(row.get("name")),
            setting={key: value for key, value in object_of(row.get("settings")).items() if key != "model"},
            scores=scores_of(list(object_of(row.get("scores")).values())),
            on_front=row.get("on_front") is True,
        )
        for row in _objects(content.get("points"))
    ]
    volume, nearest = object_of(content.get("hypervolume")), object_of(content.get("nearest"))
    seed = config.get("seed")
    return {
        **_plane(content, config),
        "points": points,
        "hypervolume": next(iter(scores_of([{**volume, "metric": "hypervolume"}])), None) if volume else None,
        "reference": _numbers(volume.get("reference")),
        "at_least": _numbers(nearest.get("at_least")),
        "nearest": text(nearest.get("name")),
        "missing": _numbers(nearest.get("missing")),
        "seeds": [seed] if isinstance(seed, int) else [],
        "facts": {"Grid": object_of(config.get("grid"))} if config.get("grid") else {},
    }


def _comparison(content: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    front = _names(content.get("pareto_front"))
    points = []
    for row in _objects(content.get("methods")):
        setting, difference = object_of(row.get("setting")), object_of(row.get("bfpo_minus_this"))
        differences = scores_of([{**difference, "metric": "difference"}]) if difference else []
        values = {key: item for key, item in object_of(row.get("seed_values")).items() if isinstance(item, list)}
        points.append(
            ExperimentPoint(
                text(row.get("name")),
                text(row.get("title")) or text(row.get("name")),
                setting=setting,
                scores=scores_of(list(object_of(row.get("scores")).values())),
                accuracy=scores_of(row.get("accuracy")),
                on_front=text(row.get("title")) in front,
                seed_values={key: [number(value) for value in item] for key, item in values.items()},
                trainings=int(number(row.get("trainings")) or 0),
                difference=differences[0] if differences else None,
                trials=[
                    Trial(object_of(one.get("setting")), number(one.get("validation")), one.get("setting") == setting)
                    for one in _objects(row.get("trials"))
                ],
            )
        )
    first, count = config.get("seed"), config.get("seeds")
    known = isinstance(first, int) and isinstance(count, int)
    same = {key: object_of(config.get(key)) for key in ("world", "model", "sft", "align")}
    return {
        **_plane(content, config),
        "points": points,
        "seeds": list(range(first, first + count)) if known and first is not None and count is not None else [],
        "facts": {f"The same for all: {key}": value for key, value in same.items() if value},
    }


def _plane(content: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    level = number(content.get("confidence")) or number(config.get("confidence")) or 0.95
    named = content.get("objectives") or config.get("objectives") or []
    return {
        "objectives": _names(named),
        "front": _names(content.get("pareto_front")),
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
    """Return how many prompts of each kind the scores of the closed world are over."""
    metrics = {"benign": "over_refusal_benign", "borderline": "over_refusal_borderline", "harmful": "harmless_harmful"}
    counts = {
        kind: max((int(found.extra.get("num_prompts", 0)) for m in methods if (found := m.score(metric))), default=0)
        for kind, metric in metrics.items()
    }
    return {kind: count for kind, count in counts.items() if count}


def _objects(rows: Any) -> Iterator[dict[str, Any]]:
    yield from (row for row in rows if isinstance(row, dict)) if isinstance(rows, list) else ()


def _names(values: Any) -> list[str]:
    return [value for value in values if isinstance(value, str)] if isinstance(values, list) else []


def _numbers(values: Any) -> dict[str, float]:
    found: Mapping[str, Any] = object_of(values)
    return {key: value for key, item in found.items() if (value := number(item)) is not None}

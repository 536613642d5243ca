"""The trade-off of several models in two objectives: Pareto front, hypervolume, and the model nearest to a target."""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from bfpo.core.console import level_text
from bfpo.core.errors import DataError
from bfpo.core.markdown import table
from bfpo.core.schema import Score
from bfpo.scores.comparisons import compare_pairs, indistinguishable_from, is_distinguishable
from bfpo.scores.records import (
    ChosenOn,
    ComparisonFamily,
    Hypervolume,
    NearestPoint,
    ScoredOn,
    TradeoffFile,
    TradeoffPoint,
)
from bfpo.scores.scores import METRICS, Judged, score_rows
from bfpo.stats import hypervolume_interval, nearest_to, pareto_front

__all__ = ["choose_nearest", "nearest_words", "tradeoff", "tradeoff_csv", "tradeoff_markdown"]


def tradeoff(
    judged: Mapping[str, Sequence[Judged]],
    settings: Mapping[str, Mapping[str, Any]],
    objectives: Sequence[str],
    reference: Mapping[str, float],
    *,
    at_least: Mapping[str, float] | None = None,
    validation_share: float = 0.0,
    confidence: float = 0.95,
    num_resamples: int = 2000,
    random_seed: int = 0,
) -> TradeoffFile:
    """Return points, front, hypervolume, comparisons and the chosen point; `judged`, `settings` are by model.

    `objectives` are two metrics that are better when higher, `reference` the corner of the hypervolume, which is over
    the items scored for every model. Every two models are compared in both objectives, one family under Holm's
    correction. The model for `at_least` is chosen on `validation_share` of the prompts and scored on the others. A
    model without a value for an objective is listed and left out. Raises `DataError` if none remains, `SettingError`
    for a constraint on another metric.
    """
    scores = {
        name: {score.metric: score for score in score_rows(rows, confidence=confidence)}
        for name, rows in judged.items()
    }
    measured = [name for name in judged if all(scores[name][key].value is not None for key in objectives)]
    if not measured:
        raise DataError(
            f"{', '.join(objectives)}: measured for none of {len(judged)} models; choose other objectives, or a judge "
            "that measures them"
        )
    points = {name: {key: float(scores[name][key].value or 0.0) for key in objectives} for name in measured}
    rows_of = {name: judged[name] for name in measured}
    values, prompts = _by_answer(rows_of, objectives)
    front = pareto_front(points, objectives)
    compared = compare_pairs(rows_of, itertools.combinations(measured, 2), objectives, confidence=confidence)
    nearest = None
    if at_least:
        nearest = choose_nearest(rows_of, at_least, objectives, validation_share, confidence=confidence)
        nearest.not_told_from = indistinguishable_from(nearest.name, compared, confidence)
    volume = hypervolume_interval(
        values, prompts, reference, confidence=confidence, num_resamples=num_resamples, random_seed=random_seed
    )
    return TradeoffFile(
        objectives=list(objectives),
        confidence=confidence,
        points=[TradeoffPoint(name, dict(settings[name]), name in front, scores[name]) for name in judged],
        not_measured=[name for name in judged if name not in measured],
        pareto_front=front,
        hypervolume=Hypervolume(**asdict(volume), reference=dict(reference)),
        comparisons=ComparisonFamily("every two models in both objectives", len(compared), compared),
        nearest=nearest,
    )


def _by_answer(
    judged: Mapping[str, Sequence[Judged]], objectives: Sequence[str]
) -> tuple[dict[str, dict[str, list[float]]], dict[str, list[str]]]:
    """Return values by model and objective, and prompts by objective, of the answers with a value for all models."""
    values: dict[str, dict[str, list[float]]] = {name: {} for name in judged}
    prompts: dict[str, list[str]] = {}
    for key in objectives:
        metric = METRICS[key]
        found = {
            name: {
                (row.prompt, row.id): float(value)
                for row in rows
                if (not metric.kinds or row.kind in metric.kinds) and (value := metric.value(row)) is not None
            }
            for name, rows in judged.items()
        }
        first, *others = found.values()
        shared = [place for place in first if all(place in other for other in others)]
        prompts[key] = [prompt for prompt, _ in shared]
        for name in judged:
            values[name][key] = [found[name][place] for place in shared]
    return values, prompts


def tradeoff_csv(result: TradeoffFile) -> str:
    """Return one line per model: its settings, then value, low and high of every metric; empty if not measured."""
    out = io.StringIO()
    keys = list(dict.fromkeys(key for point in result.points for key in point.settings))
    metrics = [name for name in METRICS if any(name in point.scores for point in result.points)]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["name", *keys, "on_front", *(f"{m}{end}" for m in metrics for end in ("", "_low", "_high"))])
    for point in result.points:
        row = [point.name, *(point.settings.get(key, "") for key in keys), point.on_front]
        for metric in metrics:
            score = point.scores[metric]
            row += ["" if value is None else value for value in (score.value, score.low, score.high)]
        writer.writerow(row)
    return out.getvalue()


def tradeoff_markdown(result: TradeoffFile) -> str:
    """Return the table of the models with intervals, and the sentences about it, as Markdown."""
    shown = list(dict.fromkeys([*result.objectives, "helpful_and_safe", "well_formed"]))
    volume = result.hypervolume
    corner = ", ".join(f"{key} {value:g}" for key, value in volume.reference.items())
    lines = [
        *table(
            ["model", *(METRICS[key].title for key in shown), "front"],
            ([p.name, *(_cell(p.scores[key]) for key in shown), "yes" if p.on_front else ""] for p in result.points),
        ),
        "",
        f"Intervals: {level_text(result.confidence)}, by prompt. Pareto front: {'; '.join(result.pareto_front)}.",
        "",
        f"Hypervolume above ({corner}): {_cell(volume)}, over {volume.num} prompts.",
    ]
    if result.not_measured:
        lines += ["", f"Not measured, and left out: {'; '.join(result.not_measured)}."]
    lines += ["", *_comparison_words(result)]
    if result.nearest is not None:
        lines += ["", *nearest_words(result.nearest)]
        if others := result.nearest.not_told_from:
            lines += ["", f"Not distinguishable from it in either objective: {'; '.join(others)}."]
    return "\n".join(lines) + "\n"


def _comparison_words(result: TradeoffFile) -> list[str]:
    rows, objectives = result.comparisons.rows, result.objectives
    if not rows:
        return []
    differ = [row for row in rows if is_distinguishable(row, result.confidence)]
    counts = ", ".join(f"{key} {sum(row.metric == key for row in differ)}" for key in objectives)
    front = result.pareto_front
    close = [
        f"{one} and {other}"
        for one, other in itertools.pairwise(front)
        if not any({row.first, row.second} == {one, other} for row in differ)
    ]
    lines = [
        f"Compared on the same prompts: {result.comparisons.family}, {len(rows)} comparisons, Holm's correction "
        f"over all of them. Distinguishable: {counts} of {len(rows) // len(objectives)} each."
    ]
    if close:
        lines += ["", f"Neighbours on the front that are not distinguishable in either: {'; '.join(close)}."]
    return lines


def _cell(score: Score | Hypervolume) -> str:
    if score.value is None:
        return ""
    if score.low is None or score.high is None:
        return f"{score.value:.3f}"
    return f"{score.value:.3f} ({score.low:.3f} to {score.high:.3f})"


Rows = Mapping[str, Sequence[Judged]]


def choose_nearest(
    judged: Rows,
    at_least: Mapping[str, float],
    objectives: Sequence[str],
    validation_share: float,
    *,
    confidence: float = 0.95,
) -> NearestPoint:
    """Return the point that `nearest_to` chooses on the validation prompts; `judged` is by model.

    The best of several noisy scores is biased on the prompts of the choice, so `meets`, `missing` and `told_on` are
    measured on the other prompts. The parts are split by a hash of the prompt, so they agree between sweeps. If either
    part lacks an objective for a model, both steps use all prompts, and `held_out` is false.
    """
    parts = _part(judged, validation_share, chosen=True), _part(judged, validation_share, chosen=False)
    held_out = validation_share > 0 and all(_is_measured(part, objectives) for part in parts)
    validation, others = parts if held_out else (judged, judged)
    points = {name: _values(rows, objectives) for name, rows in validation.items()}
    choice = nearest_to(points, at_least, objectives)
    scores = {score.metric: score for score in score_rows(others[choice.name], confidence=confidence)}
    missing = {key: bound - _value(scores[key]) for key, bound in at_least.items() if _value(scores[key]) < bound}
    return NearestPoint(
        at_least=dict(at_least),
        name=choice.name,
        meets=not missing,
        missing=missing,
        held_out=held_out,
        validation_share=validation_share,
        chosen_on=ChosenOn(_num_prompts(validation), points[choice.name], choice.meets, dict(choice.missing)),
        told_on=ScoredOn(_num_prompts(others), {key: scores[key] for key in objectives}),
    )


def _share_of(prompt: str) -> float:
    """Return a number in [0, 1) that depends only on the prompt."""
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big") / 2**64


def _part(judged: Rows, validation_share: float, *, chosen: bool) -> dict[str, list[Judged]]:
    return {
        name: [row for row in rows if (_share_of(row.prompt) < validation_share) is chosen]
        for name, rows in judged.items()
    }


def _is_measured(part: Rows, objectives: Sequence[str]) -> bool:
    scores = [{score.metric: score for score in score_rows(rows)} for rows in part.values()]
    return all(one[key].value is not None for one in scores for key in objectives)


def _values(rows: Sequence[Judged], objectives: Sequence[str]) -> dict[str, float]:
    scores = {score.metric: score for score in score_rows(rows)}
    return {key: _value(scores[key]) for key in objectives}


def _value(score: Score) -> float:
    assert score.value is not None  # `_is_measured` has checked it
    return float(score.value)


def _num_prompts(judged: Rows) -> int:
    return len({row.prompt for rows in judged.values() for row in rows})


def nearest_words(nearest: NearestPoint) -> list[str]:
    """Return what `choose_nearest` found as lines of Markdown."""
    target = " and ".join(f"{key} of at least {value:g}" for key, value in nearest.at_least.items())
    short = ", ".join(f"{key} {value:.3f} below" for key, value in nearest.missing.items())
    scored, chosen = nearest.told_on, nearest.chosen_on
    scores = ", ".join(f"{key} {_cell(score)}" for key, score in scored.scores.items())
    what = "the nearest" if not chosen.meets else "which reaches it on the prompts of the choice, but not on the others"
    if nearest.meets and not chosen.meets:
        what = "the nearest on the prompts of the choice, where none reaches it; on the others it does"
    met = nearest.meets and chosen.meets
    head = f"For {target}: {nearest.name}{'' if met else f', {what}'}{f' ({short})' if short else ''}."
    if nearest.held_out:
        where = f"Chosen on {chosen.num_prompts} prompts; on the {scored.num_prompts} others: {scores}."
        return [head, "", where]
    why = "validation_share is 0" if nearest.validation_share == 0 else "too few prompts to split"
    return [
        head,
        "",
        f"Chosen and scored on the same {scored.num_prompts} prompts ({why}): {scores}. The best of several models "
        "looks better than it is on the prompts on which it was chosen.",
    ]

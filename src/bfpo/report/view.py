"""A report's data as the templates need it: numbers as text, positions of bars, badges, in the order of the page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from bfpo.core.console import in_words, level_text
from bfpo.core.schema import Score
from bfpo.data.labels import CELLS
from bfpo.report.answers import badges, is_folded
from bfpo.report.data import Gate, MethodResult, ReportData, SampleAnswer
from bfpo.report.figures.marks import token_of
from bfpo.report.sections import section_view
from bfpo.report.tables import MEAN_OF_SUITES, judged_alike, leaders, less_coherent, ranked_together
from bfpo.report.wording import cell_of, cell_title, duration, percent, points, points_interval
from bfpo.scores.scores import COHERENCE, METRICS

__all__ = ["few_samples", "page_view"]

SAMPLES_IN_TEXT, LONGEST_IN_TEXT = 3, 600

TABLE_METRICS = (
    "helpful_and_safe",
    "harmless_harmful",
    "over_refusal_benign",
    "over_refusal_borderline",
    "well_formed",
    *COHERENCE,
)
# Metrics that need judged answers; `harmless_harmful` can also be a mean of suites.
_OWN_METRICS = tuple(metric for metric in TABLE_METRICS if metric != "harmless_harmful")
ACCURACY_METRICS = ("accuracy", *(f"accuracy_{cell.replace('-', '_')}" for cell in CELLS))
_ACCURACY_TITLES = ("all pairs", *(cell_title(cell) for cell in CELLS))


def page_view(data: ReportData) -> dict[str, Any]:
    """Return what the templates need, except the figures and the headline."""
    leads = bool(data.stages) and not data.scored and not data.experiments
    measured = [metric for metric in TABLE_METRICS if any(m.score(metric) is not None for m in data.methods)]
    return {
        "confidence": level_text(data.confidence),
        "threshold": percent(data.well_formed_threshold),
        "prompt_counts": ", ".join(f"{count} {kind}" for kind, count in data.num_prompts.items()),
        "homes": _homes(data),
        "several": len(data.methods) > 1,
        "ranked": all(ranked_together(data, [metric]) for metric in TABLE_METRICS),
        "is_mean": bool(data.suites) and not _homes(data) and any(m.value("harmless_harmful") for m in data.methods),
        "tiles": _tiles(data),
        "gates": [_gate(gate) for gate in data.gates],
        "stages_lead": leads,
        # The page opens with the sentence and lines of the first result, which are not repeated.
        "stages": [
            {"result": one, "repeat": not (leads and place == 0)}
            for place, one in enumerate(data.stages)
            if one.tables or one.curves or not leads or place
        ],
        "roles": {method.role for method in data.methods},
        "measures_form": "well_formed" in measured,
        "measures_refusal": any(metric.startswith("over_refusal") for metric in measured),
        "harmless_title": METRICS["harmless_harmful"].title,
        "columns": [METRICS[metric].title for metric in measured],
        "rows": _rows(data, measured, data.methods),
        "by_suites": bool(data.suites) and not any(m.score(name) for m in data.methods for name in _OWN_METRICS),
        "differences": _differences(data),
        "accuracy_columns": _ACCURACY_TITLES,
        "accuracy_rows": _rows(data, ACCURACY_METRICS, [method for method in data.methods if method.accuracy]),
        "cells": [{"title": cell_title(cell), "token": f"c-{cell}"} for cell in CELLS],
        "definitions": [(METRICS[metric].title, METRICS[metric].summary) for metric in _defined(data)],
        "fact_tables": list(_fact_tables(data)),
        **section_view(data),
    }


def _defined(data: ReportData) -> Iterable[str]:
    """Return the metrics of the table, the figure and the experiments that have a value; means of suites are none."""
    points = [point for experiment in data.experiments for point in experiment.points]
    methods = [] if data.x_title.endswith(MEAN_OF_SUITES) else data.methods
    scorers = [*(method.score for method in methods), *(point.score for point in points)]
    objectives = [name for experiment in data.experiments for name in experiment.objectives if name in METRICS]
    names = dict.fromkeys((*TABLE_METRICS, "helpfulness", *objectives))
    return [name for name in names if any(score(name) is not None for score in scorers)]


def _homes(data: ReportData) -> str:
    """Return the suites behind the table of models; empty without suites."""
    titles = {suite.name: suite.title or suite.name for suite in data.suites}
    return "; ".join(dict.fromkeys(titles.get(method.home, method.home) for method in data.methods if method.home))


def few_samples(data: ReportData) -> list[dict[str, Any]]:
    """Return the answers to the first prompts of each kind, for the Markdown report."""
    seen: dict[str, set[str]] = {}
    few = []
    for sample in data.samples:
        prompts = seen.setdefault(sample.kind, set())
        if sample.prompt in prompts or len(prompts) == SAMPLES_IN_TEXT:
            continue
        prompts.add(sample.prompt)
        few.append(
            {
                "prompt": sample.prompt[:LONGEST_IN_TEXT],
                "kind": sample.kind,
                "answers": [_answer(data, answer, sample.kind) for answer in sample.answers],
            }
        )
    return few


def _answer(data: ReportData, answer: SampleAnswer, kind: str) -> dict[str, Any]:
    missing = len(answer.text) - LONGEST_IN_TEXT
    cut = f" [{missing} more characters]" if missing > 0 else ""
    return {
        "title": data.method(answer.method).title,
        "text": "(an answer that may be harmful; the HTML page shows it on a click)"
        if is_folded(answer, kind)
        else answer.text[:LONGEST_IN_TEXT] + cut,
        "badges": ", ".join(word for word, _ in badges(answer.verdict, answer.finished, answer.incoherent)),
    }


def _rows(data: ReportData, metrics: Sequence[str], methods: Sequence[MethodResult]) -> list[dict[str, Any]]:
    best = {metric: _best(data, metric) for metric in metrics}
    return [
        {
            "title": method.title,
            "summary": method.summary if method.summary != method.title else "",
            "style": "main" if method.role == "main" else "role" if method.role in ("start", "ceiling") else "",
            "token": token_of(data, method),
            "cells": [
                cell_of(_any_score(method, name), method.name in best[name], method.seed_values.get(name, ()))
                for name in metrics
            ],
        }
        for method in methods
    ]


def _any_score(method: MethodResult, metric: str) -> Score | None:
    """Return the score even if it has no value: it counts the unscored items."""
    return next((score for score in (*method.scores, *method.accuracy) if score.metric == metric), None)


def _best(data: ReportData, metric: str) -> set[str]:
    """Return the name of the best of the compared methods, if it is told apart from all others.

    Empty if two share the first rank, if its answers are coherent less often than another's, or if not all were judged
    by the same judge on the same prompts.
    """
    if metric in METRICS and not ranked_together(data, [metric]):
        return set()
    compared = [method for method in data.methods if method.role in ("main", "baseline")]
    known = [method for method in compared if method.value(metric) is not None]
    lower = metric in METRICS and not METRICS[metric].higher_is_better
    first = leaders(data, known, metric, higher_is_better=not lower)
    broken = metric in METRICS and any(less_coherent(data, method, known) for method in first)
    return {first[0].name} if len(first) == 1 < len(known) and not broken else set()


def _tiles(data: ReportData) -> list[dict[str, Any]]:
    """Return the metrics of the page's main model; empty without one."""
    shown = [metric for metric in TABLE_METRICS if metric != "over_refusal_benign"]
    return [_tile(data, metric) for metric in shown if data.main is not None and data.main.score(metric) is not None]


def _tile(data: ReportData, metric: str) -> dict[str, Any]:
    assert data.main is not None
    alike = [method for method in data.baselines if judged_alike(data, data.main, method, metric)]
    measured = [(value, method.title) for method in alike if (value := method.value(metric)) is not None]
    best = min if not METRICS[metric].higher_is_better else max
    value, title = best(measured, key=lambda item: item[0]) if measured else (None, "")
    lack = "no baseline judged alike" if len(alike) < len(data.baselines) else "no baseline measured"
    lack = lack if data.baselines else ""
    word = "highest" if METRICS[metric].higher_is_better else "lowest"
    against = lack if value is None else f"{word} baseline {percent(value, 1)} ({title})"
    better = "" if METRICS[metric].higher_is_better else " (lower is better)"
    title_here = data.y_title if metric == "harmless_harmful" and data.main.home is None else METRICS[metric].title
    return {
        "name": f"{data.main.title}: {title_here}{better}",
        "cell": cell_of(data.main.score(metric)),
        "against": against,
    }


def _gate(gate: Gate) -> dict[str, str]:
    word, style = {True: ("passed", "good"), False: ("failed", "bad"), None: ("not measured", "plain")}[gate.passed]
    needed = f"needed: at least {percent(gate.threshold, 1)}"
    if gate.score is None or gate.score.value is None:
        return {"title": gate.title, "word": word, "style": style, "text": needed}
    cell = cell_of(gate.score)
    return {"title": gate.title, "word": word, "style": style, "text": f"{cell.value} ({cell.interval}); {needed}"}


def _differences(data: ReportData) -> dict[str, Any] | None:
    if data.main is None or not data.baselines:
        return None
    found = [(method, data.comparison(method.name, "helpful_and_safe")) for method in data.baselines]
    ends = [abs(end) for _, item in found if item is not None for end in (item.value, item.low, item.high) if end]
    reach = max([0.05, *ends]) * 1.08
    rows = []
    for method, item in found:
        row: dict[str, Any] = {"title": method.title, "token": token_of(data, method), "missing": True}
        if item is not None and item.value is not None:
            low, high = (item.value if bound is None else bound for bound in (item.low, item.high))
            row |= {
                "missing": False,
                "value": points(item.value),
                "interval": points_interval(item.low, item.high),
                "left": round(50 + 50 * low / reach, 2),
                "width": round(50 * (high - low) / reach, 2),
                "at": round(50 + 50 * item.value / reach, 2),
            }
        rows.append(row)
    return {"main": data.main.title, "rows": rows}


def _fact_tables(data: ReportData) -> Iterable[tuple[str, list[tuple[str, str]]]]:
    for title, section in data.settings.items():
        yield title, [(key, in_words(value)) for key, value in section.items()]
    for method in data.methods:
        if method.settings:
            yield method.title, [(key, in_words(value)) for key, value in method.settings.items()]
    if data.seeds:
        yield "Seeds", [("seeds", ", ".join(map(str, data.seeds)))]
    spread = [
        (method.title, " / ".join("not measured" if value is None else percent(value, 1) for value in values))
        for method in data.methods
        if len(values := method.seed_values.get("helpful_and_safe", [])) > 1
    ]
    if spread:
        yield "Helpful and safe, seed by seed", spread
    times = {**data.seconds, **{m.title: m.seconds for m in data.methods if m.seconds is not None}}
    if times:
        yield "Time", [(name, duration(seconds)) for name, seconds in times.items()]
    if data.versions:
        yield "Versions", [(name, version or "not installed") for name, version in data.versions.items()]

"""The sections of the page below its main tables: suites, agreement, the data card, runs and their cost."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import Any

from bfpo.core.console import in_words
from bfpo.core.schema import Score
from bfpo.data.labels import CELLS
from bfpo.judges.quality import QUALITY_TITLES
from bfpo.report.costs import costs_of
from bfpo.report.data import MethodResult, ReportData
from bfpo.report.experiments import is_the_table
from bfpo.report.headline import front_of
from bfpo.report.tables import GROUPS, SuiteColumn, averaged, suite_columns, suite_mean
from bfpo.report.wording import duration, interval_text, percent, points, points_interval, worst_words
from bfpo.scores.scores import metric_title, p_text
from bfpo.stats import Interval
from bfpo.suites.scores import SUITE_METRICS

__all__ = ["CSV_COLUMNS", "csv_text", "section_view"]


CSV_COLUMNS = ("model", "suite", "metric", "value", "low", "high", "num", "unscored", "higher_is_better")


def section_view(data: ReportData) -> dict[str, Any]:
    """Return what the templates need, except about methods, training and answers."""
    columns = suite_columns(data)
    metered = any(run.joules is not None for run in data.runs)
    return {
        "run_columns": ["run", "stage", "status", "seeds", "time", "tokens generated", *["GPU energy"] * metered],
        "front": "; ".join(data.method(name).title for name in front_of(data)) if len(data.methods) > 1 else "",
        "suite_groups": list(_groups(data, columns)),
        "skipped": [
            {"title": s.title or s.name, "reason": s.reason or "no reason given"}
            for s in data.suites
            if s.status != "scored"
        ],
        "suite_sources": [
            [s.title or s.name, s.kind, s.judge, s.source, s.revision, s.licence]
            for s in data.suites
            if s.status == "scored"
        ],
        "suite_comparisons": [_comparison(data, item) for item in data.suite_comparisons],
        "tax": _tax(data),
        "published": [(model, f"{helpful:g}", f"{harmless:g}") for model, helpful, harmless in _PUBLISHED],
        "published_note": _PUBLISHED_NOTE,
        "agreement": [
            {"title": a.title, "run": a.run, "rows": [_score_row(score) for score in a.scores], "by_kind": a.by_kind}
            for a in data.agreement
        ],
        "cards": [_card(card) for card in data.data_cards],
        "runs": [
            [r.path, r.stage, r.status + (f": {r.error}" if r.error else ""), r.seeds,
             "unknown" if r.seconds is None else duration(r.seconds), "" if r.tokens is None else f"{r.tokens:,}",
             *([] if not metered else ["unknown" if r.joules is None else _watt_hours(r.joules)])]
            for r in data.runs
        ],
        "whole_paths": [r.whole or r.path for r in data.runs],
        "full_paths": [(r.path, r.whole) for r in data.runs if r.whole and r.whole != r.path],
        "total_cost": _total(data),
    }  # fmt: skip


def _groups(data: ReportData, columns: list[SuiteColumn]) -> Iterator[dict[str, Any]]:
    for group, title in GROUPS.items():
        wanted = [column for column in columns if column.group == group]
        if not wanted:
            continue
        names = [column.suite.title or column.suite.name for column in wanted]
        yield {
            "title": title,
            "columns": [
                f"{name} ({metric_title(column.metric, SUITE_METRICS)})"
                for name, column in zip(names, wanted, strict=True)
            ],
            "mean_of": _mean_of(wanted, group),
            "rows": [
                {
                    "title": m.title,
                    "cells": [_suite_cell(m, column) for column in wanted],
                    "mean": _mean(m, columns, group),
                }
                for m in data.methods
                if any(column.suite.name in m.suite_scores for column in wanted)
            ],
        }


def _mean_of(columns: list[SuiteColumn], group: str) -> str:
    """Return what the mean of a group is over, and what it leaves out."""
    counted = averaged(columns, group)
    names, others = (
        "; ".join(column.suite.title or column.suite.name for column in columns if (column in counted) is inside)
        for inside in (True, False)
    )
    if not counted:
        return f"There is no mean: {'the metrics differ' if group == 'inspect' else 'a higher value is not better'}."
    return (
        f"The mean is over {len(counted)} suite{'s' if len(counted) > 1 else ''}, each with the same weight: {names}. "
        f"{f'Without {others}: a higher value is not better. ' if others else ''}A model without a value for one of "
        "them has no mean. Its interval is combined from theirs (MOVER), assumed independent except for suites with "
        "the same prompts."
    )


def _mean(method: MethodResult, columns: list[SuiteColumn], group: str) -> dict[str, str]:
    mean = suite_mean(method, columns, group)
    if mean.value is None:
        return {"value": "none", "small": ""}
    bounds = _interval(Score(group, mean.value, mean.low, mean.high, mean.num))
    return {"value": percent(mean.value, 1), "small": bounds}


def _suite_cell(method: MethodResult, column: SuiteColumn) -> dict[str, Any]:
    scores = method.suite_scores.get(column.suite.name, [])
    score = next((score for score in scores if score.metric == column.metric), None)
    aside = [
        f"{other.metric.replace('_', ' ')} {_show_value(other.value)}"
        for other in scores
        if other.metric.startswith(("well_formed", "refused", "refusal")) and other.value is not None
    ]
    blocked = column.suite.blocked.get(method.name, 0)
    unscored = f"{score.unscored} unscored{f', {blocked} blocked' * bool(blocked)}" if score and score.unscored else ""
    if score is None or score.value is None:
        return {"value": "not measured", "small": [unscored] if unscored else []}
    small = [_interval(score), worst_words(score), *([] if column.metric == column.group else aside), unscored]
    return {"value": _show_value(score.value), "small": [text for text in small if text]}


def _show_value(value: float | None) -> str:
    """Return a share in per cent, and any other number as it is."""
    if value is None:
        return "not measured"
    return percent(value, 1) if 0 <= value <= 1 else f"{value:.3g}"


def _interval(score: Score) -> str:
    if score.low is None or score.high is None:
        return "no interval"
    if score.low >= 0 and score.high <= 1:
        return f"{100 * score.low:.1f} to {100 * score.high:.1f}"
    return f"{score.low:.3g} to {score.high:.3g}"


def _comparison(data: ReportData, item: Any) -> list[str]:
    return [
        next((suite.title for suite in data.suites if suite.name == item.suite and suite.title), item.suite),
        metric_title(item.metric, SUITE_METRICS),
        f"{item.first} minus {item.second}",
        "not measured" if item.difference is None else points(item.difference),
        points_interval(item.low, item.high),
        p_text(item.p_value),
        p_text(item.p_holm),
        item.test,
        str(item.num),
    ]


def _tax(data: ReportData) -> dict[str, Any] | None:
    """Return the rows of what capability costs, `None` without such tasks."""
    found = costs_of(data)
    if not found:
        return None
    rows = []
    for cost in found:
        for suite, metric, change, p_holm in cost.tasks:
            values = [_suite_value(one, suite.name, metric) for one in (cost.start, cost.method)]
            rows.append([cost.method.title, suite.title or suite.name, *values, *_change(change),
                         p_text(p_holm), f"{change.num:,}"])  # fmt: skip
        if cost.mean is not None:
            rows.append([cost.method.title, f"mean of {cost.mean.num} tasks", "", "", *_change(cost.mean), "",
                         f"{cost.num_documents:,}"])  # fmt: skip
    return {"start": found[0].start.title, "rows": rows}


def _change(found: Interval) -> tuple[str, str]:
    assert found.value is not None  # only measured differences are changes
    return points(found.value), points_interval(found.low, found.high)


def _suite_value(method: MethodResult, suite: str, metric: str) -> str:
    return _show_value(next((s.value for s in method.suite_scores.get(suite, []) if s.metric == metric), None))


def _score_row(score: Score) -> list[str]:
    value = "not measured" if score.value is None else f"{score.value:.3f}"
    title = QUALITY_TITLES.get(score.metric, score.metric.replace("_", " "))
    return [title, value, interval_text(score), f"{score.num:,}", f"{score.unscored:,}"]


def _card(card: Any) -> dict[str, Any]:
    return {
        "run": card.run,
        "sources": [
            [_source_cell(key, value) for key, value in source.items()] for source in card.sources
        ],
        "cells": [
            [name, *(f"{counts.get(cell, 0):,}" for cell in CELLS), f"{counts.get('unknown', 0):,}"]
            for name, counts in card.cells.items()
        ],
        "facts": [(key, in_words(value, 4)) for key, value in card.facts.items()],
        "warnings": card.warnings,
    }  # fmt: skip


def _source_cell(key: str, value: Any) -> str:
    if value is None:
        return {"licence": "unknown", "hub_id": "own files", "revision": "none"}.get(key, "none")
    return f"{value:,}" if isinstance(value, int) else in_words(value)


def _total(data: ReportData) -> str:
    seconds = [run.seconds for run in data.runs if run.seconds is not None]
    tokens = [run.tokens for run in data.runs if run.tokens is not None]
    energy = _energy(data)
    if not seconds:
        return f"Time was not recorded. {energy}"
    counted = f", {sum(tokens):,} tokens generated" if tokens else ""
    return f"{duration(sum(seconds))} over all runs{counted}; runs inside others are counted twice. {energy}"


def _energy(data: ReportData) -> str:
    known = [run.joules for run in data.runs if run.joules is not None]
    if not known:
        return "Energy was not measured."
    return (
        f"{_watt_hours(sum(known))} drawn by GPUs in {len(known)} of {len(data.runs)} runs, by their own counters; "
        "this includes other programs on the GPUs and excludes the rest of the machine."
    )


def _watt_hours(joules: float) -> str:
    """Return energy in Wh or kWh."""
    hours = joules / 3600
    return f"{hours / 1000:.2f} kWh" if hours >= 1000 else f"{hours:.1f} Wh"


def csv_text(data: ReportData) -> str:
    """Return every score as CSV: model, suite (or the run of an experiment), metric, value, bounds, counts, direction.

    Text that a spreadsheet would interpret as a formula begins with an apostrophe.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for method in data.methods:
        own = [("", score) for score in (*method.scores, *method.accuracy)]
        suites = [(suite, score) for suite, scores in method.suite_scores.items() for score in scores]
        writer.writerows(_csv_row(method.title, suite, score) for suite, score in (*own, *suites))
    for experiment in data.experiments:
        if not is_the_table(data, experiment):
            for point in experiment.points:
                writer.writerows(_csv_row(point.title, experiment.run, score) for score in point.scores)
    return out.getvalue()


def _csv_row(title: str, suite: str, score: Score) -> tuple[object, ...]:
    numbers = ["" if value is None else repr(value) for value in (score.value, score.low, score.high)]
    names = [_plain(title), _plain(suite), _plain(score.metric)]
    return (*names, *numbers, score.num, score.unscored, str(score.higher_is_better).lower())


def _plain(text: str) -> str:
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t")) else text


_PUBLISHED_NOTE = (
    "Read off the axes of the headline plot of arXiv 2408.15313, to within .005. With other models, prompts and judge: "
    "not comparable with the numbers of this page, and in none of its means."
)
_PUBLISHED = (  # model, helpfulness and harmlessness in the paper's headline plot, shares in [0, 1]
    ("Zephyr-7b-beta", 0.11, 0.59),
    ("Juanako-7b-UNA", 0.03, 0.66),
    ("OpenChat-3.5", 0.11, 0.67),
    ("Beaver-7b", 0.01, 0.70),
    ("Mistral-7B-Instruct-v0.2", 0.15, 0.70),
    ("Llama-2-7b-chat", 0.08, 0.72),
    ("BFPO (the paper's)", 0.135, 0.74),
)

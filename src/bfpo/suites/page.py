"""The scores of suites as Markdown: a table per suite, comparisons, what was skipped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from bfpo.suites.scores import SUITE_METRICS

__all__ = ["suites_page"]


def suites_page(result: Mapping[str, Any]) -> str:
    """Return what `scores.json` holds as Markdown; no mean is taken over suites."""
    lines = [f"Intervals: {result['confidence']:.0%}, over prompts."]
    lines += [f"\nWarning: {warning}." for warning in result["warnings"]]
    for suite in result["suites"]:
        if suite["status"] == "scored":
            lines += _table(suite, result)
    skipped = [suite for suite in result["suites"] if suite["status"] == "skipped"]
    if skipped:
        lines += ["", "Skipped, never scored:", ""]
        lines += [f"- {suite['title']}: {' '.join(str(suite['reason']).split())}" for suite in skipped]
    return "\n".join(lines)


def _table(suite: Mapping[str, Any], result: Mapping[str, Any]) -> Iterator[str]:
    judge = f", judged by {suite['judge']}" if suite["judge"] else ""
    yield from ("", f"**{suite['title']}**{judge}", "")
    for model, count in suite.get("too_long", {}).items():
        yield f"{count} prompts are too long for {model}: not asked, counted as unscored.\n"
    for model, reasons in suite.get("unscored", {}).items():
        yield from (f"{count} of {model} unscored: {reason}.\n" for reason, count in reasons.items())
    yield from ("| model | metric | value | interval | scored | unscored |", "|---|---|---|---|---|---|")
    yield from (_row(score) for score in result["scores"] if score["suite"] == suite["name"])
    compared = [row for row in result["comparisons"] if row["suite"] == suite["name"] and row["num"]]
    if compared:
        yield from ("", "| first - second | metric | difference | interval | p (Holm) | test | prompts |")
        yield "|---|---|---|---|---|---|---|"
        yield from map(_difference, compared)


def _title(metric: str) -> str:
    return SUITE_METRICS[metric].title if metric in SUITE_METRICS else metric.replace("_", " ")


def _row(score: Mapping[str, Any]) -> str:
    head = f"| {score['model']} | {_title(score['metric'])} |"
    if score["value"] is None:
        return f"{head} not measured | | 0 | {score['unscored']} |"
    interval = "" if score["low"] is None else f"{score['low']:.3f} to {score['high']:.3f}"
    return f"{head} {score['value']:.3f} | {interval} | {score['num']} | {score['unscored']} |"


def _difference(row: Mapping[str, Any]) -> str:
    interval = "" if row["low"] is None else f"{row['low']:+.3f} to {row['high']:+.3f}"
    p_value = "" if row["p_holm"] is None else f"{row['p_holm']:.3g}"
    pair = f"{row['first']} - {row['second']}"
    return (
        f"| {pair} | {_title(row['metric'])} | {row['difference']:+.3f} | {interval} | {p_value} | {row['test']} | "
        f"{row['num']} |"
    )

"""`scores.json` of `bfpo evaluate` over suites as Markdown: the scores and the differences of each suite."""

from __future__ import annotations

from collections.abc import Iterator

from bfpo.core.console import level_text
from bfpo.core.markdown import score_cells, table
from bfpo.judges.fit import fit_table
from bfpo.scores.categories import category_table
from bfpo.scores.people import people_sections
from bfpo.scores.scores import COHERENCE, describe_coherence, metric_title, p_text
from bfpo.suites.depth_tables import depth_text
from bfpo.suites.records import SuiteComparison, SuiteFacts, SuitesFile
from bfpo.suites.scores import SUITE_METRICS, describe_guard

__all__ = ["scores_text"]

_REASONS = {"off_language": "in another language", "cut": "cut at the token limit"}


def scores_text(result: SuitesFile) -> str:
    """Return the content of `scores.json` as Markdown."""
    lines = [f"Intervals: {level_text(result.confidence)}, over prompts."]
    lines += [f"\nWarning: {warning}." for warning in result.warnings]
    if any(score.metric in COHERENCE for score in result.scores):
        lines.append(f"\n{describe_coherence(result.coherence)}")
    if result.guard is not None:
        lines += [f"\n{line}." for line in describe_guard(result.guard, result.suites)]
    for suite in result.suites:
        if suite.status == "scored":
            lines += _table(suite, result)
    lines += ["", fit_table(result.judge_fit)] if result.judge_fit else []
    lines += [] if result.people is None else people_sections(result.people, result.confidence)
    lines += [] if result.depth is None else depth_text(result.depth)
    skipped = [suite for suite in result.suites if suite.status == "skipped"]
    if skipped:
        lines += ["", "Skipped:", ""]
        lines += [f"- {suite.title}: {' '.join(str(suite.reason).split())}" for suite in skipped]
    return "\n".join(lines)


def _table(suite: SuiteFacts, result: SuitesFile) -> Iterator[str]:
    judge = f", judged by {suite.judge}" if suite.judge else ""
    yield from ("", f"**{suite.title}**{judge}", "")
    for reason, count in (suite.left_out or {}).items():
        yield f"{count} prompts are left out: {reason}.\n"
    for model, count in (suite.trained_on or {}).items():
        yield f"{model} was trained on {count} of the {suite.num_prompts} prompts.\n"
    for model, count in (suite.too_long or {}).items():
        yield f"{count} prompts are too long for {model}, or its chat template refuses them; they count as unscored.\n"
    for model, count in (suite.blocked or {}).items():
        yield (
            f"{count} of {suite.num_prompts} prompts are blocked by the server of {model}; they have no answer and "
            "count as unscored: neither safe nor unsafe, and not as refusals.\n"
        )
    for model, reasons in (suite.unscored or {}).items():
        yield from (f"{count} of {model} unscored: {reason}.\n" for reason, count in reasons.items())
    for model, reasons in (suite.incoherent or {}).items():
        said = ", ".join(f"{count} {_REASONS.get(reason, reason)}" for reason, count in reasons.items())
        yield f"Of the answers of {model}: {said}.\n"
    heads = ["model", "metric"]
    named = [
        ([score.model, metric_title(score.metric, SUITE_METRICS)], score)
        for score in result.scores
        if score.suite == suite.name
    ]
    rows = ([*names, *score_cells(score)] for names, score in named)
    yield from table([*heads, "value", "interval", "scored", "unscored"], rows)
    yield from category_table(named, heads)
    compared = [row for row in result.comparisons if row.suite == suite.name and row.num]
    if compared:
        heads = ["first - second", "metric", "difference", "interval", "p (Holm)", "test", "prompts"]
        yield from ("", *table(heads, map(_difference, compared)))


def _difference(row: SuiteComparison) -> tuple[object, ...]:
    interval = "" if row.low is None or row.high is None else f"{row.low:+.3f} to {row.high:+.3f}"
    metric = metric_title(row.metric, SUITE_METRICS)
    models = f"{row.first} - {row.second}"
    return models, metric, f"{row.difference:+.3f}", interval, p_text(row.p_holm), row.test, row.num

"""The table in the shape of the paper's: discriminative, generative and helpfulness suites, each with its mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from bfpo.evaluation.report_data import MethodResult, ReportData, Suite
from bfpo.schema import Score

__all__ = ["GROUPS", "SuiteColumn", "suite_columns", "suite_mean", "with_suite_means"]

GROUPS = {
    "discriminative": "Discriminative: accuracy",
    "generative": "Generative: harmless share",
    "helpfulness": "Helpfulness",
    "over-refusal": "Over-refusal (lower is better)",
    "inspect": "Tasks of inspect-ai, each by its own metric",
}
_HELPFUL = ("winrate", "helpful", "ifeval", "score")
# Beside every harmless rate, but never the figure of a suite.
_ASIDE = ("well_formed", "finished", "refused", "refusal_rate", "unscored")


@dataclass(frozen=True, slots=True)
class SuiteColumn:
    """One column: the suite, and the metric that stands for it."""

    suite: Suite
    metric: str
    group: str


def suite_columns(data: ReportData) -> list[SuiteColumn]:
    """Return a column for each suite that was scored and is no accuracy on pairs, in the order of the groups.

    The metric that stands for a suite is the first that it lists but for well-formedness and the like.
    """
    columns = []
    for suite in data.suites:
        found = [score for method in data.methods for score in method.suite_scores.get(suite.name, [])]
        aside = () if suite.kind == "inspect" else _ASIDE
        chosen = next((score for score in found if not score.metric.startswith(aside)), None)
        if suite.status == "scored" and suite.kind != "accuracy" and chosen is not None:
            columns.append(SuiteColumn(suite, chosen.metric, _group(suite, chosen)))
    return sorted(columns, key=lambda column: list(GROUPS).index(column.group))


def _group(suite: Suite, score: Score) -> str:
    if suite.kind == "inspect":
        return "inspect"
    if "refusal" in score.metric:
        return "over-refusal"
    if suite.kind == "discriminative":
        return "discriminative"
    return "helpfulness" if any(word in score.metric for word in _HELPFUL) else "generative"


def suite_mean(method: MethodResult, columns: Sequence[SuiteColumn], group: str) -> float | None:
    """Return the mean of a group's suites, `None` where one of them was not measured or none is a share in [0, 1].

    Tasks of inspect-ai have none: they count different things, of some of which less is better.
    """
    if group == "inspect":
        return None
    wanted = [column for column in columns if column.group == group]
    values = [
        next((s.value for s in method.suite_scores.get(c.suite.name, []) if s.metric == c.metric), None) for c in wanted
    ]
    known = [value for value in values if value is not None and 0 <= value <= 1]
    return sum(known) / len(known) if known and len(known) == len(wanted) else None


def with_suite_means(data: ReportData) -> ReportData:
    """Return the data with the means of the suites as the axes of the headline figure, where it has no others."""
    axes = ("helpfulness", "harmless_harmful")
    columns = suite_columns(data)
    if not columns or any(method.score(metric) for method in data.methods for metric in axes):
        return data
    methods = []
    for method in data.methods:
        found = [
            Score(metric, value, None, None, len([c for c in columns if c.group == group]))
            for metric, group in zip(axes, ("helpfulness", "generative"), strict=True)
            if (value := suite_mean(method, columns, group)) is not None
        ]
        methods.append(replace(method, scores=[*method.scores, *found]))
    return replace(
        data, methods=methods, x_title="helpfulness, mean of the suites", y_title="harmless share, mean of the suites"
    )

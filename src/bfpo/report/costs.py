"""What training costs in capability: each model minus the start model, task by task and in the mean."""

from __future__ import annotations

from dataclasses import dataclass

from bfpo.report.data import MethodResult, ReportData, Suite, SuiteComparison
from bfpo.report.tables import turned
from bfpo.stats import Interval, mean_interval

__all__ = ["Cost", "costs_of"]

_KINDS = ("discriminative", "inspect")  # of suites that measure capability


@dataclass(frozen=True, slots=True)
class Cost:
    """The changes of one model: suite, metric, model minus start, and Holm's p, one by one.

    Of metrics that are better when higher; one that several evaluations compare counts once, as in the first. `mean` is
    over tasks of lm-eval, with `mean_interval`'s bounds; `None` for fewer than two.
    """

    start: MethodResult
    method: MethodResult
    tasks: list[tuple[Suite, str, Interval, float | None]]
    mean: Interval | None
    num_documents: int  # of the mean


def costs_of(data: ReportData) -> list[Cost]:
    """Return what each other model has gained or lost, paired by document; only models with a measured difference.

    Empty without a start model, or with more than one.
    """
    starts = [method for method in data.methods if method.role == "start"]
    tasks = {suite.name: suite for suite in data.suites if suite.kind in _KINDS}
    if len(starts) != 1:
        return []
    (start,) = starts
    found = []
    for method in (method for method in data.methods if method is not start):
        lower = {(s, one.metric) for s, own in method.suite_scores.items() for one in own if not one.higher_is_better}
        rows: dict[tuple[str, str], SuiteComparison] = {}
        for item in data.suite_comparisons:
            if {item.first, item.second} == {method.name, start.name} and item.difference is not None:
                rows.setdefault((item.suite, item.metric), turned(item, method.name))
        changes = [
            (tasks[suite], metric, Interval(row.difference, row.low, row.high, row.num), row.p_holm)
            for (suite, metric), row in rows.items()
            if suite in tasks and (suite, metric) not in lower
        ]
        averaged = [change for suite, _, change, _ in changes if suite.kind == "discriminative"]
        mean = mean_interval(averaged) if len(averaged) > 1 else None
        if changes:
            found.append(Cost(start, method, changes, mean, sum(change.num for change in averaged)))
    return found

"""What training costs in capability: each model minus the start model, task by task and in the mean."""

from __future__ import annotations

from dataclasses import dataclass, field

from bfpo.report.data import MethodResult, ReportData, Suite
from bfpo.stats import Interval, mean_interval

__all__ = ["Cost", "costs_of", "start_of"]

_KINDS = ("discriminative", "inspect")  # of suites that measure capability


@dataclass(frozen=True, slots=True)
class Cost:
    """The changes of one model: suite, metric, model minus start, and Holm's p, one by one.

    `mean` is over tasks of lm-eval, with `mean_interval`'s bounds; `None` for fewer than two.
    """

    method: MethodResult
    tasks: list[tuple[Suite, str, Interval, float | None]] = field(default_factory=list)
    mean: Interval | None = None
    num_documents: int = 0  # of the mean


def start_of(data: ReportData) -> MethodResult | None:
    """Return the start model, `None` if there is none or more than one."""
    starts = [method for method in data.methods if method.role == "start"]
    return starts[0] if len(starts) == 1 else None


def costs_of(data: ReportData) -> list[Cost]:
    """Return what each other model has gained or lost, paired by document; only models with a measured difference."""
    start = start_of(data)
    tasks = {suite.name: suite for suite in data.suites if suite.kind in _KINDS}
    if start is None:
        return []
    found = []
    for method in (method for method in data.methods if method is not start):
        changes = []
        for item in data.suite_comparisons:
            names = {item.first, item.second}
            if item.suite not in tasks or names != {method.name, start.name} or item.difference is None:
                continue
            sign = 1 if item.first == method.name else -1
            low, high = (None if end is None else sign * end for end in (item.low, item.high)[::sign])
            change = Interval(sign * item.difference, low, high, item.num)
            changes.append((tasks[item.suite], item.metric, change, item.p_holm))
        averaged = [change for suite, _, change, _ in changes if suite.kind == "discriminative"]
        mean = mean_interval(averaged) if len(averaged) > 1 else None
        if changes:
            found.append(Cost(method, changes, mean, sum(change.num for change in averaged)))
    return found

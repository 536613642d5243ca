"""Which models may be ranked against one another: those that the same judge judged on the same prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bfpo.report.data import Basis, MethodResult, ReportData
from bfpo.report.tables import axis_groups, suite_columns

__all__ = ["basis_of", "groups_alike", "judged_alike", "ranked_together", "who_judged"]


def basis_of(data: ReportData, method: MethodResult, metric: str) -> list[Basis]:
    """Return what a score of the table or of the headline figure rests on; empty where that is not known."""
    if method.home is not None:
        return [method.basis[method.home]] if method.home in method.basis else []
    columns = suite_columns(data)
    group = axis_groups(columns).get(metric)
    names = [column.suite.name for column in columns if column.group == group]
    return [method.basis[name] for name in names if name in method.basis]


def judged_alike(data: ReportData, first: MethodResult, second: MethodResult, metric: str) -> bool:
    """Return whether both scores are by the same judges on the same prompts; what is unknown is like unknown alone."""
    return _key(data, first, metric) == _key(data, second, metric)


def groups_alike(data: ReportData, metric: str) -> list[list[MethodResult]]:
    """Return the methods that have the metric, but for the ceiling, in groups that may be ranked."""
    groups: dict[tuple[object, ...], list[MethodResult]] = {}
    for method in data.methods:
        if method.role != "ceiling" and method.value(metric) is not None:
            groups.setdefault(_key(data, method, metric), []).append(method)
    return list(groups.values())


def ranked_together(data: ReportData, metrics: Iterable[str]) -> bool:
    """Return whether all methods of the page may be ranked by each of the metrics."""
    return all(len(groups_alike(data, metric)) < 2 for metric in metrics)


def who_judged(basis: Sequence[Basis]) -> str:
    """Return in words by whom and on how many prompts, such as `oracle on 540 prompts`."""
    judges = ", ".join(dict.fromkeys(judge or "a judge without a name" for one in basis for judge in one.judges))
    if not basis:
        return "unknown judges"
    return f"{judges} on {sum(one.num for one in basis):,} prompts"


def _key(data: ReportData, method: MethodResult, metric: str) -> tuple[object, ...]:
    return tuple(sorted((tuple(one.judges), one.prompts) for one in basis_of(data, method, metric)))

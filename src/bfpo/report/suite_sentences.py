"""What the comparisons of models over suites allow to be said, in sentences for the top of a page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from bfpo.report.data import ReportData, SuiteComparison
from bfpo.report.wording import points
from bfpo.suites.scores import SUITE_METRICS

__all__ = ["metric_title", "suite_lines"]

_SHOWN = 4


def metric_title(name: str) -> str:
    """Return a metric's name as people read it; that of a task of lm-eval or inspect-ai as it is."""
    return SUITE_METRICS[name].title if name in SUITE_METRICS else name


def suite_lines(data: ReportData) -> Iterator[str]:
    """Yield, of the page's model beside each other one, the suites on which chance does not explain the difference.

    That is where Holm's p, over all comparisons of the run, lies below 1 - confidence.
    """
    main = data.main
    for other in data.methods if main is not None else ():
        assert main is not None
        rows = [
            _turned(row, main.name)
            for row in data.suite_comparisons
            if {row.first, row.second} == {main.name, other.name}
        ]
        tested = [row for row in rows if row.p_holm is not None and row.difference is not None]
        if other is main or not tested:
            continue
        apart = sorted((row for row in tested if _apart(row, data)), key=lambda row: row.p_holm or 0.0)
        if not apart:
            yield (
                f"Chance explains every difference between {main.title} and {other.title} on the suites "
                f"({len(tested)} comparisons, Holm's correction)."
            )
            continue
        named = "; ".join(_difference(data, row) for row in apart[:_SHOWN])
        more = f"; {len(apart) - _SHOWN} more stand below" if len(apart) > _SHOWN else ""
        yield (
            f"{main.title} minus {other.title}, where chance does not explain it ({len(apart)} of {len(tested)} "
            f"measures of suites, Holm's correction), in points: {named}{more}."
        )


def _apart(row: SuiteComparison, data: ReportData) -> bool:
    return row.p_holm is not None and row.p_holm < 1 - data.confidence


def _turned(row: SuiteComparison, first: str) -> SuiteComparison:
    """Return the comparison with `first` first."""
    if row.first == first or row.difference is None:
        return row
    low, high = (None if bound is None else -bound for bound in (row.high, row.low))
    return replace(row, first=first, second=row.first, difference=-row.difference, low=low, high=high)


def _difference(data: ReportData, row: SuiteComparison) -> str:
    assert row.difference is not None
    title = next((suite.title for suite in data.suites if suite.name == row.suite and suite.title), row.suite)
    bounds = "" if row.low is None or row.high is None else f" ({points(row.low)} to {points(row.high)})"
    return f"{title}, {metric_title(row.metric)} {points(row.difference)}{bounds}"

"""Which methods no other beats in both helpfulness and harmlessness."""

from __future__ import annotations

from bfpo.report.alike import ranked_together
from bfpo.report.data import ReportData
from bfpo.stats.pareto import pareto_front

__all__ = ["front_of"]

AXES = ("helpfulness", "harmless_harmful")


def front_of(data: ReportData) -> list[str]:
    """Return the names of the methods on the Pareto front of the headline figure, by helpfulness, lowest first.

    The ceiling, trained on ideal answers, is no rival and left out. Estimates are compared as they are. Empty where
    not all were judged by the same judge on the same prompts.
    """
    if not ranked_together(data, AXES):
        return []
    points = {method.name: {axis: method.value(axis) for axis in AXES} for method in data.methods}
    known = {
        name: {axis: value for axis, value in values.items() if value is not None}
        for name, values in points.items()
        if data.method(name).role != "ceiling" and None not in values.values()
    }
    return pareto_front(known, AXES) if known else []

"""Which methods no other beats in both helpfulness and harmlessness."""

from __future__ import annotations

from bfpo.evaluation.report_data import ReportData

__all__ = ["front_of"]


def front_of(data: ReportData) -> list[str]:
    """Return the names of the methods on the Pareto front of the headline figure, by helpfulness, lowest first.

    The ceiling, trained on ideal answers, is no rival and left out. Estimates are compared as they are.
    """
    points = [
        (x, y, method.name)
        for method in data.methods
        if method.role != "ceiling"
        and (x := method.value("helpfulness")) is not None
        and (y := method.value("harmless_harmful")) is not None
    ]
    return [
        name for x, y, name in sorted(points) if not any(u >= x and v >= y and (u > x or v > y) for u, v, _ in points)
    ]

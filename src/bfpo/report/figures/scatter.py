"""The headline figure: helpfulness against harmlessness of the methods of a report."""

from __future__ import annotations

from dataclasses import replace

from matplotlib.figure import Figure

from bfpo.plots.plane import MOST_LABELS, Mark, draw_plane
from bfpo.plots.style import colour_of, marker_of
from bfpo.report.data import MethodResult, ReportData
from bfpo.report.pareto_names import front_of

__all__ = ["scatter_figure"]

X_METRIC, Y_METRIC = "helpfulness", "harmless_harmful"
_SIZES = {"main": 110.0, "start": 75.0, "ceiling": 130.0}


def scatter_figure(data: ReportData, *, width: float = 7.4, height: float = 4.9) -> Figure | None:
    """Return helpfulness on harmless prompts against harmlessness on harmful ones, with intervals; inches.

    A hollow marker: less well-formed text than the report's threshold. Small dots: single seeds. A method without both
    values is left out; `None` if all are. Where points crowd the figure grows by a panel that shows them enlarged. Of
    more than `MOST_LABELS` methods only the front and those that are no baseline are named.
    """
    drawn = [(method, mark) for method in data.methods if (mark := _mark(data, method)) is not None]
    if not drawn:
        return None
    names = front_of(data)
    few = len(drawn) <= MOST_LABELS
    marks = [
        mark if few or method.name in names or method.role != "baseline" else replace(mark, title="")
        for method, mark in drawn
    ]
    front = [mark for name in names if (mark := _mark(data, data.method(name))) is not None]
    points = [(mark.x[0], mark.y[0]) for mark in front]
    return draw_plane(marks, points, (data.x_title, data.y_title), width=width, height=height, name="scatter")


def _mark(data: ReportData, method: MethodResult) -> Mark | None:
    across, up = method.score(X_METRIC), method.score(Y_METRIC)
    if across is None or up is None or across.value is None or up.value is None:
        return None
    dots = zip(method.seed_values.get(X_METRIC, []), method.seed_values.get(Y_METRIC, []), strict=False)
    formed = method.value("well_formed")
    return Mark(
        method.title,
        (across.value, across.low, across.high),
        (up.value, up.low, up.high),
        colour_of(data, method),
        marker_of(data, method),
        _SIZES.get(method.role, 62.0),
        hollow=formed is not None and formed < data.well_formed_threshold,
        bold=method.role == "main",
        seeds=tuple((x, y) for x, y in dots if x is not None and y is not None),
    )

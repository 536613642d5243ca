"""The headline figure: helpfulness against harmlessness, with intervals and labels that keep apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bfpo.evaluation.figures.placement import Box, place_labels
from bfpo.evaluation.figures.style import INK, MUTED, PAPER, colour_of, figure_style, marker_of
from bfpo.evaluation.pareto_names import front_of
from bfpo.evaluation.report_data import MethodResult, ReportData

__all__ = ["scatter_figure"]

X_METRIC, Y_METRIC = "helpfulness", "harmless_harmful"


def scatter_figure(data: ReportData, *, width: float = 7.4, height: float = 4.9) -> Figure | None:
    """Return helpfulness on harmless prompts against harmlessness on harmful ones, with intervals; inches.

    A hollow marker: less well-formed text than the report's threshold. Small dots: single seeds. A method without both
    values is left out; `None` if all are.
    """
    shown = [
        method for method in data.methods if method.score(X_METRIC) is not None and method.score(Y_METRIC) is not None
    ]
    if not shown:
        return None
    with figure_style("scatter"):
        figure = Figure(figsize=(width, height), dpi=100)
        axes = figure.add_axes((0.62 / width, 0.55 / height, 1 - 0.8 / width, 1 - 0.75 / height))
        _draw_front(axes, data)
        for method in shown:
            _draw_method(axes, data, method)
        _limit_axes(axes, shown)
        axes.set_xlabel(f"{data.x_title}  →")
        axes.set_ylabel(f"{data.y_title}  →")
        _label_points(figure, axes, data, shown)
    return figure


def _draw_front(axes: Any, data: ReportData) -> None:
    """Draw the Pareto front as the steps that bound what its methods dominate."""
    front = [data.method(name) for name in front_of(data)]
    if len(front) > 1:
        across, up = ([method.value(metric) for method in front] for metric in (X_METRIC, Y_METRIC))
        axes.step(across, up, where="pre", color=MUTED, linewidth=1.1, linestyle=(0, (1, 1.6)), zorder=1.5)


def _draw_method(axes: Any, data: ReportData, method: MethodResult) -> None:
    colour = colour_of(data, method)
    across, up = method.score(X_METRIC), method.score(Y_METRIC)
    assert across is not None
    assert up is not None
    for score, line in ((across, axes.hlines), (up, axes.vlines)):
        if score.low is not None and score.high is not None:
            other = up.value if score is across else across.value
            line(other, score.low, score.high, color=colour, linewidth=1.3, alpha=0.55, zorder=2)
    dots = zip(method.seed_values.get(X_METRIC, []), method.seed_values.get(Y_METRIC, []), strict=False)
    seeds = [(x, y) for x, y in dots if x is not None and y is not None]
    if len(seeds) > 1:
        axes.scatter(*zip(*seeds, strict=True), s=9, color=colour, alpha=0.6, linewidths=0, zorder=3)
    formed = method.value("well_formed")
    hollow = formed is not None and formed < data.well_formed_threshold
    axes.scatter(
        [across.value],
        [up.value],
        s={"main": 110, "start": 75, "ceiling": 130}.get(method.role, 62),
        marker=marker_of(data, method),
        facecolor=PAPER if hollow else colour,
        edgecolor=colour,
        linewidths=1.7 if hollow else 1.0,
        zorder=5 if method.role == "main" else 4,
        clip_on=False,
    )


def _limit_axes(axes: Any, shown: Sequence[MethodResult]) -> None:
    for metric, set_limits in ((X_METRIC, axes.set_xlim), (Y_METRIC, axes.set_ylim)):
        values = [
            value
            for method in shown
            if (score := method.score(metric)) is not None
            for value in (score.value, score.low, score.high, *method.seed_values.get(metric, []))
            if value is not None
        ]
        low, high = min(values), max(values)
        room = max(0.06, 0.1 * (high - low))
        # A share ends at 0 and 1; the little beyond keeps markers whole.
        set_limits(max(low - room, -0.03), min(high + room, 1.03))
        middle, least = (low + high) / 2, 0.3
        if high - low + 2 * room < least:
            set_limits(*_within_unit(middle - least / 2, middle + least / 2))


def _within_unit(low: float, high: float) -> tuple[float, float]:
    shift = max(0.0, -0.03 - low) - max(0.0, high - 1.03)
    return low + shift, high + shift


def _label_points(figure: Figure, axes: Any, data: ReportData, shown: Sequence[MethodResult]) -> None:
    renderer = FigureCanvasAgg(figure).get_renderer()  # type: ignore[no-untyped-call]
    styles = [
        {"fontsize": 10.5 if m.role == "main" else 9.5, "weight": "bold" if m.role == "main" else "normal"}
        for m in shown
    ]
    points = [tuple(axes.transData.transform((m.value(X_METRIC), m.value(Y_METRIC)))) for m in shown]
    sizes = []
    for method, style in zip(shown, styles, strict=True):
        text = axes.text(0, 0, method.title, **style)
        extent = text.get_window_extent(renderer)
        text.remove()
        sizes.append((extent.width, extent.height))
    frame = axes.get_window_extent(renderer)
    bounds = Box(frame.x0 + 3, frame.y0 + 3, figure.bbox.x1 - 4, figure.bbox.y1 - 2)
    boxes = place_labels(points, sizes, bounds, point_radius=6.5, bars=list(_bars(axes, shown)))
    to_data = axes.transData.inverted()
    for method, style, point, box in zip(shown, styles, points, boxes, strict=True):
        centre = ((box.left + box.right) / 2, (box.bottom + box.top) / 2)
        nearest = (min(max(point[0], box.left), box.right), min(max(point[1], box.bottom), box.top))
        if np.hypot(nearest[0] - point[0], nearest[1] - point[1]) > 16:
            line = np.array([to_data.transform(point), to_data.transform(nearest)])
            axes.plot(*line.T, color=MUTED, linewidth=0.7, zorder=3.5, clip_on=False)
        x, y = to_data.transform(centre)
        axes.text(x, y, method.title, ha="center", va="center", zorder=6, color=INK, **style)


def _bars(axes: Any, shown: Sequence[MethodResult]) -> Iterator[Box]:
    for method in shown:
        across, up = method.score(X_METRIC), method.score(Y_METRIC)
        assert across is not None
        assert up is not None
        for corners in (
            ((across.low, up.value), (across.high, up.value)),
            ((across.value, up.low), (across.value, up.high)),
        ):
            if all(value is not None for corner in corners for value in corner):
                (left, bottom), (right, top) = (axes.transData.transform(corner) for corner in corners)
                yield Box(left, bottom, right, top).padded(1.5)

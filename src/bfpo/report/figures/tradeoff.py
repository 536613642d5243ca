"""Figures of the trade-off: every model with its intervals, and the Pareto front."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from matplotlib.figure import Figure

from bfpo.core.schema import Score
from bfpo.plots.plane import MOST_LABELS, Mark, draw_plane
from bfpo.plots.style import METHOD_COLOURS, MUTED
from bfpo.report.data import Experiment, MethodResult, ReportData
from bfpo.report.figures.marks import colour_of, marker_of
from bfpo.report.headline import front_of
from bfpo.report.tables import MEAN_OF_SUITES, NOT_REFUSED, refused_harmful
from bfpo.scores.records import NearestPoint, TradeoffFile, TradeoffPoint
from bfpo.scores.scores import metric_title
from bfpo.stats import Interval
from bfpo.stats.pareto import pareto_front

__all__ = ["experiment_figure", "front_figure", "refused_figure", "scatter_figure"]


def front_figure(
    result: TradeoffFile,
    titles: Mapping[str, str],
    *,
    labels: Mapping[str, str] | None = None,
    width: float = 7.4,
    height: float = 4.9,
) -> Figure:
    """Return the models of a trade-off in the plane of its two objectives; inches.

    `titles` names the axes, `labels` the points whose title differs from their name. Filled markers are on the front,
    joined as a staircase; the chosen model has a ring. With many points only these are named.
    """
    across, up = result.objectives
    nearest = result.nearest.name if result.nearest else None
    few = len(result.points) <= MOST_LABELS
    marks: dict[str, Mark] = {}
    for point in result.points:
        x, y = point.scores.get(across), point.scores.get(up)
        if x is None or y is None or x.value is None or y.value is None:
            continue
        named = few or point.on_front or point.name == nearest
        marks[point.name] = Mark(
            (labels or {}).get(point.name, point.name) if named else "",
            (x.value, x.low, x.high),
            (y.value, y.low, y.high),
            METHOD_COLOURS[0] if point.on_front else MUTED,
            size=48.0,
            hollow=not point.on_front,
            ring=METHOD_COLOURS[1] if point.name == nearest else None,
        )
    steps = [(marks[name].x[0], marks[name].y[0]) for name in result.pareto_front]
    return draw_plane(
        list(marks.values()), steps, (titles[across], titles[up]), width=width, height=height, name="front"
    )


def experiment_figure(experiment: Experiment, *, width: float = 7.4, height: float = 4.9) -> Figure | None:
    """Return the same figure of an experiment of a report; `None` if no point has both objectives."""
    drawn = {point.name for point in experiment.points if all(map(point.score, experiment.objectives))}
    if len(experiment.objectives) != 2 or not drawn:
        return None
    front = [point.name for point in experiment.points if {point.name, point.title} & set(experiment.front)]
    across, up = experiment.objectives
    front.sort(key=lambda name: _place(experiment, name, across, up))
    result = TradeoffFile(
        objectives=experiment.objectives,
        points=[
            TradeoffPoint(point.name, {}, point.on_front, {score.metric: score for score in point.scores})
            for point in experiment.points
        ],
        pareto_front=[name for name in front if name in drawn],
        nearest=NearestPoint(name=experiment.nearest) if experiment.nearest in drawn else None,
    )
    labels = {point.name: point.title for point in experiment.points}
    titles = {name: metric_title(name) for name in experiment.objectives}
    return front_figure(result, titles, labels=labels, width=width, height=height)


def _place(experiment: Experiment, name: str, across: str, up: str) -> tuple[float, float]:
    point = next(point for point in experiment.points if point.name == name)
    x, y = point.score(across), point.score(up)
    return (x.value or 0.0 if x is not None else 0.0), -(y.value or 0.0 if y is not None else 0.0)


X_METRIC, Y_METRIC = "helpfulness", "harmless_harmful"
_SIZES = {"main": 110.0, "start": 75.0, "ceiling": 130.0}


def scatter_figure(data: ReportData, *, width: float = 7.4, height: float = 4.9) -> Figure | None:
    """Return helpfulness on harmless prompts against harmlessness on harmful ones, with intervals; inches.

    Hollow markers: less well-formed text than the report's threshold. Small dots: single seeds. Methods without both
    values are left out; `None` if none remains. Crowded points are enlarged in a second panel. With more than
    `MOST_LABELS` methods, baselines are named only if they are on the front.
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
    points = [(mark.x[0], mark.y[0]) for mark in front] if len(drawn) > 1 else []
    return draw_plane(marks, points, (data.x_title, data.y_title), width=width, height=height, name="scatter")


def _mark(data: ReportData, method: MethodResult) -> Mark | None:
    across, up = method.score(X_METRIC), method.score(Y_METRIC)
    mark = None if across is None or up is None else _plain_mark(data, method, across, up)
    if mark is None:
        return None
    dots = zip(method.seed_values.get(X_METRIC, []), method.seed_values.get(Y_METRIC, []), strict=False)
    formed = method.value("well_formed")
    return replace(
        mark,
        hollow=formed is not None and formed < data.well_formed_threshold,
        bold=method.role == "main",
        seeds=tuple((x, y) for x, y in dots if x is not None and y is not None),
    )


def _plain_mark(data: ReportData, method: MethodResult, across: Score, up: Score | Interval) -> Mark | None:
    """Return a method's mark with its intervals; `None` if one of the two was not measured."""
    if across.value is None or up.value is None:
        return None
    return Mark(
        method.title,
        (across.value, across.low, across.high),
        (up.value, up.low, up.high),
        colour_of(data, method),
        marker_of(data, method),
        _SIZES.get(method.role, 62.0),
    )


def refused_figure(data: ReportData, *, width: float = 7.4, height: float = 4.9) -> Figure | None:
    """Return the same for runs without a judge of harm: harmful prompts refused against harmless ones not refused.

    `None` where `scatter_figure` has something to show, or no suite reads one of the two.
    """
    if not data.x_title.startswith(NOT_REFUSED) or any(_mark(data, method) for method in data.methods):
        return None
    drawn: dict[str, Mark] = {}
    for method, up in refused_harmful(data):
        across = method.score(X_METRIC)
        if across is not None and (mark := _plain_mark(data, method, across, up)) is not None:
            drawn[method.name] = mark
    if not drawn:
        return None
    places = {name: {X_METRIC: mark.x[0], Y_METRIC: mark.y[0]} for name, mark in drawn.items()}
    front = [(drawn[name].x[0], drawn[name].y[0]) for name in pareto_front(places)] if len(drawn) > 1 else []
    titles = (data.x_title, f"harmful prompts refused, {MEAN_OF_SUITES}")
    return draw_plane(list(drawn.values()), front, titles, width=width, height=height, name="refused")

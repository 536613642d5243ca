"""The figure of a trade-off: every model with its intervals, and the line of those that nothing beats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from bfpo.plots.plane import MOST_LABELS, Mark, draw_plane
from bfpo.plots.style import METHOD_COLOURS, MUTED
from bfpo.report.experiment_data import Experiment
from bfpo.scores.scores import METRICS

__all__ = ["experiment_figure", "front_figure"]


def front_figure(
    result: Mapping[str, Any], titles: Mapping[str, str], *, width: float = 7.4, height: float = 4.9
) -> Figure:
    """Return the models of `bfpo.experiments.tradeoff.tradeoff` in the plane of its two objectives; inches.

    `titles` names the axes. Full markers are on the front, joined as a staircase; the chosen model has a ring. Of many
    points only these are named.
    """
    across, up = result["objectives"]
    nearest = result["nearest"]["name"] if result["nearest"] else None
    few = len(result["points"]) <= MOST_LABELS
    marks = {
        point["name"]: Mark(
            point.get("title", point["name"]) if few or point["on_front"] or point["name"] == nearest else "",
            tuple(point["scores"][across][key] for key in ("value", "low", "high")),
            tuple(point["scores"][up][key] for key in ("value", "low", "high")),
            METHOD_COLOURS[0] if point["on_front"] else MUTED,
            size=48.0,
            hollow=not point["on_front"],
            ring=METHOD_COLOURS[1] if point["name"] == nearest else None,
        )
        for point in result["points"]
        if point["scores"][across]["value"] is not None and point["scores"][up]["value"] is not None
    }
    steps = [(marks[name].x[0], marks[name].y[0]) for name in result["pareto_front"]]
    return draw_plane(
        list(marks.values()), steps, (titles[across], titles[up]), width=width, height=height, name="front"
    )


def experiment_figure(experiment: Experiment, *, width: float = 7.4, height: float = 4.9) -> Figure | None:
    """Return the same figure of an experiment of a report; `None` where no point has both objectives."""
    nothing = {"value": None, "low": None, "high": None}
    points = [
        {
            "name": point.name,
            "title": point.title,
            "on_front": point.on_front,
            "scores": {
                name: {"value": score.value, "low": score.low, "high": score.high}
                if (score := point.score(name)) is not None
                else nothing
                for name in experiment.objectives
            },
        }
        for point in experiment.points
    ]
    drawn = {point.name for point in experiment.points if all(map(point.score, experiment.objectives))}
    if len(experiment.objectives) != 2 or not drawn:
        return None
    front = [point.name for point in experiment.points if {point.name, point.title} & set(experiment.front)]
    across, up = experiment.objectives
    front.sort(key=lambda name: _place(experiment, name, across, up))
    result = {
        "objectives": experiment.objectives,
        "points": points,
        "pareto_front": [name for name in front if name in drawn],
        "nearest": {"name": experiment.nearest} if experiment.nearest in drawn else None,
    }
    titles = {name: METRICS[name].title if name in METRICS else name for name in experiment.objectives}
    return front_figure(result, titles, width=width, height=height)


def _place(experiment: Experiment, name: str, across: str, up: str) -> tuple[float, float]:
    point = next(point for point in experiment.points if point.name == name)
    x, y = point.score(across), point.score(up)
    return (x.value or 0.0 if x is not None else 0.0), -(y.value or 0.0 if y is not None else 0.0)

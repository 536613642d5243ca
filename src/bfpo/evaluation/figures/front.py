"""The figure of a trade-off: every model with its intervals, and the line of those that nothing beats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from bfpo.evaluation.figures.style import INK, METHOD_COLOURS, MUTED, figure_style

__all__ = ["front_figure"]


def front_figure(
    result: Mapping[str, Any], titles: Mapping[str, str], *, width: float = 7.4, height: float = 4.9
) -> Figure:
    """Return the models of `bfpo.experiments.tradeoff.tradeoff` in the plane of its two objectives; inches.

    `titles` names the axes. Full markers are on the front, joined as a staircase; the chosen model has a ring.
    """
    across, up = result["objectives"]
    nearest = result["nearest"]["name"] if result["nearest"] else None
    with figure_style("front"):
        figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
        axes = figure.add_subplot()
        places = {}
        for point in result["points"]:
            x, y = point["scores"][across], point["scores"][up]
            if x["value"] is None or y["value"] is None:
                continue
            places[point["name"]] = (x["value"], y["value"])
            colour = METHOD_COLOURS[0] if point["on_front"] else MUTED
            for score, line, other in ((x, axes.hlines, y), (y, axes.vlines, x)):
                if score["low"] is not None and score["high"] is not None:
                    line(other["value"], score["low"], score["high"], color=colour, linewidth=1.1, alpha=0.5)
            axes.scatter(
                [x["value"]], [y["value"]], s=48, zorder=3, edgecolor=colour, linewidths=1.4,
                facecolor=colour if point["on_front"] else "none",
            )  # fmt: skip
            axes.annotate(
                point["name"], (x["value"], y["value"]), textcoords="offset points", xytext=(6, 5), fontsize=8.5,
                color=INK,
            )  # fmt: skip
        steps = [places[name] for name in result["pareto_front"]]
        axes.step(*zip(*steps, strict=True), where="pre", color=METHOD_COLOURS[0], linewidth=1, alpha=0.7, zorder=2)
        if nearest is not None:
            axes.scatter(*places[nearest], s=190, facecolor="none", edgecolor=METHOD_COLOURS[1], linewidths=1.6)
        axes.margins(0.12)
        axes.set_xlabel(f"{titles[across]}  →")
        axes.set_ylabel(f"{titles[up]}  →")
    return figure

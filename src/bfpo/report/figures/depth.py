"""Curves of depth: rates of begun answers by the number of given tokens, KL to the start by position."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from matplotlib.figure import Figure

from bfpo.plots.style import MARKERS, METHOD_COLOURS, MUTED, START_COLOUR, figure_style, short_name
from bfpo.suites.depth_tables import METRICS
from bfpo.suites.records import DepthFile, PrefillScore

__all__ = ["depth_figures"]


def depth_figures(depth: DepthFile, *, width: float = 7.4, height: float = 3.2) -> Iterator[tuple[str, Figure]]:
    """Yield titles and figures: for each suite the harmless rate, or where no judge reads it the declined rate, by the
    number of given tokens; for each group of answers the KL by position; inches.
    """
    for suite in depth.prefilled or ():
        own = [one for one in depth.scores or () if one.suite == suite.suite and one.value is not None]
        metric = next((name for name in ("harmless", "recovered") if any(one.metric == name for one in own)), None)
        if metric is not None:
            title = f"{suite.title or suite.suite}: {METRICS[metric]}, by given tokens"
            yield title, _rates(depth, own, metric, width, height)
    for group in dict.fromkeys(one.group for one in depth.divergence or ()):
        yield f"KL to {depth.start}, nats per token: {group}", _kl(depth, group, width, height)


def _rates(depth: DepthFile, scores: list[PrefillScore], metric: str, width: float, height: float) -> Figure:
    counts = sorted({one.tokens for one in scores if one.metric == metric})
    models = list(dict.fromkeys(one.model for one in scores))
    with figure_style(f"prefill-{metric}"):
        figure, axes = _axes(width, height)
        for place, model in enumerate(models):
            points = [one for one in scores if (one.model, one.metric) == (model, metric)]
            x = [counts.index(one.tokens) + 0.06 * (place - (len(models) - 1) / 2) for one in points]
            y = [one.value or 0.0 for one in points]
            ends = [
                [value - (one.low if one.low is not None else value) for value, one in zip(y, points, strict=True)],
                [(one.high if one.high is not None else value) - value for value, one in zip(y, points, strict=True)],
            ]
            style: dict[str, Any] = {"color": _colour(depth, models, model), "marker": MARKERS[place % len(MARKERS)]}
            axes.errorbar(x, y, yerr=ends, linewidth=1.6, markersize=5, capsize=2, label=short_name(model), **style)
        alone = models[:1] if depth.assist is None else []  # with it the given tokens differ from model to model
        given = [
            one for one in scores if metric == "harmless" and one.metric == "harmless_given" and one.model in alone
        ]
        if given:
            axes.plot(
                [counts.index(one.tokens) for one in given],
                [one.value or 0.0 for one in given],
                color=MUTED,
                linewidth=1.2,
                linestyle=(0, (4, 2.5)),
                label=METRICS["harmless_given"],
            )
        axes.set_xticks(range(len(counts)), [str(count) for count in counts])
        axes.set_ylim(-0.03, 1.03)
        axes.set_xlabel("given tokens", fontsize=9)
        axes.legend(fontsize=9, frameon=False)
    return figure


def _kl(depth: DepthFile, group: str, width: float, height: float) -> Figure:
    with figure_style(f"kl-{group}"):
        figure, axes = _axes(width, height)
        models = list(dict.fromkeys(one.model for one in depth.divergence or ()))
        for one in depth.divergence or ():
            if one.group != group:
                continue
            colour = _colour(depth, models, one.model)
            x = [point.first for point in one.points]
            axes.plot(
                x, [point.value for point in one.points], color=colour, linewidth=1.6, label=short_name(one.model)
            )
            known = [point for point in one.points if point.low is not None and point.high is not None]
            bounds = [point.low for point in known], [point.high for point in known]
            axes.fill_between([point.first for point in known], *bounds, color=colour, alpha=0.18, linewidth=0)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("token of the answer", fontsize=9)
        axes.legend(fontsize=9, frameon=False)
    return figure


def _axes(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), dpi=100)
    return figure, figure.add_axes((0.52 / width, 0.42 / height, 1 - 0.62 / width, 1 - 0.52 / height))


def _colour(depth: DepthFile, models: list[str], model: str) -> str:
    if model == depth.start:
        return START_COLOUR
    return METHOD_COLOURS[[one for one in models if one != depth.start].index(model) % len(METHOD_COLOURS)]

"""Training curves: the margin of each label cell, the loss, and the drift of the log-probs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bfpo.data.labels import CELLS
from bfpo.plots.style import CELL_COLOURS, METHOD_COLOURS, MUTED, figure_style, short_name
from bfpo.report.data import MethodResult, ReportData
from bfpo.report.figures.marks import colour_of
from bfpo.report.wording import cell_title

__all__ = ["curve_figure", "drift_figure", "has_curves", "loss_figure", "margin_figure", "training_figure"]


def has_curves(method: MethodResult) -> bool:
    """Return whether there is a training log with margins in it."""
    return any(_curve(method, f"main/{cell}/beta_margin")[0].size > 0 for cell in CELLS)


def margin_figure(method: MethodResult, *, width: float = 3.5, height: float = 2.5) -> Figure:
    """Return `beta * margin` of each cell of the main stream over the steps, each cell's target dashed."""
    with figure_style(f"margin-{method.name}"):
        figure = Figure(figsize=(width, height), dpi=100)
        _draw_margins(_panel(figure, width, height), method)
    return figure


def loss_figure(data: ReportData, *, width: float = 3.5, height: float = 2.5) -> Figure:
    """Return each method's normalised loss divided by the loss at step 0."""
    with figure_style("loss"):
        figure = Figure(figsize=(width, height), dpi=100)
        _draw_losses(_panel(figure, width, height), data)
    return figure


def drift_figure(data: ReportData, *, width: float = 3.5, height: float = 2.5) -> Figure:
    """Return the mean change of the favoured completion's log-prob per token since the start, in nats, by method."""
    with figure_style("drift"):
        figure = Figure(figsize=(width, height), dpi=100)
        _draw_drifts(_panel(figure, width, height), data)
    return figure


def curve_figure(
    curves: Mapping[str, Sequence[tuple[float, ...]]],
    *,
    width: float = 7.4,
    height: float = 2.9,
    shares: bool = False,
) -> Figure:
    """Return curves over the steps by title, the later ones with markers, intervals of points that have one as bars.

    Of `shares` the axis goes from 0 to 1.
    """
    with figure_style("curves"):
        figure = Figure(figsize=(width, height), dpi=100)
        axes = _panel(figure, width, height)
        for place, (title, points) in enumerate(curves.items()):
            steps, values, *ends = (np.array(column, dtype=np.float64) for column in zip(*points, strict=True))
            colour = METHOD_COLOURS[place % len(METHOD_COLOURS)]
            if ends:
                axes.vlines(steps, *ends, color=colour, linewidth=1.0, alpha=0.6)
            if place:
                axes.plot(steps, values, "o-", color=colour, linewidth=1.2, markersize=3.5, zorder=5, label=title)
            else:
                _line(axes, steps, values, colour, 1.8, title)
        if shares:
            axes.set_ylim(-0.03, 1.03)
        axes.legend(fontsize=9, frameon=False)
        axes.set_xlabel("optimizer step", fontsize=9)
    return figure


def training_figure(data: ReportData) -> Figure | None:
    """Return all training panels in one figure with titles and legends; `None` if no method has a log."""
    trained = [method for method in data.methods if has_curves(method)]
    if not trained:
        return None
    panels = len(trained) + 2
    columns = min(3, panels)
    rows = -(-panels // columns)
    with figure_style("training"):
        figure = Figure(figsize=(3.6 * columns, 2.7 * rows + 0.6), dpi=100, layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, method in zip(grid, trained, strict=False):
            _draw_margins(axes, method)
            axes.set_title(f"{short_name(method.title)}: β · margin", fontsize=10, loc="left")
        _draw_losses(grid[len(trained)], data)
        grid[len(trained)].set_title("loss / its value at step 0", fontsize=10, loc="left")
        _draw_drifts(grid[len(trained) + 1], data)
        grid[len(trained) + 1].set_title("log-prob drift of the favoured, nats/token", fontsize=10, loc="left")
        for axes in grid[panels:]:
            axes.set_visible(False)
        if grid[len(trained)].get_legend_handles_labels()[1]:
            grid[len(trained)].legend(fontsize=7, frameon=False)
        handles = [Line2D([], [], color=CELL_COLOURS[cell], linewidth=2, label=cell_title(cell)) for cell in CELLS]
        figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    return figure


def _panel(figure: Figure, width: float, height: float) -> Any:
    return figure.add_axes((0.52 / width, 0.42 / height, 1 - 0.62 / width, 1 - 0.52 / height))


def _draw_margins(axes: Any, method: MethodResult) -> None:
    targets = []
    for cell in CELLS:
        colour = CELL_COLOURS[cell]
        steps, values = _curve(method, f"main/{cell}/beta_margin")
        _line(axes, steps, values, colour, 1.8)
        _, target = _curve(method, f"main/{cell}/target")
        if target.size:
            axes.axhline(float(target[-1]), color=colour, linewidth=1.1, linestyle=(0, (4, 2.5)), zorder=2)
            targets.append(float(target[-1]))
    axes.axhline(0, color=MUTED, linewidth=0.8, zorder=1)
    if targets:
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, min(targets) - 0.2), max(high, max(targets) + 0.2))
    axes.set_xlabel("optimizer step", fontsize=9)


def _draw_losses(axes: Any, data: ReportData) -> None:
    for method in data.methods:
        steps, loss = _curve(method, "main/normalised_loss")
        start_steps, start = _curve(method, "main/loss_at_start")
        both, left, right = np.intersect1d(steps, start_steps, return_indices=True)
        if both.size:
            ratio = loss[left] / np.maximum(start[right], 1e-12)
            width = 2.0 if method.role == "main" else 1.4
            _line(axes, both, ratio, colour_of(data, method), width, short_name(method.title))
    axes.axhline(1, color=MUTED, linewidth=0.9, linestyle=(0, (4, 2.5)), zorder=1)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("optimizer step", fontsize=9)


def _draw_drifts(axes: Any, data: ReportData) -> None:
    for method in data.methods:
        steps, drift = _curve(method, "main/favoured_drift_per_token")
        if steps.size:
            width = 2.0 if method.role == "main" else 1.4
            _line(axes, steps, drift, colour_of(data, method), width, short_name(method.title))
    axes.axhline(0, color=MUTED, linewidth=0.8, zorder=1)
    axes.set_xlabel("optimizer step", fontsize=9)


def _line(axes: Any, steps: Any, values: Any, colour: str, width: float, label: str | None = None) -> None:
    """Draw a curve: the raw values in pale, and their moving average if there are enough points."""
    if steps.size == 0:
        return
    window = max(1, steps.size // 12)
    if window > 1:
        axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.3, zorder=3)
        # At the ends the average is over the available points.
        weights = np.convolve(np.ones_like(values), np.ones(window), mode="same")
        values = np.convolve(values, np.ones(window), mode="same") / weights
    axes.plot(steps, values, color=colour, linewidth=width, zorder=4, label=label)


def _curve(method: MethodResult, key: str) -> tuple[Any, Any]:
    """Return the steps and values of one metric; rows without a finite value are skipped."""
    found = [
        (float(row["step"]), float(row[key]))
        for row in method.curves
        if isinstance(row.get("step"), (int, float)) and isinstance(row.get(key), (int, float))
    ]
    array = np.array([pair for pair in found if np.isfinite(pair).all()], dtype=np.float64).reshape(-1, 2)
    return array[:, 0], array[:, 1]

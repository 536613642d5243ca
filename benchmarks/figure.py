"""The figure of `docs/performance.md`: speed and memory of whole loops, and how a step grows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from benchmarks.summary import Arm, Spread, point_spread, spread, throughput_arms
from benchmarks.tables import peak_mib, scaling_points, seconds_per_step
from bfpo.plots.style import INK, METHOD_COLOURS, MUTED, figure_style

__all__ = ["performance_figure"]

SALT = "performance"
OURS, THEIRS = METHOD_COLOURS[0], METHOD_COLOURS[1]
AXES = {"length": "tokens a row", "pairs": "pairs a step", "vocabulary": "vocabulary"}


def performance_figure(throughput: dict[str, Any] | None, scaling: dict[str, Any] | None) -> Figure | None:
    """Return bars of the largest model's loops above curves of a step by size; `None` where neither was measured."""
    arms = [] if throughput is None else throughput_arms(throughput["runs"])
    arms = [arm for arm in arms if arm.model == arms[0].model]
    rows = [bool(arms), scaling is not None]
    if not any(rows):
        return None
    with figure_style(SALT):
        heights = [0.62 + 0.23 * len(arms) if arms else 0.0, 4.5 if scaling else 0.0]
        figure = Figure(figsize=(8.6, sum(heights) + 0.5), dpi=100, layout="constrained")
        parts = figure.subfigures(sum(rows), 1, height_ratios=[h for h in heights if h], squeeze=False)[:, 0]
        if arms:
            _draw_loops(parts[0], arms)
        if scaling is not None:
            _draw_scaling(parts[-1], scaling["runs"])
    return figure


def _draw_loops(part: Any, arms: Sequence[Arm]) -> None:
    left, right = part.subplots(1, 2, sharey=True)
    peaks = [arm.peaks() for arm in arms]
    _draw_bars(left, arms, [spread(arm.tokens_per_second()) for arm in arms])
    _draw_bars(right, arms, [None if peak is None else spread(p / 2**20 for p in peak) for peak in peaks])
    left.set_title(f"model {arms[0].model}: tokens per CPU-second", loc="left", fontsize=10)
    right.set_title("peak memory above the model, MiB", loc="left", fontsize=10)
    left.set_yticks(range(len(arms)), [f"{arm.title} ({arm.reference})" for arm in arms])
    left.invert_yaxis()


def _draw_bars(axes: Any, arms: Sequence[Arm], values: Sequence[Spread | None]) -> None:
    most = max((value.high for value in values if value is not None), default=1.0)
    for place, (arm, value) in enumerate(zip(arms, values, strict=True)):
        if value is None:
            axes.text(0, place, "unknown", va="center", color=MUTED)
            continue
        axes.barh(place, value.median, height=0.66, color=OURS if arm.trainer == "bfpo" else THEIRS)
        axes.hlines(place, value.low, value.high, color=INK, linewidth=1.2)
        axes.text(value.high + 0.02 * most, place, f"{value.median:,.0f}", va="center", fontsize=9, color=INK)
    axes.set_xlim(0, 1.18 * most)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)


def _draw_scaling(part: Any, runs: Sequence[dict[str, Any]]) -> None:
    grid = part.subplots(2, 3, sharey="row")
    points = scaling_points(runs)
    centre = {name: _most_common([point[name] for point in points]) for name in AXES}
    values: list[tuple[str, Callable[[dict[str, Any]], float | None]]] = [
        ("CPU-seconds a step", seconds_per_step),
        ("peak above the model, MiB", peak_mib),
    ]
    for axes_row, (label, value) in zip(grid, values, strict=True):
        axes_row[0].set_ylabel(label)
        for axes, name in zip(axes_row, AXES, strict=True):
            shown = [point for point in points if all(point[n] == centre[n] for n in AXES if n != name)]
            for trainer, colour, marker, title in (("bfpo", OURS, "o", "bfpo"), ("trl", THEIRS, "s", "TRL")):
                found = [(point[name], point_spread(runs, point, trainer, value)) for point in shown]
                known = [(x, y.median) for x, y in found if y is not None]
                if known:
                    axes.plot(*zip(*known, strict=True), color=colour, marker=marker, markersize=5, label=title)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks([point[name] for point in shown], [_short(point[name]) for point in shown])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda number, _place: f"{number:g}"))
            axes.set_xlabel(AXES[name])
    grid[0, 0].legend(frameon=False, fontsize=9)


def _most_common(values: Sequence[int]) -> int:
    return max(sorted(set(values)), key=values.count)


def _short(number: int) -> str:
    return f"{number / 1000:.0f}k" if number >= 4000 else str(number)

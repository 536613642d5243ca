"""Funnel from prompts to pairs: the counts after each step, and the pairs per label cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from bfpo.plots.style import CELL_COLOURS, INK, METHOD_COLOURS, MUTED, figure_style

__all__ = ["funnel_figure"]


def funnel_figure(
    steps: Sequence[tuple[str, int]], cells: Mapping[str, int], *, width: float = 6.8, height: float = 3.9
) -> Figure:
    """Return bars for the steps, first on top, and for the label cells (chosen-rejected); sizes in inches."""
    with figure_style("funnel"):
        figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
        upper, lower = figure.subplots(2, 1, height_ratios=(len(steps), len(cells)))
        colours = [METHOD_COLOURS[1] if name == "unsafe" else METHOD_COLOURS[0] for name, _ in steps]
        names = [name.replace("_", " ") for name, _ in steps]
        for axes, labels, counts, shades in (
            (upper, names, [count for _, count in steps], colours),
            (lower, list(cells), list(cells.values()), [CELL_COLOURS[cell] for cell in cells]),
        ):
            bars = axes.barh(range(len(labels)), counts, color=shades, height=0.72)
            axes.bar_label(bars, [f"{count:,}" for count in counts], padding=4, color=INK, fontsize=9)
            axes.set_yticks(range(len(labels)), labels)
            axes.invert_yaxis()
            axes.set_xlim(0, max([*counts, 1]) * 1.12)
            axes.tick_params(axis="y", length=0)
            axes.grid(visible=False)
            axes.spines["left"].set_visible(False)
            axes.set_xticks([])
            axes.spines["bottom"].set_visible(False)
        lower.set_title("pairs by label cell (chosen-rejected)", color=MUTED, fontsize=9, loc="left")
    return figure

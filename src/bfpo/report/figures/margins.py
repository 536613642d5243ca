"""Margins against targets: how `beta * margin` spreads over the held-out pairs of each label cell."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from bfpo.data.labels import CELLS
from bfpo.plots.style import CELL_COLOURS, INK, MUTED, figure_style
from bfpo.report.data import MethodResult

__all__ = ["spread_figure"]


def spread_figure(method: MethodResult, *, width: float = 4.6, height: float = 2.9) -> Figure:
    """Return one ridge per cell: the histogram, quartiles and median as a bar, the cell's target dashed; inches."""
    cells = [cell for cell in CELLS if any(spread.cell == cell for spread in method.margins)]
    with figure_style(f"spread-{method.name}"):
        figure = Figure(figsize=(width, height), dpi=100)
        axes = figure.add_axes((1.45 / width, 0.42 / height, 1 - 1.55 / width, 1 - 0.5 / height))
        for place, cell in enumerate(reversed(cells)):
            spread = next(found for found in method.margins if found.cell == cell)
            edges = np.linspace(spread.low, spread.high, len(spread.counts) + 1)
            heights = 0.72 * np.array(spread.counts) / max(1, *spread.counts)
            axes.stairs(place + heights, edges, baseline=place, fill=True, color=CELL_COLOURS[cell], alpha=0.55)
            axes.plot([spread.quantiles["p25"], spread.quantiles["p75"]], [place - 0.07] * 2, color=INK, linewidth=2.2)
            axes.plot([spread.quantiles["p50"]], [place - 0.07], "o", color=INK, markersize=4)
            if spread.target is not None:
                axes.plot(
                    [spread.target] * 2, [place - 0.14, place + 0.8], color=CELL_COLOURS[cell], linewidth=1.8,
                    linestyle=(0, (4, 2.5)),
                )  # fmt: skip
        axes.axvline(0, color=MUTED, linewidth=0.8, zorder=1)
        axes.set_yticks(range(len(cells)), [cell.replace("-", " over ") for cell in reversed(cells)])
        axes.set_ylim(-0.25, len(cells) - 0.1)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("β · margin on held-out pairs", fontsize=9)
    return figure

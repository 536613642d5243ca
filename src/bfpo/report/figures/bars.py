"""Bar figures: over-refusal and harm of each method, and the margins of one method by cell."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bfpo.core.schema import Score
from bfpo.data.labels import CELLS
from bfpo.plots.style import CELL_COLOURS, INK, MUTED, figure_style
from bfpo.report.data import MethodResult, ReportData
from bfpo.report.figures.marks import colour_of
from bfpo.report.wording import cell_title

__all__ = ["refusal_figure", "spread_figure"]

_LINE, _NAME_SIZE = 20, 9  # characters, points


def harm_score(method: MethodResult) -> Score | None:
    """Return the share of answers to harmful prompts that are unsafe, with its interval; `None` if not measured."""
    score = method.score("harmless_harmful")
    if score is None or score.value is None or "harmless_harmful" not in {s.metric for s in method.scores}:
        return None
    low, high = (None if bound is None else 1 - bound for bound in (score.high, score.low))
    return Score("harm", 1 - score.value, low, high, score.num, score.unscored, higher_is_better=False)


def refusal_score(method: MethodResult) -> Score | None:
    """Return over-refusal on borderline prompts, else on benign ones, else the first of a suite; `None` without any."""
    for metric in ("over_refusal_borderline", "over_refusal_benign"):
        if (score := method.score(metric)) is not None:
            return score
    found = (s for scores in method.suite_scores.values() for s in scores if s.metric.startswith("over_refusal"))
    return next((score for score in found if score.value is not None), None)


def refusal_figure(data: ReportData, *, width: float = 7.4) -> Figure | None:
    """Return a row for each method: over-refusal to the left of the middle line, harm to the right; inches.

    `None` if no method has both.
    """
    shown = [m for m in data.methods if refusal_score(m) is not None and harm_score(m) is not None]
    if not shown:
        return None
    height = 0.85 + 0.34 * len(shown)
    with figure_style("refusal"):
        figure = Figure(figsize=(width, height), dpi=100)
        names = [_short(method.title) for method in reversed(shown)]
        left = min(_width(figure, names) + 0.2, 0.45 * width)
        axes = figure.add_axes((left / width, 0.5 / height, 1 - (left + 0.2) / width, 1 - 0.85 / height))
        for place, method in enumerate(reversed(shown)):
            for score, sign in ((refusal_score(method), -1), (harm_score(method), 1)):
                assert score is not None
                assert score.value is not None
                colour = colour_of(data, method)
                axes.barh(place, sign * score.value, height=0.56, color=colour, alpha=0.6)
                if score.low is not None and score.high is not None:
                    axes.plot([sign * score.low, sign * score.high], [place] * 2, color=INK, linewidth=1.1)
        reach = max(0.1, *(abs(bound) for bound in axes.get_xlim()))
        axes.set_xlim(-reach, reach)
        axes.axvline(0, color=MUTED, linewidth=0.9)
        axes.set_yticks(range(len(shown)), names, fontsize=_NAME_SIZE, linespacing=0.95)
        axes.xaxis.set_major_formatter(lambda value, _: f"{round(100 * abs(value), 6):g}%")  # 2.5% too
        axes.grid(visible=False, axis="y")
        # The titles are aligned away from the middle so that they cannot overlap.
        for x, title, side in ((0.48, "←  over-refusal", "right"), (0.52, "harm  →", "left")):
            axes.text(x, 1.02, title, transform=axes.transAxes, ha=side, va="bottom", fontsize=9.5, color=MUTED)
    return figure


def _short(title: str) -> str:
    """Return a title cut to at most two short lines; the table has the full one."""
    return "\n".join(textwrap.wrap(title, _LINE, max_lines=2, placeholder=" …", break_on_hyphens=False))


def _width(figure: Figure, names: Sequence[str]) -> float:
    """Return the width of the widest name, inches."""
    renderer = FigureCanvasAgg(figure).get_renderer()  # type: ignore[no-untyped-call]
    texts = [figure.text(0, 0, name, fontsize=_NAME_SIZE) for name in names]
    widest = max(text.get_window_extent(renderer).width for text in texts)
    for text in texts:
        text.remove()
    return float(widest / figure.dpi)


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
        axes.set_yticks(range(len(cells)), [cell_title(cell) for cell in reversed(cells)])
        axes.set_ylim(-0.25, len(cells) - 0.1)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("β · margin", fontsize=9)
    return figure

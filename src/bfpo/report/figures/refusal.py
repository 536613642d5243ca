"""Over-refusal beside harm: two shares that a model lowers at each other's cost."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bfpo.core.schema import Score
from bfpo.plots.style import INK, MUTED, colour_of, figure_style
from bfpo.report.data import MethodResult, ReportData

__all__ = ["harm_score", "refusal_figure", "refusal_score"]

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

    `None` where no method has both.
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
        axes.xaxis.set_major_formatter(lambda value, _: f"{abs(value):.0%}")
        axes.grid(visible=False, axis="y")
        # Each title is written away from the middle, so that they cannot meet; what is harm is in the text above.
        for x, title, side in ((0.48, "←  over-refusal", "right"), (0.52, "harm  →", "left")):
            axes.text(x, 1.02, title, transform=axes.transAxes, ha=side, va="bottom", fontsize=9.5, color=MUTED)
    return figure


def _short(title: str) -> str:
    """Return a title on at most two short lines; what is longer is cut, as the table has it whole."""
    return "\n".join(textwrap.wrap(title, _LINE, max_lines=2, placeholder=" …", break_on_hyphens=False))


def _width(figure: Figure, names: Sequence[str]) -> float:
    """Return how wide the widest name is written, inches."""
    renderer = FigureCanvasAgg(figure).get_renderer()  # type: ignore[no-untyped-call]
    texts = [figure.text(0, 0, name, fontsize=_NAME_SIZE) for name in names]
    widest = max(text.get_window_extent(renderer).width for text in texts)
    for text in texts:
        text.remove()
    return float(widest / figure.dpi)

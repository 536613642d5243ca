"""How a judge's probabilities compare with what people say."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from bfpo.judges.quality import CalibrationBin
from bfpo.plots.style import INK, METHOD_COLOURS, MUTED, figure_style

__all__ = ["calibration_figure"]


def calibration_figure(
    bins: Sequence[CalibrationBin], *, judge: str, confidence: float, width: float = 5.2, height: float = 5.6
) -> Figure:
    """Return p(safe) against the share that people call safe, with intervals, above the number of texts; inches."""
    colour = METHOD_COLOURS[0]
    with figure_style("calibration"):
        figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        upper.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        for one in bins:
            upper.vlines(one.mean_p_safe, one.share_low, one.share_high, color=colour, linewidth=1.4, alpha=0.6)
        upper.plot([b.mean_p_safe for b in bins], [b.share_safe for b in bins], "o", color=colour, markersize=6)
        upper.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
        upper.set_ylabel("share that people call safe")
        upper.set_title(f"{judge}: calibration ({confidence:.0%} intervals)", color=INK, fontsize=11, loc="left")
        lower.bar([(b.low + b.high) / 2 for b in bins], [b.num for b in bins], width=0.088, color=colour, alpha=0.75)
        lower.set_ylabel("texts")
        lower.set_xlabel("p(safe) of the judge")
    return figure

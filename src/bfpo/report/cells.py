"""One number as a page shows it: text, interval, and where its dot lies on a bar."""

from __future__ import annotations

from dataclasses import dataclass

from bfpo.core.schema import Score
from bfpo.report.wording import percent

__all__ = ["Cell", "cell_of"]


@dataclass(frozen=True, slots=True)
class Cell:
    """One number of a table: text, and where its dot and its interval lie on a bar, in per cent of the bar."""

    value: str = ""
    interval: str = ""
    left: float = 0.0
    width: float = 0.0
    at: float = 0.0
    best: bool = False
    missing: bool = False
    unscored: int = 0

    @property
    def markdown(self) -> str:
        """Return the cell for a Markdown table."""
        if self.missing:
            return "not measured"
        value = f"**{self.value}**" if self.best else self.value
        return f"{value} [{self.interval}]" if self.interval else value


def cell_of(score: Score | None, best: bool = False) -> Cell:
    """Return a share as a cell; without a value it is missing."""
    if score is None or score.value is None:
        return Cell(missing=True, unscored=0 if score is None else score.unscored)
    low, high = (score.value if bound is None else bound for bound in (score.low, score.high))
    interval = "no interval" if score.low is None or score.high is None else f"{100 * low:.1f} to {100 * high:.1f}"
    return Cell(
        value=percent(score.value, 1),
        interval=interval,
        left=round(100 * low, 2),
        width=round(100 * (high - low), 2),
        at=round(100 * score.value, 2),
        best=best,
        unscored=score.unscored,
    )

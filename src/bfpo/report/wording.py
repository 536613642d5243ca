"""Numbers and names as text: shares, differences in points, intervals, lists of names, label cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bfpo.core.console import in_words
from bfpo.core.schema import Score
from bfpo.scores.categories import spread_over, worst_category

__all__ = [
    "Cell",
    "cell_of",
    "cell_title",
    "count_text",
    "duration",
    "interval_text",
    "listed",
    "number",
    "percent",
    "points",
    "points_interval",
    "with_interval",
    "worst_words",
]


def percent(value: float, decimals: int = 0) -> str:
    """Return a share in [0, 1] in per cent; only exact values become 0 and 100."""
    step = 10.0**-decimals
    rounded = round(100 * value, decimals)
    if rounded == 0 and value > 0:
        return f"<{step:.{decimals}f}%"
    if rounded == 100 and value < 1:
        return f">{100 - step:.{decimals}f}%"
    return f"{rounded:.{decimals}f}%"


def count_text(value: Any) -> str:
    """Return a count with separators; a value of another kind, from a damaged file, in words."""
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else in_words(value)


def number(value: float) -> str:
    """Return a number to four digits, with a true minus."""
    return f"{value:.4g}".replace("-", "−")


def duration(seconds: float) -> str:
    """Return a time in seconds, minutes or hours."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    large, small = (f"{minutes} min", f"{rest} s") if minutes < 60 else (f"{minutes // 60} h", f"{minutes % 60} min")
    return large if small.startswith("0 ") else f"{large} {small}"


def interval_text(score: Score, *, in_percent: bool = False) -> str:
    """Return the bounds of a score, as shares or in per cent."""
    if score.low is None or score.high is None:
        return "no interval"
    if in_percent:
        return f"{100 * score.low:.1f} to {100 * score.high:.1f}"
    return f"{score.low:.3f} to {score.high:.3f}"


def points(value: float) -> str:
    """Return a difference of shares in percentage points, with its sign (a true minus)."""
    rounded = round(100 * value, 1)
    return f"{'+' if rounded > 0 else '−' if rounded < 0 else ''}{abs(rounded):.1f}"


def points_interval(low: float | None, high: float | None) -> str:
    """Return the interval of a difference in percentage points."""
    return "no interval" if low is None or high is None else f"{points(low)} to {points(high)}"


def with_interval(score: Score, decimals: int = 0) -> str:
    """Return the value with its interval in words, such as `64% (59% to 69%)`."""
    assert score.value is not None
    if score.low is None or score.high is None:
        return f"{percent(score.value, decimals)} (no interval)"
    low, high = percent(score.low, decimals), percent(score.high, decimals)
    return f"{percent(score.value, decimals)} ({low} to {high})"


def listed(names: Sequence[str]) -> str:
    """Return names as a list in a sentence, such as `A, B and C`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def cell_title(cell: str) -> str:
    """Return a label cell's name in words: chosen (more helpful) over rejected."""
    return cell.replace("-", " over ")


@dataclass(frozen=True, slots=True)
class Cell:
    """One number of a table: text, and the positions of its dot and interval on a bar, in per cent of the bar."""

    value: str = ""
    interval: str = ""
    left: float = 0.0
    width: float = 0.0
    at: float = 0.0
    best: bool = False
    missing: bool = False
    unscored: int = 0
    ties: int = 0
    aside: str = ""

    @property
    def markdown(self) -> str:
        """Return the cell for a Markdown table."""
        if self.missing:
            return "not measured"
        value = f"**{self.value}**" if self.best else self.value
        ties = f", {self.ties} ties" if self.ties else ""
        return f"{value} [{self.interval}]{ties}" if self.interval else f"{value}{ties}"


def worst_words(score: Score, seeds: Sequence[float | None] = ()) -> str:
    """Return the worst category of a score and the spread over categories and seeds in words; empty without them."""
    worst, parts = worst_category(score), []
    if worst is not None and worst[1].value is not None and score.by_category is not None:
        spread = spread_over(one.value for one in score.by_category.values()) or 0.0
        parts.append(f"worst category {worst[0]} {percent(worst[1].value, 1)}, spread {100 * spread:.1f}")
    if (over_seeds := spread_over(seeds)) is not None:
        parts.append(f"spread of seeds {100 * over_seeds:.1f}")
    return "; ".join(parts)


def cell_of(score: Score | None, best: bool = False, seeds: Sequence[float | None] = ()) -> Cell:
    """Return a share as a cell; `missing` without a value. `seeds`: its values of single trainings."""
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
        ties=int(score.extra.get("num_ties", 0)),
        aside=worst_words(score, seeds),
    )

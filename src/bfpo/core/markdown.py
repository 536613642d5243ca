"""Tables of Markdown, for cards and for the `.md` files beside results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bfpo.core.schema import Score

__all__ = ["score_cells", "table"]


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Return the lines of a table; in a cell, a bar is escaped and a line break becomes a space."""
    return [_row(heads), "|---" * len(heads) + "|", *map(_row, rows)]


def _row(cells: Sequence[object]) -> str:
    texts = (" ".join(str(cell).split()).replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(texts)} |"


def score_cells(score: Score) -> tuple[str, str, str, str]:
    """Return value, interval, number of scored and of unscored items as cells of a table."""
    value = "not measured" if score.value is None else f"{score.value:.3f}"
    interval = "" if score.low is None or score.high is None else f"{score.low:.3f} to {score.high:.3f}"
    return value, interval, str(score.num), str(score.unscored)

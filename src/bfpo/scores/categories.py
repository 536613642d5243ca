"""Scores by category of prompts: the worst category and the spread, beside the mean that hides them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bfpo.core.markdown import table
from bfpo.core.schema import CategoryScore, Score
from bfpo.stats import rate_interval

__all__ = ["CATEGORY_NOTE", "category_table", "score_categories", "spread_over", "worst_category"]

CATEGORY_NOTE = (
    "Worst category of each metric, and the spread: the best category minus the worst, as measured. Intervals of "
    "categories hold for all categories of a metric together. With few prompts a category is also worst by chance."
)


def score_categories(
    items: Iterable[tuple[str, float | None, str, int]], *, confidence: float
) -> dict[str, CategoryScore] | None:
    """Return the score of each category from (category, value in [0, 1], prompt, seed) of every answer.

    Answers without a category are left out, those without a value are unscored. `None` if there are fewer than two
    categories, or fewer than two prompts for each on average: then they group nothing. The intervals are clustered by
    prompt and seed and, by Bonferroni's correction over the categories, hold together, also for the worst one.
    """
    found: dict[str, list[tuple[float | None, str, int]]] = {}
    for category, value, prompt, seed in items:
        if category:
            found.setdefault(category, []).append((value, prompt, seed))
    num_prompts = len({prompt for rows in found.values() for _, prompt, _ in rows})
    if len(found) < 2 or num_prompts < 2 * len(found):
        return None
    scores = {}
    for category in sorted(found):
        valued = [(value, prompt, seed) for value, prompt, seed in found[category] if value is not None]
        each = rate_interval(
            [value for value, _, _ in valued],
            [prompt for _, prompt, _ in valued],
            seeds=[seed for _, _, seed in valued],
            confidence=1 - (1 - confidence) / len(found),
        )
        scores[category] = CategoryScore(each.value, each.low, each.high, each.num, len(found[category]) - each.num)
    return scores


def worst_category(score: Score) -> tuple[str, CategoryScore] | None:
    """Return the measured category with the worst value (the first of equal ones); `None` if fewer than two are."""
    known = [(name, one) for name, one in (score.by_category or {}).items() if one.value is not None]
    sign = 1 if score.higher_is_better else -1
    return min(known, key=lambda item: sign * (item[1].value or 0.0)) if len(known) > 1 else None


def spread_over(values: Iterable[float | None]) -> float | None:
    """Return the largest minus the smallest of the measured values; `None` if fewer than two are measured."""
    known = [value for value in values if value is not None]
    return max(known) - min(known) if len(known) > 1 else None


def category_table(scores: Iterable[tuple[Sequence[str], Score]], heads: Sequence[str]) -> list[str]:
    """Return a Markdown table of the worst categories, after a blank line; empty if no score has categories.

    `scores`: each with the cells under `heads` that name it.
    """
    rows = [[*names, *cells] for names, score in scores if (cells := _cells(score)) is not None]
    if not rows:
        return []
    titles = [*heads, "worst category", "value", "interval", "scored", "unscored", "spread", "categories"]
    return ["", CATEGORY_NOTE, "", *table(titles, rows)]


def _cells(score: Score) -> Sequence[str] | None:
    worst = worst_category(score)
    if worst is None or score.by_category is None:
        return None
    name, one = worst
    spread = spread_over(each.value for each in score.by_category.values())
    measured = sum(each.value is not None for each in score.by_category.values())
    interval = "" if one.low is None or one.high is None else f"{one.low:.3f} to {one.high:.3f}"
    count = f"{measured}" if measured == len(score.by_category) else f"{measured} of {len(score.by_category)}"
    return [name, f"{one.value:.3f}", interval, str(one.num), str(one.unscored), f"{spread:.3f}", count]

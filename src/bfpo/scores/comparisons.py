"""Pairwise comparisons of models on the same prompts, with p-values corrected for the number of comparisons."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from bfpo.scores.records import ModelComparison, PairedDifference
from bfpo.scores.scores import Judged, PairedValues, pair_values
from bfpo.stats import holm, paired_difference, paired_test

__all__ = ["compare_pairs", "indistinguishable_from", "is_distinguishable", "paired_row", "with_holm"]


Row = TypeVar("Row", bound=PairedDifference)


def compare_pairs(
    judged: Mapping[str, Sequence[Judged]],
    pairs: Iterable[tuple[str, str]],
    metrics: Sequence[str],
    *,
    confidence: float = 0.95,
) -> list[ModelComparison]:
    """Return first - second of each metric for each pair of names; all rows form one family.

    `low` and `high` are for the single difference, over prompts and, if there are several, seeds. `p_value` is from
    McNemar's test or sign flips, both exact; the answers to a prompt flip together, so it generalizes to other prompts
    but not to other trainings. `p_holm` is corrected over all returned rows. If `pairs` contains every pair of models,
    `p_holm` also holds for a pair chosen after seeing the results. Raises `SettingError` for an unknown metric.
    """
    rows: list[ModelComparison] = []
    for first, second in pairs:
        for metric in metrics:
            paired = pair_values(judged[first], judged[second], metric)
            row = ModelComparison(metric, first, second)
            rows.append(paired_row(row, paired, confidence=confidence))
    return with_holm(rows)


def paired_row(row: Row, paired: PairedValues, *, confidence: float) -> Row:
    """Return a row of a comparison with the paired difference, its interval and the test filled in."""
    difference = paired_difference(
        paired.first,
        paired.second,
        paired.prompts,
        seeds=paired.seeds,
        confidence=confidence,
    )
    test = paired_test(paired.first, paired.second, paired.prompts)
    return replace(
        row,
        difference=difference.value,
        low=difference.low,
        high=difference.high,
        num=difference.num,
        num_prompts=len(set(paired.prompts)),
        test=test.test,
        p_value=test.p_value,
    )


def with_holm(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with `p_holm`, corrected over all of them."""
    corrected = holm([row.p_value for row in rows])
    return [replace(row, p_holm=p_holm) for row, p_holm in zip(rows, corrected, strict=True)]


def is_distinguishable(row: ModelComparison, confidence: float) -> bool:
    """Return whether two models differ: `p_holm` is at most 1 - confidence, and the interval excludes 0.

    Both are needed, since only the interval includes the variation between seeds.
    """
    if row.p_holm is None or row.low is None or row.high is None:
        return False
    return row.p_holm <= 1 - confidence and not row.low <= 0 <= row.high


def indistinguishable_from(name: str, rows: Sequence[ModelComparison], confidence: float) -> list[str]:
    """Return the models that no row of `compare_pairs` distinguishes from this one, in the order of the rows."""
    others: dict[str, bool] = {}
    for row in rows:
        if name in (row.first, row.second):
            other = row.second if row.first == name else row.first
            others[other] = others.get(other, False) or is_distinguishable(row, confidence)
    return [other for other, differs in others.items() if not differs]

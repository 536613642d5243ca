"""Models compared two by two on the same prompts, the p-values corrected for the number of comparisons."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from bfpo.scores.records import ModelComparison
from bfpo.scores.scores import Judged, pair_values
from bfpo.stats import holm, paired_difference, paired_test

__all__ = ["compare_pairs", "is_told_apart", "not_told_from"]


def compare_pairs(
    judged: Mapping[str, Sequence[Judged]],
    pairs: Iterable[tuple[str, str]],
    metrics: Sequence[str],
    *,
    confidence: float = 0.95,
    num_resamples: int = 2000,
    random_seed: int = 0,
) -> list[ModelComparison]:
    """Return first - second of each metric for each pair of names, all of them one family.

    `low` and `high` are of the single difference, by a bootstrap over prompts and, where there are several, seeds.
    `p_value` is of McNemar's exact test or of sign flips, the answers to a prompt flipping together, so it speaks about
    other prompts and these trainings; `p_holm` is corrected over all rows that are returned. Where every pair of the
    models is in `pairs`, `p_holm` also holds for a pair that was picked after looking. Raises `SettingError` for an
    unknown metric.
    """
    rows: list[ModelComparison] = []
    for first, second in pairs:
        for metric in metrics:
            paired = pair_values(judged[first], judged[second], metric)
            difference = paired_difference(
                paired.first,
                paired.second,
                paired.prompts,
                seeds=paired.seeds,
                confidence=confidence,
                num_resamples=num_resamples,
                random_seed=random_seed,
            )
            test = paired_test(paired.first, paired.second, paired.prompts, random_seed=random_seed)
            rows.append(
                ModelComparison(
                    metric=metric,
                    first=first,
                    second=second,
                    difference=difference.value,
                    low=difference.low,
                    high=difference.high,
                    num=difference.num,
                    num_prompts=test.num_clusters,
                    test=test.test,
                    p_value=test.p_value,
                )
            )
    corrected = holm([row.p_value for row in rows])
    return [replace(row, p_holm=p_holm) for row, p_holm in zip(rows, corrected, strict=True)]


def is_told_apart(row: ModelComparison, confidence: float) -> bool:
    """Whether a row of `compare_pairs` is a difference: by `p_holm` at the level 1 - confidence, and by its interval.

    The interval must leave out 0 too, since of the two it alone knows that other seeds give other models.
    """
    if row.p_holm is None or row.low is None or row.high is None:
        return False
    return row.p_holm <= 1 - confidence and not row.low <= 0 <= row.high


def not_told_from(name: str, rows: Sequence[ModelComparison], confidence: float) -> list[str]:
    """Return the models that no row of `compare_pairs` tells apart from this one, in the order of the rows."""
    others: dict[str, bool] = {}
    for row in rows:
        if name in (row.first, row.second):
            other = row.second if row.first == name else row.first
            others[other] = others.get(other, False) or is_told_apart(row, confidence)
    return [other for other, apart in others.items() if not apart]

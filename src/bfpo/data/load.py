"""From files to the pairs or completions that a stage uses, in one fixed order of steps, with counts of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from bfpo.data.labels import Unknown, Use, cell_counts, completions_of_pairs, resolve_labels
from bfpo.data.read import read_pairs, read_sft
from bfpo.data.rejects import BadRows, Reject, check_rejects
from bfpo.data.rows import iter_rows
from bfpo.data.split import limit_pairs, split_pairs
from bfpo.errors import DataError, SettingError
from bfpo.schema import Completion, Pair

__all__ = ["LoadedCompletions", "LoadedPairs", "load_completions", "load_pairs"]

Row = TypeVar("Row", Pair, Completion)
Split = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class LoadedPairs:
    """Pairs whose labels are all known, the rows that could not be used, and what was counted on the way."""

    pairs: list[Pair]
    rejects: list[Reject] = field(default_factory=list)
    counts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LoadedCompletions:
    """Completions to imitate, the rows that could not be used, and what was counted on the way."""

    completions: list[Completion]
    rejects: list[Reject] = field(default_factory=list)
    counts: dict[str, Any] = field(default_factory=dict)


def load_pairs(
    files: Sequence[str | Path],
    *,
    layout: str = "auto",
    columns: Mapping[str, str] | None = None,
    source: str | None = None,
    bad_rows: BadRows = "stop",
    unknown_label: Unknown = "error",
    split: Split | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> LoadedPairs:
    """Read pairs, resolve unknown labels, take one part of a split by prompt, and draw `limit` of it, in this order.

    `split`: `held_out` (a number of prompts), `seed` and `part` ("train" or "test"), as in the config. Raises
    `DataError` for files that cannot be used, bad rows under `bad_rows="stop"` and where nothing is left, `LabelError`
    for unknown labels under `unknown_label="error"`.
    """
    result = read_pairs([Path(file) for file in files], layout=layout, columns=columns, source=source)
    check_rejects(result, bad_rows=bad_rows)
    pairs, labels = resolve_labels(result.pairs, unknown=unknown_label)
    used = _chosen_part(pairs, split=split, limit=limit, seed=seed)
    if not used:
        raise DataError.at(files[0], None, "no pair is left to use; check split, unknown_label and limit")
    counts = {
        "rows": result.rows,
        "rows_rejected": len(result.rejects),
        "rejected_by_reason": result.counts(),
        "labels_set_safe": labels["set_safe"],
        "pairs_without_label_dropped": labels["dropped"],
        "pairs": len(used),
        "cells": cell_counts(used),
    }
    return LoadedPairs(used, result.rejects, counts)


def load_completions(
    files: Sequence[str | Path],
    *,
    layout: str = "auto",
    columns: Mapping[str, str] | None = None,
    source: str | None = None,
    use: Use = "all",
    bad_rows: BadRows = "stop",
    unknown_label: Unknown = "error",
    split: Split | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> LoadedCompletions:
    """Read completions to imitate from a file of completions, or from pairs of which `use` picks some.

    `layout="completions"` says the first, a pair layout the second, "auto" looks at the columns of the first file.
    `limit` counts rows, pairs where the file holds pairs; `source` replaces a completion's kind. Labels matter for
    `use="safe"` only: where that is not asked, an unknown one is no error. Raises as `load_pairs` does.
    """
    if layout == "completions" or (layout == "auto" and _holds_completions(Path(files[0]), columns or {})):
        if use != "all":
            raise SettingError(f"use: got {use!r} for a file of completions; allowed: 'all' (only pairs are picked)")
        result = read_sft([Path(file) for file in files], columns=columns)
        check_rejects(result, bad_rows=bad_rows)
        rows, rejects, counts = result.completions, result.rejects, {"rows": result.rows}
        rows = _chosen_part(rows, split=split, limit=limit, seed=seed)
        rows = rows if source is None else [replace(row, kind=source) for row in rows]
    else:
        needs_labels = use == "safe"
        pair_result = read_pairs([Path(file) for file in files], layout=layout, columns=columns, source=source)
        check_rejects(pair_result, bad_rows=bad_rows)
        pairs = pair_result.pairs
        if needs_labels:
            pairs, _ = resolve_labels(pairs, unknown=unknown_label)
        pairs = _chosen_part(pairs, split=split, limit=limit, seed=seed)
        rows = completions_of_pairs(pairs, use)
        rejects, counts = pair_result.rejects, {"rows": pair_result.rows, "pairs": len(pairs)}
    if not rows:
        raise DataError.at(files[0], None, "nothing is left to use; check split, unknown_label, use and limit")
    counts |= {"rows_rejected": len(rejects), "completions": len(rows)}
    return LoadedCompletions(rows, rejects, counts)


def _holds_completions(file: Path, columns: Mapping[str, str]) -> bool:
    for row in iter_rows(file):
        if row.bad is None:
            return any(columns.get(name, name) in row.columns for name in ("completion", "messages"))
    return False


def _chosen_part(rows: Sequence[Row], *, split: Split | None, limit: int | None, seed: int) -> list[Row]:
    """Split by prompt, then draw; both read a row's prompt and id alone, which pairs and completions share."""
    some: Sequence[Any] = rows
    if split is not None:
        train, test = split_pairs(some, held_out=split["held_out"], seed=split["seed"])
        some = test if split["part"] == "test" else train
    if limit is not None:
        some = limit_pairs(some, limit, seed=seed)
    return list(some)

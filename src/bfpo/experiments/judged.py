"""The judged answers of a model, read back from what `generate` and `evaluate` wrote."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bfpo.core.schema import Score, Verdict
from bfpo.data.read import read_completions
from bfpo.scores.accuracy import AccuracyRow, accuracy_scores
from bfpo.scores.scores import Judged, join_verdicts

__all__ = ["read_accuracy", "read_judged", "read_verdicts"]


def read_verdicts(path: Path) -> dict[str, Verdict]:
    """Return the verdicts of a `verdicts.jsonl` by the id of the completion; what is no field of theirs is left out."""
    fields = Verdict.__dataclass_fields__
    return {
        row["completion_id"]: Verdict(**{key: value for key, value in row.items() if key in fields})
        for row in _rows(path)
    }


def read_judged(answers: Path, scores: Path, *, seed: int = 0) -> list[Judged]:
    """Return the judged rows of the run folders of `generate` and of `evaluate`, in the order of the completions."""
    completions = read_completions(answers / "completions.jsonl")
    verdicts = read_verdicts(scores / "verdicts.jsonl")
    return join_verdicts(completions, [verdicts[completion.id] for completion in completions], seed=seed)


def read_accuracy(runs: Sequence[Path]) -> list[Score]:
    """Return the accuracy on held-out pairs from `scores/accuracy.jsonl` of the runs, one of each seed."""
    rows: list[AccuracyRow] = []
    seeds: list[int] = []
    for number, run in enumerate(runs):
        path = run / "scores" / "accuracy.jsonl"
        for row in _rows(path) if path.exists() else []:
            rows.append(AccuracyRow(**{key: row[key] for key in AccuracyRow.__dataclass_fields__}))
            seeds.append(number)
    return accuracy_scores(rows, seeds=seeds) if rows else []


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

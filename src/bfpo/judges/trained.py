"""The judge in a folder of `bfpo judge-train`, whatever its kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from bfpo.core.errors import ModelError
from bfpo.judges.ngram_ranker import NgramRanker
from bfpo.judges.ngrams import JUDGE_FILE, NgramJudge

if TYPE_CHECKING:
    from bfpo.judges.classifier import ClassifierJudge

__all__ = ["trained_judge", "trained_ranker"]


def trained_judge(folder: str | Path, *, name: str | None = None) -> NgramJudge | ClassifierJudge:
    """Return the judge that the folder holds, as its own or another name. Raises `ModelError` where there is none."""
    folder = Path(folder)
    try:
        described = json.loads((folder / JUDGE_FILE).read_text(encoding="utf-8"))
        kind = described["kind"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{folder}: holds no {JUDGE_FILE} that can be read ({type(error).__name__}: {error}); needed: the folder "
            "`model` of a run of `bfpo judge-train`"
        ) from error
    judge: NgramJudge | ClassifierJudge
    if kind == "ngrams":
        judge = NgramJudge.load(folder)
    elif kind == "classifier":
        from bfpo.judges.finetune import load_finetuned

        judge = load_finetuned(folder, described)
    else:
        raise ModelError(f"{folder / JUDGE_FILE}: kind is {kind!r}; allowed for a judge: ngrams, classifier")
    if name is not None:
        judge.name = name
    return judge


def trained_ranker(folder: str | Path, *, name: str | None = None) -> NgramRanker:
    """Return the ranker that the folder holds, as its own or another name. Raises `ModelError` where there is none."""
    ranker = NgramRanker.load(Path(folder))
    if name is not None:
        ranker.name = name
    return ranker

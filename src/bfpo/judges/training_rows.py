"""What a trained judge or ranker was trained on, and what that says against trusting it: few rows, rows seen before."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bfpo.core.files import write_text_whole
from bfpo.core.schema import Completion
from bfpo.judges.ngrams import JUDGE_FILE

__all__ = ["FEW_ROWS", "few_rows", "seen_rows", "trained_on_few", "write_rows"]

FEW_ROWS = 50
"""Rows of the rarer class (pairs, for a ranker) below which a judge is warned of."""
_ROWS = "trained_rows.txt"


def few_rows(name: str, trained_on: Mapping[str, Any]) -> list[str]:
    """Return a warning where training had few rows of a class (`safe`, `unsafe`; for a ranker `pairs`)."""
    kinds = [kind for kind in ("safe", "unsafe", "pairs") if isinstance(trained_on.get(kind), int)]
    few = [f"{trained_on[kind]} {kind}" for kind in kinds if trained_on[kind] < FEW_ROWS]
    if not few:
        return []
    rows = "" if "pairs" in kinds else " completions"
    return [f"{name} was trained on only {' and '.join(few)}{rows}; below {FEW_ROWS} it is hardly to be trusted"]


def trained_on_few(folder: str | Path) -> list[str]:
    """Return the warnings of `few_rows` for the judge or ranker in a folder; none where it does not say."""
    described = _described(Path(folder))
    trained_on = described.get("trained_on")
    return few_rows(str(folder), trained_on) if isinstance(trained_on, dict) else []


def write_rows(folder: Path, completions: Iterable[Completion]) -> None:
    """Write a digest of each text that a judge is trained on into its folder, so that a check can tell seen ones."""
    write_text_whole(folder / _ROWS, "".join(f"{digest}\n" for digest in sorted(set(map(_digest, completions)))))


def seen_rows(folder: str | Path, completions: Sequence[Completion]) -> list[str]:
    """Return a warning where the judge in a folder was trained on some of these texts."""
    try:
        known = set((Path(folder) / _ROWS).read_text(encoding="ascii").split())
    except (OSError, UnicodeDecodeError):  # no judge of this version
        return []
    seen = sum(_digest(completion) in known for completion in completions)
    if not seen:
        return []
    return [
        f"{seen} of {len(completions)} texts are among those that {folder} was trained on, whose labels it knows: the "
        "figures flatter it; check it on other texts"
    ]


def _digest(completion: Completion) -> str:
    words = [[[message.role, message.content] for message in completion.prompt], completion.text]
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()[:16]


def _described(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / JUDGE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # the judge itself says what is wrong with its folder
        return {}
    return found if isinstance(found, dict) else {}

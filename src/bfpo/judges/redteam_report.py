"""What a red-team run found: the funnel from prompts to pairs, and how often the model's answers are unsafe."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bfpo.core.errors import DataError
from bfpo.core.schema import Completion, Score
from bfpo.data.split import normalised_prompt
from bfpo.stats import rate_interval

__all__ = ["FUNNEL_STEPS", "Answers", "answer_rates", "report_text"]

FUNNEL_STEPS = ("prompts", "completions", "well_formed", "usable", "unsafe", "candidates", "pairs")
"""Steps of the funnel that are drawn; `bfpo.judges.pairing.Pairing` says what they count."""

_ALL = "all prompts"
_TITLES = {
    "unsafe": "answers judged unsafe",
    "well_formed": "well-formed answers",
    "refused": "refusals",
    "finished": "ended before the token limit",
}
_WORDS = {
    "prompts": "prompts",
    "completions": "completions",
    "well_formed": "of these well-formed (or not measured)",
    "unscored": "of these unscored",
    "unsafe": "of these judged unsafe",
    "usable": "usable: scored and well-formed",
    "candidates": "two different usable completions of one prompt",
    "unranked": "of these unranked",
    "ties": "of these ties in helpfulness",
    "pairs": "pairs chosen",
    "prompts_with_pairs": "prompts with a pair",
}


class Answers:
    """Completions with the verdicts that `bfpo label` wrote about them, row by row.

    Raises `DataError` where verdict i is not about completion i.
    """

    def __init__(self, completions: Sequence[Completion], verdicts: Path) -> None:
        self.completions = list(completions)
        self.verdicts: list[dict[str, Any]] = [
            json.loads(line) for line in verdicts.read_text(encoding="utf-8").splitlines()
        ]
        if [row["completion_id"] for row in self.verdicts] != [completion.id for completion in self.completions]:
            raise DataError.at(verdicts, None, "the verdicts are not one per completion; label the completions again")

    @property
    def unscored(self) -> dict[str, int]:
        """The unscored ones by reason, the commonest first."""
        reasons = Counter(row["reason"] for row in self.verdicts if row["label"] == "unscored")
        return dict(reasons.most_common())


def answer_rates(
    answers: Answers, *, confidence: float = 0.95, num_resamples: int = 2000, random_seed: int = 0
) -> dict[str, list[Score]]:
    """Return the rates of `unsafe`, `well_formed`, `refused` and `finished` answers, of all and of each kind of prompt.

    Intervals are over prompts. What a judge could not score or does not measure is counted and enters no rate.
    """
    settings = {"confidence": confidence, "num_resamples": num_resamples, "random_seed": random_seed}
    kinds = sorted({completion.kind for completion in answers.completions})
    groups = {_ALL: None, **({kind or "(no kind)": kind for kind in kinds} if len(kinds) > 1 else {})}
    return {
        name: [
            _rate(metric, [row for row in _rows(answers, metric) if kind is None or row[0].kind == kind], settings)
            for metric in _TITLES
        ]
        for name, kind in groups.items()
    }


_Row = tuple[Completion, bool | None]


def _rows(answers: Answers, metric: str) -> list[_Row]:
    rows: list[_Row] = []
    for completion, verdict in zip(answers.completions, answers.verdicts, strict=True):
        if metric == "unsafe":
            value = None if verdict["label"] == "unscored" else verdict["label"] == "unsafe"
        else:
            value = completion.finished if metric == "finished" else verdict[metric]
        rows.append((completion, value))
    return rows


def _rate(metric: str, rows: Sequence[_Row], settings: dict[str, Any]) -> Score:
    valued = [(completion, value) for completion, value in rows if value is not None]
    prompts = [normalised_prompt(completion.prompt) for completion, _ in valued]
    found = rate_interval([value for _, value in valued], prompts, **settings)
    better = metric in ("well_formed", "finished")
    return Score(metric, found.value, found.low, found.high, found.num, len(rows) - len(valued), better)


def report_text(
    model: str,
    funnel: Mapping[str, int],
    cells: Mapping[str, int],
    rates: Mapping[str, Sequence[Score]],
    unscored: Mapping[str, int],
    confidence: float,
) -> str:
    """Return the report as Markdown."""
    lines = [f"Model: {model}", "", "| step | number |", "|---|---|"]
    lines += [f"| {_WORDS[name]} | {funnel[name]} |" for name in _WORDS]
    lines += [f"| pairs (chosen-rejected) {cell} | {count} |" for cell, count in cells.items()]
    lines += ["", f"Rates of the answers; intervals: {confidence:.0%}, over prompts.", ""]
    lines += ["| prompts | rate | value | interval | answers | not measured |", "|---|---|---|---|---|---|"]
    for name, scores in rates.items():
        lines += [_rate_row(name, score) for score in scores if score.num]
    lines += [f"\nUnscored: {count}, {reason}" for reason, count in unscored.items()]
    return "\n".join(lines)


def _rate_row(name: str, score: Score) -> str:
    bounds = "" if score.low is None or score.high is None else f"{score.low:.3f} to {score.high:.3f}"
    return f"| {name} | {_TITLES[score.metric]} | {score.value:.3f} | {bounds} | {score.num} | {score.unscored} |"

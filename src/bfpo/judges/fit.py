"""How a judge fits the texts at hand, without labels: how often it is unsure, how sure it is, what it has never read.

Bounds of a warning: on real chat models' answers a judge was unsure of .08 in cross-validation, of .13 to .28 where it
agreed with people, and of .59 to .64 where it did not; unseen n-grams went from .05 to .20 (docs/judges.md).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from bfpo.core.schema import Completion, JudgeFit, Verdict
from bfpo.judges.judges import Judge

__all__ = ["MAX_UNSEEN", "MAX_UNSURE", "UNSURE", "Trained", "fit_facts", "fit_table", "judge_fit", "log_fit"]

_log = logging.getLogger(__name__)

UNSURE = (0.3, 0.7)
"""p(safe) strictly between these is unsure."""
MAX_UNSURE, MAX_UNSEEN = 0.4, 0.15
"""Shares above which a judge warns."""


@runtime_checkable
class Trained(Protocol):
    """A judge that knows how it fitted texts of its own data, to prompts that it had not seen."""

    held_out: Mapping[str, object]


@runtime_checkable
class _KnowsWords(Protocol):
    def unseen(self, completions: Sequence[Completion]) -> float:
        """Return the share of the n-grams of these texts that training had not seen."""


def fit_facts(judge: object, completions: Sequence[Completion], verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Return `unsure`, `confidence` (the mean of p of the likelier label) and `unseen`; empty without a p(safe)."""
    p = np.array([verdict.p_safe for verdict in verdicts if verdict.p_safe is not None])
    if not p.size:
        return {}
    facts = {
        "unsure": float(((p > UNSURE[0]) & (p < UNSURE[1])).mean()),
        "confidence": float(np.maximum(p, 1 - p).mean()),
    }
    return {**facts, "unseen": judge.unseen(completions)} if isinstance(judge, _KnowsWords) else facts


def judge_fit(
    judge: Judge, completions: Sequence[Completion], verdicts: Sequence[Verdict], *, model: str = ""
) -> list[JudgeFit]:
    """Return how a judge fits these texts, with its warnings; nothing for one that gives no p(safe).

    `verdicts` are one per completion, in order; `model` names the model that wrote the texts.
    """
    scored = [(c, v) for c, v in zip(completions, verdicts, strict=True) if v.p_safe is not None]
    facts = fit_facts(judge, [c for c, _ in scored], [v for _, v in scored])
    if not facts:
        return []
    known = judge.held_out if isinstance(judge, Trained) else {}
    own = {name: value for name in facts if isinstance(value := known.get(name), float)}
    of = f"{len(scored)} answers" + (f" of {model}" if model else "")
    warnings = []
    if facts["unsure"] > MAX_UNSURE:
        warnings.append(
            f"the judge {judge.name} is unsure of {facts['unsure']:.0%} of {of}{_against(own, 'unsure')}: p(safe) is "
            f"between {UNSURE[0]} and {UNSURE[1]}; above {MAX_UNSURE:.0%} its rates say little, so label some of these "
            "answers by hand and compare with `bfpo judge-check`"
        )
    if facts.get("unseen", 0.0) > max(MAX_UNSEEN, own.get("unseen", 0.0)):
        warnings.append(
            f"the judge {judge.name} has never read {facts['unseen']:.0%} of the words and n-grams of {of}"
            f"{_against(own, 'unseen')}; above {MAX_UNSEEN:.0%} its errors are not those of its own check, so train it "
            "on texts like these, or label some of them by hand"
        )
    return [JudgeFit(judge.name, len(scored), **facts, held_out=own or None, model=model, warnings=warnings or None)]


def _against(own: Mapping[str, float], name: str) -> str:
    return f" ({own[name]:.0%} of the texts that it was checked on in training)" if name in own else ""


def log_fit(fits: Sequence[JudgeFit]) -> None:
    """Log how the judges fit the texts, and their warnings."""
    for fit in fits:
        _log.info("%s", _words(fit))
        for warning in fit.warnings or ():
            _log.warning("%s", warning)


def _words(fit: JudgeFit) -> str:
    shares = {"unsure": "unsure of", "confidence": "mean confidence", "unseen": "n-grams never read"}
    own = fit.held_out or {}
    said = [
        f"{title} {value:.0%}" + (f" (in training {own[name]:.0%})" if name in own else "")
        for name, title in shares.items()
        if (value := getattr(fit, name)) is not None
    ]
    return f"judge {fit.judge} on {fit.num} answers{f' of {fit.model}' * bool(fit.model)}: {', '.join(said)}"


def fit_table(fits: Sequence[JudgeFit]) -> str:
    """Return the fits as lines of Markdown, warnings first; empty without any."""
    lines = [f"Warning: {warning}.\n" for fit in fits for warning in fit.warnings or ()]
    return "\n".join([*lines, *(f"- {_words(fit)}" for fit in fits)])

"""What a page says about itself: what is missing, what could not be read, what speaks against its figures."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bfpo.report.data import Suite
from bfpo.report.parts import text
from bfpo.report.read import Run

__all__ = ["absent_parts", "notes_of", "problems_of"]

_NAMED = 4  # skipped suites that the top of the page names one by one


def absent_parts(runs: Sequence[Run], shown: Mapping[Run, str], inside: Mapping[Path, Sequence[Run]]) -> Iterator[str]:
    """Yield what the page does not show because no run says it, and the runs that did not end well.

    `inside`: the runs within experiments, by the path of the experiment.
    """
    hidden = [run for within in inside.values() for run in within]
    stages = {run.stage for run in (*runs, *hidden)}
    for stage, what in {
        "evaluate": "scores and verdicts",
        "train": "training curves",
        "judge-check": "the judge's error against people's labels",
        "prepare": "the data card",
    }.items():
        if stage not in stages:
            yield f"no run of bfpo {stage} was given, so there is nothing here about {what}"
    if hidden:
        yield (
            f"the answers and training curves of {len(hidden)} runs inside experiments: give the folder of one of them "
            "to see it"
        )
    for run in runs:
        if run.record.get("status") != "finished":
            yield f"{shown[run]} ({run.stage}) is {text(run.record.get('status')) or 'of unknown status'}"


def problems_of(runs: Sequence[Run]) -> list[str]:
    """Return what could not be read, each once."""
    return list(dict.fromkeys(problem for run in runs for problem in run.problems))


def notes_of(runs: Sequence[Run], suites: dict[str, Suite]) -> Iterator[str]:
    """Yield what a reader must hold against the figures: one judge for both, suites that were skipped."""
    labelling = {json.dumps(judge, sort_keys=True) for run in runs for judge in _judges(run, ("label", "redteam"))}
    evaluating = {json.dumps(judge, sort_keys=True) for run in runs for judge in _judges(run, ("evaluate",))}
    if labelling & evaluating:
        yield "The judge that labelled the training data also judged the answers: its errors favour the model."
    skipped = [suite.title or suite.name for suite in suites.values() if suite.status == "skipped"]
    if len(skipped) > _NAMED:
        yield f"{len(skipped)} of {len(suites)} suites were skipped and are in no mean; the reasons stand below."
    elif skipped:
        yield f"Skipped, and in no mean: {'; '.join(skipped)}."


def _judges(run: Run, stages: Sequence[str]) -> list[Any]:
    if run.stage not in stages:
        return []
    judges = run.config.get("judges") or run.config.get("judge") or []
    rows = judges if isinstance(judges, list) else [judges]
    return [{"format": row} if isinstance(row, str) else row for row in rows]

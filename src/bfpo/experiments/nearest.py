"""The model that a user's constraint asks for: chosen on some of the prompts, its scores told on the others."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from bfpo.core.schema import Score
from bfpo.scores.scores import Judged, score_rows
from bfpo.stats import nearest_to

__all__ = ["choose_nearest", "nearest_words"]

Rows = Mapping[str, Sequence[Judged]]


def choose_nearest(
    judged: Rows, at_least: Mapping[str, float], objectives: Sequence[str], validation_share: float, **intervals: Any
) -> dict[str, Any]:
    """Return the point that `nearest_to` chooses on the validation prompts, as JSON values; `judged` is by model.

    The best of several noisy scores is too high where it was chosen, so `meets`, `missing` and `told_on` are of the
    other prompts. A prompt is of the validation part by its hash, so that it is in every sweep. Where either part
    lacks an objective of some model, choice and scores are of all prompts, and `held_out` is false. `intervals` are
    keyword arguments of `score_rows`.
    """

    def chosen(prompt: str) -> bool:
        return _share_of(prompt) < validation_share

    parts = _part(judged, chosen), _part(judged, lambda prompt: not chosen(prompt))
    held_out = validation_share > 0 and all(_is_measured(part, objectives) for part in parts)
    validation, others = parts if held_out else (judged, judged)
    points = {name: _values(rows, objectives) for name, rows in validation.items()}
    choice = nearest_to(points, at_least, objectives)
    told = {score.metric: score for score in score_rows(others[choice.name], **intervals)}
    missing = {key: bound - _value(told[key]) for key, bound in at_least.items() if _value(told[key]) < bound}
    return {
        "at_least": dict(at_least),
        "name": choice.name,
        "meets": not missing,
        "missing": missing,
        "held_out": held_out,
        "validation_share": validation_share,
        "chosen_on": {
            "num_prompts": _num_prompts(validation),
            "scores": points[choice.name],
            "meets": choice.meets,
            "missing": choice.missing,
        },
        "told_on": {"num_prompts": _num_prompts(others), "scores": {key: asdict(told[key]) for key in objectives}},
    }


def _share_of(prompt: str) -> float:
    """Return a number in [0, 1) that depends on the prompt alone."""
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big") / 2**64


def _part(judged: Rows, keep: Callable[[str], bool]) -> dict[str, list[Judged]]:
    return {name: [row for row in rows if keep(row.prompt)] for name, rows in judged.items()}


def _is_measured(part: Rows, objectives: Sequence[str]) -> bool:
    scores = [{score.metric: score for score in score_rows(rows, num_resamples=1)} for rows in part.values()]
    return all(one[key].value is not None for one in scores for key in objectives)


def _values(rows: Sequence[Judged], objectives: Sequence[str]) -> dict[str, float]:
    scores = {score.metric: score for score in score_rows(rows, num_resamples=1)}
    return {key: _value(scores[key]) for key in objectives}


def _value(score: Score) -> float:
    assert score.value is not None  # both parts were checked
    return float(score.value)


def _num_prompts(judged: Rows) -> int:
    return len({row.prompt for rows in judged.values() for row in rows})


def nearest_words(nearest: Mapping[str, Any]) -> list[str]:
    """Return what `choose_nearest` found as lines of Markdown."""
    asked = " and ".join(f"{key} of at least {value:g}" for key, value in nearest["at_least"].items())
    short = ", ".join(f"{key} {value:.3f} below" for key, value in nearest["missing"].items())
    told, chosen = nearest["told_on"], nearest["chosen_on"]
    scores = ", ".join(f"{key} {_interval_words(score)}" for key, score in told["scores"].items())
    what = "the nearest" if not chosen["meets"] else "which reaches it where it was chosen and not on the others"
    head = f"For {asked}: {nearest['name']}{'' if nearest['meets'] else f', {what} ({short})'}."
    if nearest["held_out"]:
        where = f"Chosen on {chosen['num_prompts']} prompts; on the {told['num_prompts']} others: {scores}."
        return [head, "", where]
    why = "validation_share is 0" if nearest["validation_share"] == 0 else "too few prompts to hold some back"
    return [
        head,
        "",
        f"Chosen and told on the same {told['num_prompts']} prompts ({why}): {scores}. The best of several models "
        "looks better than it is on the prompts that it was chosen on.",
    ]


def _interval_words(score: Mapping[str, Any]) -> str:
    interval = "" if score["low"] is None or score["high"] is None else f" ({score['low']:.3f} to {score['high']:.3f})"
    return f"{score['value']:.3f}{interval}"

"""What to say of a run of suites in which not one score was made: the commonest reason, and what to do about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from bfpo.config import EvaluateConfig
from bfpo.core.errors import DataError
from bfpo.suites.answers import context_of
from bfpo.suites.catalogue import Suite

__all__ = ["nothing_scored"]


def nothing_scored(
    config: EvaluateConfig,
    suites: Sequence[Suite],
    facts: Mapping[str, Mapping[str, Any]],
    answers: Sequence[Mapping[str, Any]],
) -> DataError:
    """Return the error for suites that have no score: what hinders most of them, told of the first of these.

    `facts` and `answers` are those of `scores.json` and `answers.jsonl`, by suite and in their order.
    """
    reasons = {suite.name: _reason(config, suite, facts[suite.name], answers) for suite in suites}
    kinds = Counter(kind for kind, _ in reasons.values())
    commonest = kinds.most_common(1)[0][0]
    name, text = next((name, text) for name, (kind, text) in reasons.items() if kind == commonest)
    others = kinds[commonest] - 1
    alike = f" ({others} more: {commonest})" if others else ""
    return DataError(
        f"nothing was scored; suite {name}: {text}{alike}. What was written stays: go on by --resume once the cause is "
        "gone, or start in a new --out with other settings"
    )


def _reason(
    config: EvaluateConfig, suite: Suite, fact: Mapping[str, Any], answers: Sequence[Mapping[str, Any]]
) -> tuple[str, str]:
    """Return a word for the kind of reason that a suite has no score, and the reason with what to do."""
    if fact["status"] == "skipped":
        reason = " ".join(str(fact["reason"]).split())
        return "skipped", f"skipped, {reason}"
    too_long: Mapping[str, int] = fact.get("too_long", {})
    verdicts = [row["verdict"] for row in answers if row["suite"] == suite.name]
    unscored = Counter(verdict["reason"] for verdict in verdicts if verdict["label"] == "unscored")
    if too_long and sum(too_long.values()) >= unscored.total():
        return "prompts too long", _too_long(config, suite, too_long, fact["num_prompts"])
    if unscored and suite.judge is not None and suite.judge.role == "harm":  # else the reasons are of refusals
        reason, count = unscored.most_common(1)[0]
        return "answers unscored", (
            f"{count} of {len(verdicts)} answers are unscored by {fact['judge']}: {reason}; give another judge by "
            "suites.judges, or see with `bfpo judge-check` what it can judge"
        )
    return "no value", f"{fact['judge']} had nothing to say of any answer; see {len(verdicts)} of them in answers.jsonl"


def _too_long(config: EvaluateConfig, suite: Suite, too_long: Mapping[str, int], num_prompts: int) -> str:
    """Say how many tokens there are for a prompt, and which setting leaves more."""
    assert config.suites is not None
    assert suite.sampling is not None  # only prompts that we ask ourselves can be too long
    name, count = max(too_long.items(), key=lambda item: item[1])
    said = f"{count} of {num_prompts} prompts are too long for {name}"
    context = next(context_of(model) for model in config.evaluated() if model.name == name)
    longest = config.suites.max_new_tokens or suite.sampling.max_new_tokens
    if context - longest >= config.suites.max_prompt_length:
        return f"{said}: they have more than suites.max_prompt_length = {config.suites.max_prompt_length} tokens"
    whose = "suites.max_new_tokens" if config.suites.max_new_tokens else "the suite's max_new_tokens"
    return (
        f"{said}: its context is {context} tokens, {whose} keeps {longest} of them for the answer, and "
        f"{max(context - longest, 0)} are left for a prompt; set suites.max_new_tokens lower, or take a model with a "
        "longer context"
    )

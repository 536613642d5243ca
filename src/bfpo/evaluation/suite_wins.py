"""Win rates of the models against the baseline, plain and at equal length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bfpo.config import EvaluateConfig
from bfpo.data.split import normalised_prompt
from bfpo.evaluation.stats import MIN_PROMPTS
from bfpo.evaluation.suite_judging import rank_suites
from bfpo.evaluation.suite_scores import Values, length_controlled_score
from bfpo.evaluation.suites import Suite
from bfpo.schema import Completion

__all__ = ["WinRates", "interval_settings", "win_rates"]


@dataclass(frozen=True, slots=True)
class WinRates:
    """The win rates prompt by prompt, and rows of `scores.json` of those at equal length."""

    values: list[Values] = field(default_factory=list)
    at_equal_length: list[dict[str, Any]] = field(default_factory=list)


def win_rates(
    config: EvaluateConfig,
    suites: Sequence[Suite],
    answers: Mapping[str, Mapping[str, Sequence[Completion]]],
    facts: dict[str, dict[str, Any]],
) -> WinRates:
    """Compare `answers` (model -> suite -> completions) with the baseline's, and put the ranker into the facts."""
    found = WinRates()
    if not suites:
        return found
    name, ranked = rank_suites(config, suites, answers)
    by_name = {suite.name: suite for suite in suites}
    for (suite, model), preferences in ranked.items():
        facts[suite]["judge"] = name
        texts = {completion.id: normalised_prompt(completion.prompt) for completion in answers[model][suite]}
        scored = {item: (each.better, each.longer_by) for item, each in preferences.items() if each.better is not None}
        by_item = {item: better for item, (better, _) in scored.items()}
        prompts = {item: texts[item] for item in scored}
        unscored = facts[suite]["num_prompts"] - len(by_item)
        wins = Values(suite, model, f"winrate[{name}]", by_item, prompts, unscored)
        found.values.append(wins)
        if "lc_winrate" not in by_name[suite].metrics:
            continue
        longer_by = [longer for _, longer in scored.values()]
        row = length_controlled_score(wins, longer_by, name=f"lc_winrate[{name}]", **interval_settings(config))
        found.at_equal_length.append(row)
        if row["value"] is None:
            reason = f"the win rate at equal length needs {MIN_PROMPTS} compared prompts"
            facts[suite].setdefault("unscored", {})[model] = {reason: row["unscored"]}
    return found


def interval_settings(config: EvaluateConfig) -> dict[str, Any]:
    """Return the settings of every interval."""
    return {
        "confidence": config.confidence,
        "num_resamples": config.bootstrap_samples,
        "random_seed": config.seed,
    }

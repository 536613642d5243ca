"""From verdicts to the table of the comparison, with intervals, and the text that shows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from bfpo.evaluation.scores import METRICS, Judged, compare, score_rows
from bfpo.evaluation.stats import pareto_front
from bfpo.sandbox.compare.plan import RIVALS
from bfpo.sandbox.steps import CEILING, START
from bfpo.schema import Score

__all__ = ["SHOWN", "make_result", "result_markdown"]

SHOWN = (
    "helpful_and_safe", "helpfulness", "harmless_harmful", "over_refusal_benign", "over_refusal_borderline",
    "well_formed",
)  # fmt: skip
OBJECTIVES = ("helpfulness", "harmless_harmful")
MAIN = "bfpo"


def make_result(
    config: Mapping[str, Any],
    judged: Mapping[str, Sequence[Judged]],
    accuracy: Mapping[str, Sequence[Score]],
    tried: Mapping[str, Sequence[float]],
    best: Mapping[str, int],
    *,
    confidence: float = 0.95,
) -> dict[str, Any]:
    """Return the comparison as JSON values: scores with intervals, paired differences to BFPO, trials, settings.

    `accuracy`: on held-out pairs, by BFPO's target for every method.
    Intervals are clustered by prompt and, with several seeds, by seed; the differences pair answers by prompt and seed
    and are not corrected for their number.
    """
    resamples = int(config["bootstrap_samples"])
    methods: list[dict[str, Any]] = []
    for name, rows in judged.items():
        rival = RIVALS.get(name)
        scores = {
            score.metric: asdict(score)
            for score in score_rows(rows, confidence=confidence, num_resamples=resamples)
            if score.metric in SHOWN
        }
        seeds = sorted({row.seed for row in rows})
        by_seed = [score_rows([row for row in rows if row.seed == seed], num_resamples=1) for seed in seeds]
        difference = None
        if rival is not None and name != MAIN:
            difference = asdict(compare(judged[MAIN], rows, SHOWN[0], confidence=confidence, num_resamples=resamples))
        methods.append(
            {
                "name": name,
                "title": rival.title if rival else name,
                "setting": dict(rival.trials[best[name]]) if rival else {},
                "trainings": rival.trainings if rival else 0,
                "scores": scores,
                "seed_values": {
                    metric: [next(s.value for s in one if s.metric == metric) for one in by_seed] for metric in SHOWN
                },
                "bfpo_minus_this": difference,
                "accuracy": [asdict(score) for score in accuracy.get(name, ())],
                "trials": [
                    {"setting": dict(setting), "validation": value}
                    for setting, value in zip(rival.trials if rival else (), tried.get(name, ()), strict=False)
                ],
            }
        )
    points = {
        method["title"]: {key: method["scores"][key]["value"] for key in OBJECTIVES}
        for method in methods
        if method["name"] in RIVALS and all(method["scores"][key]["value"] is not None for key in OBJECTIVES)
    }
    return {
        "config": dict(config),
        "confidence": confidence,
        "methods": methods,
        "objectives": list(OBJECTIVES),
        "pareto_front": pareto_front(points, OBJECTIVES),
    }


def result_markdown(result: Mapping[str, Any]) -> str:
    """Return the comparison as Markdown: the table, the settings tried and taken, what was the same for all."""
    config = result["config"]
    heads = ["method", *(METRICS[metric].title for metric in SHOWN), "BFPO minus it"]
    methods = result["methods"]
    ends = (START, CEILING)
    order = sorted(
        (method for method in methods if method["name"] not in ends),
        key=lambda method: -(method["scores"][SHOWN[0]]["value"] or 0.0),
    )
    order += [method for method in methods if method["name"] in ends]
    lines = [
        f"Per cent on test prompts, number of seeds {config['seeds']}, {result['confidence']:.0%} intervals by a "
        "bootstrap over prompts and seeds. Sorted by helpful and safe; the last column is the paired difference in it, "
        "in points.",
        "",
        _row(heads),
        _row(["---"] * len(heads)),
        *(
            _row([method["title"], *(_cell(method["scores"][key]) for key in SHOWN), _cell(method["bfpo_minus_this"])])
            for method in order
        ),
        "",
        f"Not beaten in {' and '.join(METRICS[key].title for key in result['objectives'])} together: "
        f"{', '.join(result['pareto_front'])}.",
        "",
        "## Settings tried and taken",
        "",
        "Helpful and safe on validation prompts at the first seed, per cent; what was taken in bold.",
        "",
        _row(["method", "trainings", "setting: score"]),
        _row(["---"] * 3),
        *(_row([m["title"], str(m["trainings"]), _trials(m)]) for m in methods if m["trials"]),
        "",
        "## The same for all",
        "",
        *(f"- {section}: {_facts(config[section])}" for section in ("world", "model", "sft", "align")),
        f"- sampling temperature: {config['temperature']:g}; first seed: {config['seed']}",
    ]
    return "\n".join(lines) + "\n"


def _trials(method: Mapping[str, Any]) -> str:
    parts = []
    for trial in method["trials"]:
        text = f"{_facts(trial['setting'])}: {100 * trial['validation']:.1f}"
        parts.append(f"**{text}**" if trial["setting"] == method["setting"] else text)
    return "; ".join(parts)


def _facts(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items()
    )


def _cell(score: Mapping[str, Any] | None) -> str:
    if score is None or score["value"] is None:
        return ""
    value = f"{100 * score['value']:.1f}"
    if score["low"] is None or score["high"] is None:
        return value
    return f"{value} ({100 * score['low']:.1f} to {100 * score['high']:.1f})"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"

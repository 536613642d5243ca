"""Figures about verdicts for `label.md` and `redteam.md`: counts, agreement, disagreements, rates of answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from bfpo.core.console import level_text
from bfpo.core.errors import DataError
from bfpo.core.markdown import score_cells, table
from bfpo.core.records import load_lines
from bfpo.core.schema import Comparison, Completion, Score, Verdict, VerdictRow
from bfpo.data.split import normalised_prompt
from bfpo.judges.agreement import cohen_kappa, disagreement, fleiss_kappa
from bfpo.judges.panel import Opinion, opinion_of
from bfpo.judges.records import TriedTemperature
from bfpo.stats import Interval, rate_interval

__all__ = [
    "FUNNEL_STEPS",
    "RATE_TITLES",
    "Answers",
    "against_labels",
    "agreement_scores",
    "answer_rates",
    "count_verdicts",
    "disagreement_rows",
    "measures_form",
    "redteam_text",
    "report_text",
    "soft_label_warning",
    "tried_text",
]

Votes = Mapping[str, Sequence[Sequence[Verdict]]]
_GIVEN = "given label"

FUNNEL_STEPS = ("prompts", "completions", "well_formed", "incoherent", "usable", "unsafe", "candidates", "pairs")
"""Steps of the drawn funnel, as counted by `bfpo.judges.pairing.Pairing`; `incoherent` if there are any."""

_ALL = "all prompts"
RATE_TITLES = {
    "unsafe": "answers judged unsafe",
    "unsafe_coherent": "answers judged unsafe, of the coherent ones",
    "incoherent": "incoherent answers",
    "well_formed": "well-formed answers",
    "refused": "refusals",
    "finished": "ended before the token limit",
}
_WORDS = {
    "prompts": "prompts",
    "completions": "completions",
    "well_formed": "of these well-formed",
    "unscored": "of these unscored",
    "unsafe": "of these judged unsafe",
    "incoherent": "of these incoherent: they give no pair",
    "usable": "usable: scored and well-formed",
    "candidates": "two different usable completions of one prompt",
    "unranked": "of these unranked",
    "ties": "of these ties in helpfulness",
    "pairs": "pairs chosen",
    "prompts_with_pairs": "prompts with a pair",
}


# ---------------------------------------------------------------------------------------------------------- labelling


def count_verdicts(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Return the numbers of safe, unsafe and unscored verdicts, and the unscored ones by reason."""
    labels = Counter(verdict.label for verdict in verdicts)
    return {
        "verdicts": len(verdicts),
        "safe": labels["safe"],
        "unsafe": labels["unsafe"],
        "unscored": labels["unscored"],
        "unscored_by_reason": _unscored_by_reason(verdicts),
    }


def _unscored_by_reason(verdicts: Sequence[Verdict | VerdictRow]) -> dict[str, int]:
    return dict(Counter(verdict.reason for verdict in verdicts if verdict.label == "unscored").most_common())


def _scored(opinion: Opinion | Verdict) -> bool | None:
    return None if opinion.label == "unscored" else opinion.label == "safe"


def agreement_scores(
    completions: Sequence[Completion],
    votes: Votes,
    verdicts: Sequence[Verdict],
    labels: Mapping[str, float],
    comparisons: Sequence[tuple[Comparison, str]],
    confidence: float = 0.95,
    **interval: Any,
) -> list[Score]:
    """Return the agreement of judges, of votes, and of the verdicts with given labels.

    Cohen's kappa of every two judges, Fleiss' kappa of all (three or more) and of the votes of one, Cohen's kappa and
    the share of equal labels of the verdicts against `labels` (by completion id), and the share of `comparisons` that
    put the first completion, the chosen one, first (each with its prompt). Intervals are over prompts; `interval` is
    for the kappas.
    """
    interval = {"confidence": confidence, **interval}
    prompts = [normalised_prompt(completion.prompt) for completion in completions]
    scores = []
    raters = {name: [_scored(opinion_of(one)) for one in given] for name, given in votes.items()}
    for first, second in combinations(raters, 2):
        found = cohen_kappa(raters[first], raters[second], prompts, **interval)
        scores.append(_score(f"cohen_kappa: {first}, {second}", found, len(prompts)))
    if len(raters) > 2:
        scores.append(
            _score("fleiss_kappa: judges", fleiss_kappa(list(raters.values()), prompts, **interval), len(prompts))
        )
    for name, given in votes.items():
        by_vote = [list(map(_scored, one)) for one in zip(*given, strict=True)]
        if len(by_vote) > 1:
            found = fleiss_kappa(by_vote, prompts, **interval)
            scores.append(_score(f"fleiss_kappa: votes of {name}", found, len(prompts)))
    if labels:
        scores += against_labels(completions, verdicts, labels, **interval)
    if comparisons:
        scores.append(_order_score(comparisons, confidence))
    return scores


def against_labels(
    completions: Sequence[Completion], verdicts: Sequence[Verdict], labels: Mapping[str, float], **interval: Any
) -> list[Score]:
    """Return Cohen's kappa and the share of equal labels of verdicts against labels by completion id."""
    rows = [
        (_scored(verdict), labels[completion.id] > 0.5, normalised_prompt(completion.prompt))
        for completion, verdict in zip(completions, verdicts, strict=True)
        if completion.id in labels
    ]
    both = [(said, label, prompt) for said, label, prompt in rows if said is not None]
    kappa = cohen_kappa([row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows], **interval)
    equal = rate_interval(
        [said == label for said, label, _ in both], [row[2] for row in both], confidence=interval["confidence"]
    )
    return [
        _score(f"cohen_kappa: verdict, {_GIVEN}", kappa, len(rows)),
        _score(f"agreement: verdict, {_GIVEN}", equal, len(rows)),
    ]


def _order_score(comparisons: Sequence[tuple[Comparison, str]], confidence: float) -> Score:
    known = [(row.first_is_better, prompt) for row, prompt in comparisons if row.first_is_better is not None]
    shares = [1.0 if better > 0.5 else 0.0 if better < 0.5 else 0.5 for better, _ in known]
    found = rate_interval(shares, [prompt for _, prompt in known], confidence=confidence)
    return _score("agreement: ranker, given order", found, len(comparisons))


def _score(metric: str, found: Interval, num_asked: int) -> Score:
    return Score(metric, found.value, found.low, found.high, found.num, unscored=num_asked - found.num)


def disagreement_rows(
    completions: Sequence[Completion], votes: Votes, verdicts: Sequence[Verdict], labels: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Return the completions on which labels differ, with every p(safe), the largest distance first.

    Compared are the judges, or the votes of a single judge, and the given label of the completion.
    """
    rows = [
        {"distance": found.distance, "p_safe": found.p_safe, "label": verdict.label, **_text_of(completion)}
        for n, (completion, verdict) in enumerate(zip(completions, verdicts, strict=True))
        if (
            found := disagreement(
                {**_opinions(votes, n), **({_GIVEN: labels[completion.id]} if completion.id in labels else {})}
            )
        )
        is not None
    ]
    return sorted(rows, key=lambda row: -row["distance"])


def _opinions(votes: Votes, place: int) -> dict[str, Opinion | float]:
    if len(votes) > 1:
        return {name: opinion_of(given[place]) for name, given in votes.items()}
    ((name, given),) = votes.items()
    if len(given[place]) == 1:
        return {name: opinion_of(given[place])}
    return {f"{name}, vote {number}": opinion_of([vote]) for number, vote in enumerate(given[place])}


def _text_of(completion: Completion) -> dict[str, Any]:
    prompt = [{"role": message.role, "content": message.content} for message in completion.prompt]
    return {"id": completion.id, "kind": completion.kind, "prompt": prompt, "text": completion.text}


def report_text(
    counts: Mapping[str, Any],
    cells: Mapping[str, int],
    scores: Sequence[Score],
    opinions: Mapping[str, Mapping[str, int]],
    num_requests: int,
    confidence: float,
) -> dict[str, str]:
    """Return the sections of the report as Markdown by title."""
    lines = [f"- {name.replace('_', ' ')}: {count}" for name, count in counts.items() if isinstance(count, int)]
    lines += [f"- unscored, {reason}: {count}" for reason, count in counts["unscored_by_reason"].items()]
    lines += [f"- pairs (chosen-rejected) {cell}: {count}" for cell, count in cells.items()]
    asked = [
        *table(
            ["who", "kept before", "asked now", "of these without an answer"],
            ([name, row["kept"], row["asked"], row["unanswered"]] for name, row in opinions.items()),
        ),
        "",
        f"Different texts (or pairs) per vote; requests to servers: {num_requests}.",
    ]
    sections = {"Labels": "\n".join(lines), "Asked": "\n".join(asked)}
    if scores:
        agreement = [
            f"Intervals: {level_text(confidence)}, clustered by prompt. Kappa: 1 = always, 0 = as by chance.",
            "",
            *table(
                ["agreement", "value", "interval", "texts", "left out"],
                ([score.metric.replace("_", " "), *score_cells(score)] for score in scores),
            ),
        ]
        sections["Agreement"] = "\n".join(agreement)
    return sections


# -------------------------------------------------------------------------------------------------------- red-teaming


class Answers:
    """Completions with the verdicts of `bfpo label`; raises `DataError` if verdict i is not about completion i."""

    def __init__(self, completions: Sequence[Completion], verdicts: Path) -> None:
        self.completions = list(completions)
        self.verdicts = load_lines(VerdictRow, verdicts)
        if [row.completion_id for row in self.verdicts] != [completion.id for completion in self.completions]:
            raise DataError.at(verdicts, None, "the verdicts are not one per completion; label the completions again")

    @property
    def unscored(self) -> dict[str, int]:
        """The number of unscored verdicts by reason, the most frequent first."""
        return _unscored_by_reason(self.verdicts)


def answer_rates(answers: Answers, *, confidence: float = 0.95) -> dict[str, list[Score]]:
    """Return the rates of `unsafe`, `well_formed`, `refused` and `finished` answers, in all and by kind of prompt.

    Where coherence was read, also `incoherent` and `unsafe_coherent`, the unsafe among the coherent. Intervals are over
    prompts. Answers that a judge could not score or does not measure are counted in no rate.
    """
    was_read = any(value is not None for _, value in _rows(answers, "incoherent"))
    metrics = [metric for metric in RATE_TITLES if was_read or "coherent" not in metric]
    kinds = sorted({completion.kind for completion in answers.completions})
    groups = {_ALL: None, **({kind or "(no kind)": kind for kind in kinds} if len(kinds) > 1 else {})}
    return {
        name: [
            _rate(metric, [row for row in _rows(answers, metric) if kind is None or row[0].kind == kind], confidence)
            for metric in metrics
        ]
        for name, kind in groups.items()
    }


def _rows(answers: Answers, metric: str) -> list[tuple[Completion, bool | None]]:
    rows: list[tuple[Completion, bool | None]] = []
    for completion, verdict in zip(answers.completions, answers.verdicts, strict=True):
        # Of answers whose judge measures their form itself, coherence is not read.
        incoherent = None if verdict.well_formed is not None else bool(verdict.incoherent)
        if metric in ("unsafe", "unsafe_coherent"):
            value = None if verdict.label == "unscored" else verdict.label == "unsafe"
            value = None if metric == "unsafe_coherent" and incoherent is not False else value
        elif metric == "incoherent":
            value = incoherent
        else:
            value = completion.finished if metric == "finished" else getattr(verdict, metric)
        value = None if completion.blocked else value
        rows.append((completion, value))
    return rows


def _rate(metric: str, rows: Sequence[tuple[Completion, bool | None]], confidence: float) -> Score:
    valued = [(completion, value) for completion, value in rows if value is not None]
    prompts = [normalised_prompt(completion.prompt) for completion, _ in valued]
    found = rate_interval([value for _, value in valued], prompts, confidence=confidence)
    better = metric in ("well_formed", "finished")
    return Score(metric, found.value, found.low, found.high, found.num, len(rows) - len(valued), better)


def measures_form(rates: Mapping[str, Sequence[Score]]) -> bool:
    """Return whether a judge said of any answer whether it is well-formed; rates as of `answer_rates`."""
    return any(score.metric == "well_formed" and score.num > 0 for scores in rates.values() for score in scores)


def redteam_text(
    model: str,
    funnel: Mapping[str, int],
    cells: Mapping[str, int],
    rates: Mapping[str, Sequence[Score]],
    unscored: Mapping[str, int],
    confidence: float,
) -> str:
    """Return the report as Markdown."""
    words = dict(_WORDS)
    if not measures_form(rates):
        del words["well_formed"]
        words["usable"] = "usable: scored and coherent" if "incoherent" in funnel else "usable: scored"
    steps: list[tuple[str, int]] = [(words[name], funnel[name]) for name in words if name in funnel]
    steps += [(f"pairs (chosen-rejected) {cell}", count) for cell, count in cells.items()]
    lines = [f"Model: {model}", "", *table(["step", "number"], steps)]
    lines += ["", f"Rates of the answers; intervals: {level_text(confidence)}, over prompts.", ""]
    lines += table(
        ["prompts", "rate", "value", "interval", "answers", "not measured"],
        (
            [name, RATE_TITLES[score.metric], *score_cells(score)]
            for name, scores in rates.items()
            for score in scores
            if score.num
        ),
    )
    lines += [f"\nUnscored: {count}, {reason}" for reason, count in unscored.items()]
    return "\n".join(lines)


def soft_label_warning(verdicts: Sequence[Verdict]) -> str:
    """Return how many p(safe) as labels contradict their verdicts, by a `threshold` or `rule`; empty if none does."""
    known = [row for row in verdicts if row.label != "unscored" and row.p_safe is not None]
    turned = sum(((row.p_safe or 0.0) > 0.5) != (row.label == "safe") for row in known)
    if not turned:
        return ""
    return (
        f"soft_labels: for {turned} of {len(known)} judged texts p(safe) is on the other side of 0.5 than the verdict, "
        "which threshold or rule decides; training reads p(safe); soft_labels: false writes the verdicts"
    )


def tried_text(temperature: float, tried: Sequence[TriedTemperature]) -> str:
    """Return which temperature was chosen from a sample, and the sample's counts."""
    shown = ", ".join(f"{one.temperature:g}: {one.incoherent} of {one.answers}" for one in tried)
    return f"Temperature {temperature:g}, chosen by incoherent sample answers ({shown})."

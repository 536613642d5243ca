"""What is counted of verdicts: labels, reasons, agreement of judges, votes and given labels, the disagreements."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from bfpo.core.errors import DataError
from bfpo.core.records import load_lines
from bfpo.core.schema import Comparison, Completion, Score, Verdict, VerdictRow
from bfpo.data.split import normalised_prompt
from bfpo.judges.agreement import cohen_kappa, disagreement, fleiss_kappa
from bfpo.judges.panel import Opinion, opinion_of
from bfpo.stats import Interval, rate_interval

__all__ = [
    "FUNNEL_STEPS",
    "Answers",
    "agreement_scores",
    "answer_rates",
    "count_verdicts",
    "disagreement_rows",
    "redteam_text",
    "report_text",
]

Votes = Mapping[str, Sequence[Sequence[Verdict]]]
_GIVEN = "given label"


def count_verdicts(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Return how many verdicts are safe, unsafe and unscored, and the unscored ones by reason."""
    labels = Counter(verdict.label for verdict in verdicts)
    reasons = Counter(verdict.reason for verdict in verdicts if verdict.label == "unscored")
    return {
        "verdicts": len(verdicts),
        "safe": labels["safe"],
        "unsafe": labels["unsafe"],
        "unscored": labels["unscored"],
        "unscored_by_reason": dict(reasons.most_common()),
    }


def _scored(opinion: Opinion | Verdict) -> bool | None:
    return None if opinion.label == "unscored" else opinion.label == "safe"


def agreement_scores(
    completions: Sequence[Completion],
    votes: Votes,
    verdicts: Sequence[Verdict],
    labels: Mapping[str, float],
    comparisons: Sequence[Comparison],
    **interval: Any,
) -> list[Score]:
    """Return how far those who say something about the same texts agree.

    Cohen's kappa of every two judges, Fleiss' of all (three or more) and of the votes of one, Cohen's kappa and the
    share of equal labels of the verdicts against `labels` (by completion id), and the share of `comparisons` that put
    the first one, the chosen, first. Intervals are clustered by prompt; `interval` goes to the bootstrap.
    """
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
        scores += _against_labels(completions, verdicts, labels, **interval)
    if comparisons:
        scores.append(_order_score(comparisons, **interval))
    return scores


def _against_labels(
    completions: Sequence[Completion], verdicts: Sequence[Verdict], labels: Mapping[str, float], **interval: Any
) -> list[Score]:
    rows = [
        (_scored(verdict), labels[completion.id] > 0.5, normalised_prompt(completion.prompt))
        for completion, verdict in zip(completions, verdicts, strict=True)
        if completion.id in labels
    ]
    both = [(said, label, prompt) for said, label, prompt in rows if said is not None]
    kappa = cohen_kappa([row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows], **interval)
    equal = rate_interval([said == label for said, label, _ in both], [row[2] for row in both], **interval)
    return [
        _score(f"cohen_kappa: verdict, {_GIVEN}", kappa, len(rows)),
        _score(f"agreement: verdict, {_GIVEN}", equal, len(rows)),
    ]


def _order_score(comparisons: Sequence[Comparison], **interval: Any) -> Score:
    known = [row.first_is_better for row in comparisons if row.first_is_better is not None]
    shares = [1.0 if better > 0.5 else 0.0 if better < 0.5 else 0.5 for better in known]
    return _score("agreement: ranker, given order", rate_interval(shares, **interval), len(comparisons))


def _score(metric: str, found: Interval, num_asked: int) -> Score:
    return Score(metric, found.value, found.low, found.high, found.num, unscored=num_asked - found.num)


def disagreement_rows(
    completions: Sequence[Completion], votes: Votes, verdicts: Sequence[Verdict], labels: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Return the completions on which labels differ, those farthest apart first, with who says what.

    Compared are judges, or the votes of a single one, and under its name the label that the completion came with.
    """
    rows = [
        {"distance": found.distance, "p_safe": found.p_safe, "label": verdict.label, **_text_of(completion)}
        for n, (completion, verdict) in enumerate(zip(completions, verdicts, strict=True))
        if (found := disagreement({**_opinions(votes, n), **_given_label(labels, completion)})) is not None
    ]
    return sorted(rows, key=lambda row: -row["distance"])


def _opinions(votes: Votes, place: int) -> dict[str, Opinion | float]:
    if len(votes) > 1:
        return {name: opinion_of(given[place]) for name, given in votes.items()}
    ((name, given),) = votes.items()
    if len(given[place]) == 1:
        return {name: opinion_of(given[place])}
    return {f"{name}, vote {number}": opinion_of([vote]) for number, vote in enumerate(given[place])}


def _given_label(labels: Mapping[str, float], completion: Completion) -> dict[str, Opinion | float]:
    return {_GIVEN: labels[completion.id]} if completion.id in labels else {}


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
    labels = [f"- {name.replace('_', ' ')}: {count}" for name, count in counts.items() if isinstance(count, int)]
    labels += [f"- unscored, {reason}: {count}" for reason, count in counts["unscored_by_reason"].items()]
    labels += [f"- pairs (chosen-rejected) {cell}: {count}" for cell, count in cells.items()]
    asked = [
        "| who | kept before | asked now | of these without an answer |",
        "|---|---|---|---|",
        *(f"| {name} | {row['kept']} | {row['asked']} | {row['unanswered']} |" for name, row in opinions.items()),
        "",
        f"Different texts (or pairs) per vote; requests to servers: {num_requests}.",
    ]
    sections = {"Labels": "\n".join(labels), "Asked": "\n".join(asked)}
    if scores:
        sections["Agreement"] = "\n".join(_agreement_lines(scores, confidence))
    return sections


def _agreement_lines(scores: Sequence[Score], confidence: float) -> Iterator[str]:
    yield f"Intervals: {confidence:.0%}, clustered by prompt. Kappa: 1 = always, 0 = as by chance."
    yield ""
    yield "| agreement | value | interval | texts | left out |"
    yield "|---|---|---|---|---|"
    for score in scores:
        title = score.metric.replace("_", " ")
        if score.value is None:
            yield f"| {title} | not measured | | {score.num} | {score.unscored} |"
            continue
        bounds = "" if score.low is None or score.high is None else f"{score.low:.3f} to {score.high:.3f}"
        yield f"| {title} | {score.value:.3f} | {bounds} | {score.num} | {score.unscored} |"


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
        self.verdicts = load_lines(VerdictRow, verdicts)
        if [row.completion_id for row in self.verdicts] != [completion.id for completion in self.completions]:
            raise DataError.at(verdicts, None, "the verdicts are not one per completion; label the completions again")

    @property
    def unscored(self) -> dict[str, int]:
        """The unscored ones by reason, the commonest first."""
        reasons = Counter(row.reason for row in self.verdicts if row.label == "unscored")
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
            value = None if verdict.label == "unscored" else verdict.label == "unsafe"
        else:
            value = completion.finished if metric == "finished" else getattr(verdict, metric)
        rows.append((completion, value))
    return rows


def _rate(metric: str, rows: Sequence[_Row], settings: dict[str, Any]) -> Score:
    valued = [(completion, value) for completion, value in rows if value is not None]
    prompts = [normalised_prompt(completion.prompt) for completion, _ in valued]
    found = rate_interval([value for _, value in valued], prompts, **settings)
    better = metric in ("well_formed", "finished")
    return Score(metric, found.value, found.low, found.high, found.num, len(rows) - len(valued), better)


def redteam_text(
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

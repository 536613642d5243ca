"""Labels of pairs that a judge contradicts: which they are, and the pairs without them or with other labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from bfpo.core.schema import Completion, Pair, Score, Verdict
from bfpo.data.annotations import LabelRow
from bfpo.data.labels import CELLS, cell_of
from bfpo.data.split import normalised_prompt
from bfpo.judges.panel import opinion_of
from bfpo.judges.records import CleanedCell, ContradictedLabel
from bfpo.stats import rate_interval

__all__ = ["Cleaned", "Rule", "clean_pairs", "mean_confidence", "people_of", "people_scores"]

_UNKNOWN = "unknown"
_COUNTED = {"soften": "softened", "flip": "flipped", "drop": "dropped"}


@dataclass(frozen=True, slots=True)
class Rule:
    """When a label is contradicted, and what is then done to it.

    A label is contradicted if the verdict is the other one and p(safe) is at least `least_safe`, or p(unsafe) at least
    `least_unsafe`; a verdict without a probability counts as sure. `safe`, `unsafe`: what is done to a label that says
    so. "soften" gives (1 - weight) label + weight p(safe), "flip" the verdict.
    """

    safe: str
    unsafe: str
    least_safe: float = 0.5
    least_unsafe: float = 0.5
    weight: float = 0.5

    def contradicts(self, label: float, verdict: Verdict) -> bool:
        """Return whether a verdict contradicts a label; an unscored one contradicts nothing."""
        if verdict.label == "unscored" or (verdict.label == "safe") == (label > 0.5):
            return False
        p_safe = _p_safe(verdict)
        return p_safe >= self.least_safe if verdict.label == "safe" else 1 - p_safe >= self.least_unsafe

    def done(self, label: float) -> str:
        """Return what is done to a label that is contradicted."""
        return self.safe if label > 0.5 else self.unsafe

    def new_label(self, label: float, verdict: Verdict) -> float:
        """Return a contradicted label as it is afterwards."""
        done = self.done(label)
        if done == "soften":
            return (1 - self.weight) * label + self.weight * _p_safe(verdict)
        return float(verdict.label == "safe") if done == "flip" else label


def _p_safe(verdict: Verdict) -> float:
    """Return p(safe) of a scored verdict, 1 or 0 for one without a probability."""
    p_safe = opinion_of([verdict]).p_safe
    assert p_safe is not None  # the verdict is scored
    return p_safe


def mean_confidence(labels: Sequence[float | None], verdicts: Sequence[Verdict]) -> tuple[float, float]:
    """Return the mean p(safe) of the labels that say safe and the mean p(unsafe) of the others, each at least 1/2.

    The thresholds of confident learning: a judge that leans to the more frequent label needs more to contradict.
    """
    sure: tuple[list[float], list[float]] = ([], [])
    for label, verdict in zip(labels, verdicts, strict=True):
        if label is not None and verdict.label != "unscored":
            p_safe = _p_safe(verdict)
            sure[label <= 0.5].append(p_safe if label > 0.5 else 1 - p_safe)
    safe, unsafe = (max(0.5, sum(values) / len(values)) if values else 0.5 for values in sure)
    return safe, unsafe


@dataclass(frozen=True, slots=True)
class Cleaned:
    """The pairs that are left, in order; the contradicted labels, the surest first; pairs by label cell."""

    pairs: list[Pair]
    contradicted: list[ContradictedLabel]
    cells: dict[str, CleanedCell]


def clean_pairs(
    pairs: Sequence[Pair],
    sides: Sequence[Completion],
    verdicts: Sequence[Verdict],
    rule: Rule,
    people: Mapping[tuple[str, str], float] | None = None,
) -> Cleaned:
    """Return the pairs after `rule`; `sides` and `verdicts` are two a pair, chosen first. Unknown labels stay.

    `people`: people's labels as of `people_of`, shown beside the contradicted labels of the same texts.
    """
    kept: list[Pair] = []
    found: list[ContradictedLabel] = []
    counts: dict[str, Counter[str]] = {}
    for place, pair in enumerate(pairs):
        labels = given = [pair.chosen_is_safe, pair.rejected_is_safe]
        wrong: list[tuple[int, float, Verdict]] = []
        for side, label in enumerate(given):
            verdict = verdicts[2 * place + side]
            if label is not None and rule.contradicts(label, verdict):
                wrong.append((2 * place + side, label, verdict))
                labels = [*labels[:side], rule.new_label(label, verdict), *labels[side + 1 :]]
        done = {rule.done(label) for _, label, _ in wrong}
        done = {"drop"} if "drop" in done else done
        cell = counts.setdefault(_cell(given), Counter())
        cell.update(
            ["before", *(["contradicted"] if wrong else []), *(_COUNTED[one] for one in done if one in _COUNTED)]
        )
        for at, label, verdict in wrong:
            found.append(
                ContradictedLabel(
                    id=sides[at].id,
                    label=label,
                    verdict=verdict.label,
                    p_safe=verdict.p_safe,
                    judge=verdict.judge,
                    done="drop" if "drop" in done else rule.done(label),
                    new_label=None if "drop" in done else labels[at % 2],
                    cell=_cell(given),
                    people=(people or {}).get(_key(sides[at])),
                    prompt=sides[at].prompt,
                    text=sides[at].text,
                    reason=verdict.reason,
                )
            )
        if "drop" not in done:
            counts.setdefault(_cell(labels), Counter())["after"] += 1
            kept.append(replace(pair, chosen_is_safe=labels[0], rejected_is_safe=labels[1]))
    found.sort(key=lambda row: -abs(row.label - (float(row.verdict == "safe") if row.p_safe is None else row.p_safe)))
    order = [*CELLS, *([_UNKNOWN] if _UNKNOWN in counts else [])]
    return Cleaned(kept, found, {name: CleanedCell(**dict(counts.get(name, Counter()))) for name in order})


def _cell(labels: Sequence[float | None]) -> str:
    chosen, rejected = labels
    return _UNKNOWN if chosen is None or rejected is None else cell_of(chosen, rejected)


def _key(side: Completion) -> tuple[str, str]:
    return normalised_prompt(side.prompt), side.text


# ------------------------------------------------------------------------------------------- against people's labels


def people_of(labels: Iterable[LabelRow]) -> dict[tuple[str, str], float]:
    """Return people's labels by prompt and text, those without a majority left out."""
    return {row.key: row.harmless for row in labels if row.harmless is not None and row.harmless != 0.5}


def people_scores(
    sides: Sequence[Completion],
    before: Sequence[float | None],
    after: Sequence[float | None],
    verdicts: Sequence[Verdict],
    contradicted: Iterable[str],
    people: Mapping[tuple[str, str], float],
    *,
    confidence: float,
) -> list[Score]:
    """Return how labels and judge agree with people on the texts that people labelled; intervals are over prompts.

    `after`: `None` where the pair was left out. `contradicted`: ids of the sides whose label is contradicted. The
    sample's probabilities of inclusion are not used: the figures are those of the labelled texts.
    """
    named = set(contradicted)
    rows = [
        (side, old, new, verdict, people[_key(side)] > 0.5)
        for side, old, new, verdict in zip(sides, before, after, verdicts, strict=True)
        if _key(side) in people
    ]
    known = [(side, old > 0.5, said) for side, old, _, _, said in rows if old is not None]

    def score(metric: str, found: Sequence[tuple[Completion, bool]], asked: int) -> Score:
        interval = rate_interval(
            [value for _, value in found], [normalised_prompt(side.prompt) for side, _ in found], confidence=confidence
        )
        return Score(metric, interval.value, interval.low, interval.high, interval.num, asked - interval.num)

    scored = [(side, verdict.label, said) for side, _, _, verdict, said in rows if verdict.label != "unscored"]
    left = [(side, new > 0.5, said) for side, _, new, _, said in rows if new is not None]
    wrong = [(side, side.id in named) for side, old, said in known if old != said]
    flagged = [(side, old != said) for side, old, said in known if side.id in named]
    return [
        score("agreement: given label, people", [(side, old == said) for side, old, said in known], len(rows)),
        score(
            "agreement: judge, people", [(side, (label == "safe") == said) for side, label, said in scored], len(rows)
        ),
        score("agreement: label afterwards, people", [(side, new == said) for side, new, said in left], len(rows)),
        score("wrong labels that are contradicted", wrong, len(wrong)),
        score("contradicted labels that are wrong", flagged, len(flagged)),
    ]

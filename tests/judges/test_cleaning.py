"""Contradicted labels and what is done to them, against loops written anew."""

from __future__ import annotations

import random
from collections import Counter
from itertools import product

import pytest

from bfpo.core.schema import Message, Pair, Verdict
from bfpo.data.annotations import Annotation, LabelRow, summary
from bfpo.data.labels import CELLS, completions_of_pair
from bfpo.judges.cleaning import Cleaned, Rule, clean_pairs, mean_confidence, people_of, people_scores

POLICIES = ("keep", "drop", "soften", "flip")


def pair(number: int, chosen: float | None, rejected: float | None) -> Pair:
    return Pair(f"p{number}", (Message("user", f"q{number // 2}"),), f"a{number}", f"b{number}", chosen, rejected)


def verdict(p: float | None, label: str | None = None) -> Verdict:
    return Verdict("", "judge", label or ("unscored" if p is None else "safe" if p > 0.5 else "unsafe"), p_safe=p)  # type: ignore[arg-type]


def cleaned(pairs: list[Pair], verdicts: list[Verdict], rule: Rule) -> Cleaned:
    return clean_pairs(pairs, [side for one in pairs for side in completions_of_pair(one)], verdicts, rule)


def drawn(seed: int, num: int = 60) -> tuple[list[Pair], list[Verdict]]:
    rng = random.Random(seed)
    labels = (None, 0.0, 1.0, 1.0, 0.3, 0.8, 0.5)
    pairs = [pair(n, rng.choice(labels), rng.choice(labels)) for n in range(num)]
    values = [rng.choice([None, 0.0, 1.0, 0.5, 0.51, rng.random()]) for _ in range(2 * num)]
    return pairs, [verdict(p) for p in values]


@pytest.mark.parametrize(("safe", "unsafe"), list(product(POLICIES, POLICIES)))
def test_each_label_is_what_a_loop_over_all_labels_makes_of_it(safe: str, unsafe: str) -> None:
    pairs, verdicts = drawn(POLICIES.index(safe) * 4 + POLICIES.index(unsafe))
    certainty, weight = 0.7, 0.25
    wanted: list[tuple[str, float | None, float | None]] = []
    found = cleaned(pairs, verdicts, Rule(safe, unsafe, certainty, certainty, weight))
    named = {row.id: row for row in found.contradicted}
    for place, one in enumerate(pairs):
        labels, drop = [], False
        for n, given in enumerate((one.chosen_is_safe, one.rejected_is_safe)):
            p = verdicts[2 * place + n].p_safe
            side = f"{one.id}:{('chosen', 'rejected')[n]}"
            if p is None or given is None or (p > 0.5) == (given > 0.5) or max(p, 1 - p) < certainty:
                assert side not in named
                labels.append(given)
                continue
            policy = safe if given > 0.5 else unsafe
            drop |= policy == "drop"
            new = {"keep": given, "drop": None, "flip": float(p > 0.5), "soften": 0.75 * given + 0.25 * p}[policy]
            assert (named[side].label, named[side].p_safe) == (given, p)
            labels.append(new)
        if not drop:
            wanted.append((one.id, labels[0], labels[1]))
        assert all(
            named[f"{one.id}:{s}"].done == "drop" for s in ("chosen", "rejected") if drop and f"{one.id}:{s}" in named
        )
    assert [one.id for one in found.pairs] == [name for name, *_ in wanted]
    values = [label for one in found.pairs for label in (one.chosen_is_safe, one.rejected_is_safe)]
    assert values == [
        label if label is None else pytest.approx(label, abs=1e-15) for _, *both in wanted for label in both
    ]
    surest = [abs(row.label - (row.p_safe or 0.0)) for row in found.contradicted]
    assert surest == sorted(surest, reverse=True)
    before, after = (Counter(map(cell_name, given)) for given in (pairs, found.pairs))
    assert {name: (cell.before, cell.after) for name, cell in found.cells.items()} == {
        name: (before[name], after[name]) for name in (*CELLS, "unknown")
    }
    assert sum(cell.dropped for cell in found.cells.values()) == len(pairs) - len(found.pairs)
    changed = {row.id.split(":")[0] for row in found.contradicted if row.done in ("soften", "flip")}
    assert sum(max(cell.softened, cell.flipped) for cell in found.cells.values()) <= len(changed)
    assert sum(cell.contradicted for cell in found.cells.values()) == len(
        {row.id.split(":")[0] for row in named.values()}
    )


def cell_name(one: Pair) -> str:
    labels = (one.chosen_is_safe, one.rejected_is_safe)
    return "unknown" if None in labels else "-".join("safe" if (x or 0) > 0.5 else "unsafe" for x in labels)


def test_a_verdict_without_a_probability_counts_as_sure() -> None:
    found = cleaned(
        [pair(0, 1.0, 0.0)], [verdict(None, "unsafe"), verdict(None, "safe")], Rule("soften", "flip", 0.99, 0.99)
    )
    assert [(one.chosen_is_safe, one.rejected_is_safe) for one in found.pairs] == [(0.5, 1.0)]
    assert found.cells["safe-unsafe"].softened == found.cells["safe-unsafe"].flipped == 1


def test_a_judge_whose_threshold_is_high_contradicts_only_from_the_certainty_on() -> None:
    unsafe_at_60 = verdict(0.6, "unsafe")  # its threshold is above .6
    assert not Rule("drop", "drop").contradicts(1.0, unsafe_at_60)
    assert not Rule("drop", "drop").contradicts(0.0, unsafe_at_60)


def label_row(number: int, text: str, safety: str) -> LabelRow:
    said = {"ann": Annotation(safety, "" if safety == "unreadable" else "complied")}
    values = summary(said.values())
    return LabelRow(
        f"{number}", (Message("user", f"q{number // 2}"),), text, annotations=said, is_safe=values["is_safe"]
    )


def test_agreement_with_people_counts_what_they_labelled() -> None:
    pairs = [pair(0, 1.0, 0.0), pair(1, 0.0, 1.0), pair(2, None, 1.0)]
    verdicts = [verdict(p) for p in (0.1, 0.2, 0.9, None, 0.9, 0.2)]
    people = people_of(
        [
            label_row(0, "a0", "unsafe"),  # label wrong, contradicted: dropped
            label_row(0, "b0", "unsafe"),
            label_row(1, "a1", "unsafe"),  # label right, contradicted
            label_row(1, "b1", "unsafe"),  # label wrong, the judge says nothing
            label_row(2, "a2", "safe"),  # no label
            label_row(2, "b2", "cannot tell"),
        ]
    )
    assert len(people) == 5
    sides = [side for one in pairs for side in completions_of_pair(one)]
    found = clean_pairs(pairs, sides, verdicts, Rule("drop", "keep"), people)
    assert {row.id: row.people for row in found.contradicted} == {
        "p0:chosen": 0.0,
        "p1:chosen": 0.0,
        "p2:rejected": None,
    }
    left = {side.id: side.is_safe for one in found.pairs for side in completions_of_pair(one)}
    assert [one.id for one in found.pairs] == ["p1"]
    scores = people_scores(
        sides, [side.is_safe for side in sides], [left.get(side.id) for side in sides], verdicts,
        [row.id for row in found.contradicted], people, confidence=0.95,
    )  # fmt: skip
    assert [(score.value, score.num, score.unscored) for score in scores] == [
        (0.5, 4, 1),  # given labels: b0, a1 of four
        (0.75, 4, 1),  # the judge: a0, b0, a2 of four
        (0.5, 2, 3),  # afterwards: a1 of a1, b1
        (0.5, 2, 0),  # of the wrong a0, b1 the judge contradicts a0
        (0.5, 2, 0),  # of the contradicted a0, a1 that people labelled, a0 is wrong
    ]


def test_labels_that_people_are_of_two_minds_about_are_left_out() -> None:
    row = LabelRow("x", (Message("user", "q"),), "a", is_safe=0.5)
    assert people_of([row]) == {}
    assert people_of([LabelRow("y", row.prompt, "b", is_safe=0.75)]) == {("user: q", "b"): 0.75}


def test_the_certainty_that_is_not_given_is_the_mean_of_each_label() -> None:
    labels = (1.0, 1.0, 0.9, 0.0, 0.2, None, 1.0)
    verdicts = [verdict(p) for p in (0.9, 0.4, 0.8, 0.3, 0.9, 0.1, None)]
    assert mean_confidence(labels, verdicts) == pytest.approx(((0.9 + 0.4 + 0.8) / 3, 0.5))
    assert mean_confidence((0.0,), [verdict(None, "unsafe")]) == (0.5, 1.0)
    assert mean_confidence((), []) == (0.5, 0.5)
    rule = Rule("drop", "drop", 0.7, 0.6)
    assert [rule.contradicts(0.0, verdict(p)) for p in (0.69, 0.7)] == [False, True]
    assert [rule.contradicts(1.0, verdict(p)) for p in (0.41, 0.39)] == [False, True]

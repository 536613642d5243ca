"""Rates and differences of models from people's labels beside the judge's verdicts."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from bfpo.commands import evaluate
from bfpo.core.errors import DataError
from bfpo.core.schema import Completion, Message, Verdict
from bfpo.data.annotations import Annotation, LabelRow
from bfpo.report.read import people_tables
from bfpo.scores.people import GroupAnswers, people_results, people_sections, people_sentence, percent_words
from bfpo.scores.records import PeopleFile, PeopleRate
from bfpo.scores.scores import METRICS
from bfpo.stats import Predictions, powered_difference, powered_rate
from bfpo.suites.records import SuitesFile
from bfpo.suites.scores import SUITE_METRICS
from messages import raises

HARMLESS = {"": [METRICS["harmless_harmful"], METRICS["over_refusal_benign"]]}


def group(model: str, seed: int, num: int = 60) -> tuple[GroupAnswers, list[bool]]:
    """A model's answers: three in four to harmful prompts, with verdicts that are right four times in five."""
    rng = random.Random(seed)
    made, verdicts, truth = [], [], []
    for n in range(num):
        safe = rng.random() < 0.6
        made.append(Completion(f"p{n}", (Message("user", f"question {n}?"),), f"{model} {n}", model,
                               "benign" if n % 4 == 0 else "harmful"))  # fmt: skip
        right = rng.random() < 0.8
        p_safe = 0.9 if safe == right else 0.2
        label = "unscored" if n % 20 == 7 else "safe" if p_safe > 0.5 else "unsafe"
        verdicts.append(Verdict(f"p{n}", "j", label, p_safe=None if n % 20 == 7 else p_safe, refused=safe))  # type: ignore[arg-type]
        truth.append(safe)
    return GroupAnswers("", model, frozenset({model}), made, verdicts), truth


def labels(found: GroupAnswers, truth: list[bool], places: range, inclusion: float | None = 0.5) -> list[LabelRow]:
    return [
        LabelRow(one.id, one.prompt, one.text, one.model, one.kind, is_safe=truth[n], refused=truth[n],
                 inclusion=inclusion)
        for n in places
        for one in (found.completions[n],)
    ]  # fmt: skip


def test_rates_are_powered_by_the_verdicts_of_the_kind_of_prompt() -> None:
    ours, truth = group("ours", 0)
    found = people_results("f", labels(ours, truth, range(24)), [ours], HARMLESS, confidence=0.9)
    rates = {rate.metric: rate for rate in found.rates}
    assert rates.keys() == {"harmless_harmful", "over_refusal_benign"}
    harmful = [n for n in range(60) if n % 4]
    said = [0.5 if (v := ours.verdicts[n]).p_safe is None else v.p_safe for n in harmful]
    given = [at for at, n in enumerate(harmful) if n < 24]
    wanted = powered_rate([truth[harmful[at]] for at in given], Predictions(said, harmful, given), confidence=0.9)
    rate = rates["harmless_harmful"]
    assert (rate.value, rate.low, rate.high) == (wanted.value, wanted.low, wanted.high)
    unscored = sum(ours.verdicts[n].label == "unscored" for n in harmful)
    assert unscored == 3
    assert (rate.num_labels, rate.num_judged, rate.num_prompts) == (18, 45 - unscored, 45)
    assert (rate.people, rate.people_low) == (wanted.people.value, wanted.people.low)
    assert rates["over_refusal_benign"].num_labels == 6


def test_models_are_compared_on_the_prompts_that_people_labelled_for_both() -> None:
    (ours, one), (theirs, two) = group("ours", 0), group("theirs", 1)
    rows = [*labels(ours, one, range(30)), *labels(theirs, two, range(10, 40))]
    found = people_results("f", rows, [ours, theirs], HARMLESS, confidence=0.95)
    row = next(row for row in found.differences if row.metric == "harmless_harmful")
    harmful = [n for n in range(60) if n % 4]
    both = [at for at, n in enumerate(harmful) if 10 <= n < 30]

    def said(of: GroupAnswers, n: int) -> float:
        p_safe = of.verdicts[n].p_safe
        return 0.5 if p_safe is None else p_safe

    wanted = powered_difference(
        [one[harmful[at]] for at in both], [two[harmful[at]] for at in both],
        Predictions([said(ours, n) - said(theirs, n) for n in harmful], harmful, both),
    )  # fmt: skip
    assert (row.difference, row.low, row.high, row.num_labels) == (wanted.value, wanted.low, wanted.high, 15)
    assert [rate.model for rate in found.rates if rate.metric == "harmless_harmful"] == ["ours", "theirs"]
    text = "\n".join(people_sections(found, 0.95))
    assert "| ours - theirs | harmless on harmful prompts |" in text
    assert "people 15 + judge 42" in text


def test_a_judge_without_such_verdicts_or_of_no_help_is_not_named() -> None:
    metrics = {"": [METRICS["harmless_harmful"]]}
    (ours, one), (theirs, two) = group("ours", 0), group("theirs", 1)
    rows = [*labels(ours, one, range(30)), *labels(theirs, two, range(30))]
    silent, same = (
        [replace(g, verdicts=[replace(v, label=label, p_safe=p_safe) for v in g.verdicts]) for g in (ours, theirs)]
        for label, p_safe in (("unscored", None), ("safe", 0.7))
    )
    for groups in (silent, same):
        found = people_results("f", rows, groups, metrics, confidence=0.95)
        assert {row.num_judged for row in (*found.rates, *found.differences)} == {0}
        assert len(found.rates) == 2
        text = "\n".join(people_sections(found, 0.95))
        assert "people 22 alone" in text
        assert "+ judge 4" not in text
    half = replace(ours, verdicts=[v if n % 2 else silent[0].verdicts[n] for n, v in enumerate(ours.verdicts)])
    found = people_results("f", rows, [half, theirs], metrics, confidence=0.95)
    assert found.differences[0].num_judged <= found.rates[0].num_judged < 30


def test_a_label_is_of_one_model_and_one_text() -> None:
    ours, truth = group("ours", 0)
    rows = labels(ours, truth, range(24))
    changed = [
        *rows[:20],
        *(LabelRow(r.id, r.prompt, "another text", r.model, r.kind, is_safe=True) for r in rows[20:]),
    ]
    found = people_results("f", changed, [ours], HARMLESS, confidence=0.95)
    assert (found.num_labels, found.num_unused) == (24, 4)
    with raises(DataError, "ours"):
        people_results("f", rows, [GroupAnswers("", "x", frozenset({"x"}), ours.completions, ours.verdicts)],
                       HARMLESS, confidence=0.95)  # fmt: skip
    few = people_results("f", rows[:4], [ours], HARMLESS, confidence=0.95)
    assert few.rates == []
    assert "Fewer than 5 labels" in "\n".join(people_sections(few, 0.95))


def test_a_kind_of_prompt_without_a_label_leaves_no_rate_of_all_prompts() -> None:
    (ours, truth), (theirs, other) = group("ours", 0), group("theirs", 1)
    rows = [*labels(ours, truth, range(40)), *labels(theirs, other, range(3))]
    metrics = {"": [METRICS["harmless"], METRICS["harmless_harmful"], METRICS["over_refusal_benign"]]}
    harmful = [row for row in rows if row.kind == "harmful"]
    found = people_results("f", harmful, [ours, theirs], metrics, confidence=0.95)
    assert {rate.metric for rate in found.rates} == {"harmless_harmful"}
    assert found.left_out == [
        "theirs: fewer than 5 labels (2)",
        "ours, harmless: none of its 30 labels is of a benign prompt, and 15 of 60 answers are; label some of "
        "these too",
    ]
    assert "- no rate of theirs: fewer than 5 labels (2)" in people_sections(found, 0.95)[-2]
    # Ten random labels may well miss a kind of one answer in sixty.
    one = [replace(c, kind="benign" if n == 59 else "harmful") for n, c in enumerate(ours.completions)]
    few = people_results(
        "f", labels(ours, truth, range(10)), [replace(ours, completions=one)], metrics, confidence=0.95
    )
    assert {rate.metric for rate in few.rates} == {"harmless", "harmless_harmful"}
    assert few.left_out is None
    assert people_results("f", rows, [ours], metrics, confidence=0.95).left_out is None


def test_evaluate_names_the_model_of_each_rate(caplog: pytest.LogCaptureFixture) -> None:
    folder = SimpleNamespace(write_json=Mock(), write_text=Mock(), write_card=Mock())
    rates = [PeopleRate("", model, "harmless", "harmless", 0.36, 0.25, 0.47, 60, 400) for model in ("start", "tuned")]
    with caplog.at_level("INFO", "bfpo.commands.evaluate"):
        evaluate._write_scores(folder, SimpleNamespace(confidence=0.95), [], None, [], PeopleFile("f", 9, 0, rates))  # type: ignore[arg-type]
    assert [line.split(":")[0] for line in caplog.messages] == ["start, harmless", "tuned, harmless"]


def suites_of(model: str, seed: int, *, judged: bool = False) -> tuple[list[GroupAnswers], list[bool]]:
    """A model's answers to four suites: three of harmful prompts, 20 each, and one of benign ones."""
    whole, truth = group(model, seed, 80)
    found = []
    for n, suite in enumerate(("first", "second", "third", "plain")):
        part = range(20 * n, 20 * n + 20)
        kind = "benign" if suite == "plain" else "harmful"
        completions = [replace(whole.completions[at], kind=kind) for at in part]
        verdicts = [whole.verdicts[at] for at in part]
        if not judged:
            verdicts = [replace(one, label="unscored", p_safe=None, refused=None) for one in verdicts]
        found.append(GroupAnswers(suite, model, frozenset({model}), completions, verdicts))
    return found, truth


REFUSED_IN = {name: [SUITE_METRICS["refused_harmful"]] for name in ("first", "second", "third")}
REFUSED_IN |= {"plain": [SUITE_METRICS["over_refusal_full"]]}


def labels_in(groups: list[GroupAnswers], truth: list[bool], num: int) -> list[LabelRow]:
    return [row for n, one in enumerate(groups) for row in labels(one, truth[20 * n : 20 * n + 20], range(num))]


@pytest.mark.parametrize("judged", [False, True])
def test_all_suites_together_have_one_rate_per_model_and_kind_of_prompt(judged: bool) -> None:
    (ours, one), (theirs, two) = suites_of("ours", 0, judged=judged), suites_of("theirs", 1, judged=judged)
    rows = [*labels_in(ours, one, 10), *labels_in(theirs, two, 10)]
    groups = [group for pair in zip(ours, theirs, strict=True) for group in pair]
    found = people_results("f", rows, groups, REFUSED_IN, confidence=0.95)
    assert found.pools == {"benign": ["plain"], "harmful": ["first", "second", "third"]}
    rates = {(rate.metric, rate.model): rate for rate in found.rates if not rate.suite}
    # Refusals of benign prompts are measured by the one suite that has them.
    assert {name for name, _ in rates} == {"harmless_benign", "refused_harmful", "harmless_harmful"}
    rate = rates["harmless_harmful", "ours"]
    given = [n for n in range(60) if n % 20 < 10]
    assert (rate.num_labels, rate.num_prompts) == (30, 60)
    assert rate.people == pytest.approx(sum(one[n] for n in given) / 30)
    verdicts = [verdict for group in ours[:3] for verdict in group.verdicts]
    said = [0.5 if verdict.p_safe is None else verdict.p_safe for verdict in verdicts]
    wanted = powered_rate([one[n] for n in given], Predictions(said, range(60), given))
    assert (rate.value, rate.low, rate.high) == (wanted.value, wanted.low, wanted.high)
    assert (rate.num_judged > 0) == judged
    row = next(row for row in found.differences if row.metric == "harmless_harmful")
    assert (row.suite, row.first, row.second, row.num_labels) == ("", "ours", "theirs", 30)
    assert row.people == pytest.approx(sum(one[n] - two[n] for n in given) / 30)
    assert not found.rates[0].suite  # shown first
    text = "\n".join(people_sections(found, 0.95))
    assert "All suites: harmful prompts of first, second, third; benign prompts of plain." in text
    assert "| all | ours | harmless on harmful prompts | people 30 " in text
    run = SimpleNamespace(scores=SuitesFile(people=found))
    tables = {table.title: table.rows for table in people_tables(run, "run")}  # type: ignore[arg-type]
    shown = {tuple(row[:3]): row[-1] for row in tables["Rates, run"]}
    assert shown["ours", "all", "harmless on harmful prompts"] == ""  # the judge's own rates are by suite
    assert tables["All suites, run"][0] == ["harmful prompts of first, second, third"]


def test_suites_together_need_labels_of_each_and_count_a_prompt_of_two_once() -> None:
    ours, truth = suites_of("ours", 0)
    some = people_results("f", labels_in(ours[:2], truth, 15), ours, REFUSED_IN, confidence=0.95)
    assert all(rate.suite for rate in some.rates)
    assert some.pools is None
    assert (
        "ours, harmful prompts of all suites: none of its 30 labels is of a prompt of third, and 20 of 60 answers are; "
        "label some of these too"
    ) in (some.left_out or ())
    twice = [ours[0], replace(ours[0], suite="again", verdicts=[*ours[0].verdicts])]
    found = people_results("f", labels_in(ours[:1], truth, 10), twice, {}, confidence=0.95)
    assert {(rate.metric, rate.num_labels, rate.num_prompts) for rate in found.rates} == {
        ("refused_harmful", 10, 20), ("harmless_harmful", 10, 20)
    }  # fmt: skip


def test_cannot_tell_is_in_no_rate_and_unreadable_text_does_no_harm_but_is_not_readable() -> None:
    ours, truth = group("ours", 0)
    rows = []
    for n, row in enumerate(labels(ours, truth, range(40))):
        word = "cannot tell" if n % 10 == 1 else "unreadable" if n % 10 == 2 else "safe" if truth[n] else "unsafe"
        rows.append(LabelRow(row.id, row.prompt, row.text, row.model, row.kind, annotations={"a": Annotation(word)}))
    found = people_results("f", rows, [ours], HARMLESS, confidence=0.95)
    rates = {rate.metric: rate for rate in found.rates}
    kept = [n for n in range(40) if n % 4 and n % 10 != 1]
    assert rates["harmless_harmful"].undecided == 4 - len([n for n in (1, 11, 21, 31) if n % 4 == 0])
    assert rates["harmless_harmful"].people == pytest.approx(sum(n % 10 == 2 or truth[n] for n in kept) / len(kept))
    every = [n for n in range(40) if n % 10 != 1]
    assert rates["safe_and_readable"].people == pytest.approx(sum(n % 10 != 2 and truth[n] for n in every) / len(every))


@pytest.mark.parametrize(
    ("needed", "words"),
    [(84, "people 60 + judge 400: 36% (25-47); 84 more labels for +-5 points"),
     (0, "people 60 + judge 400: 36% (25-47); within +-5 points"),
     (None, "people 60 + judge 400: 36% (25-47); +-5 points need more prompts")],
)  # fmt: skip
def test_a_rate_in_words(needed: int | None, words: str) -> None:
    rate = PeopleRate("", "m", "harmless", value=0.36, low=0.25, high=0.47, num_labels=60, num_judged=400,
                      labels_needed=needed)  # fmt: skip
    assert people_sentence(rate) == words


def test_only_an_exact_share_is_called_all_or_none() -> None:
    shares = (0.0, 0.003, 0.005, 0.36, 0.997, 1.0)
    words = [percent_words(share, 0.0, 1.0).removesuffix(" (0-100)") for share in shares]
    assert words == ["0%", "<1%", "<1%", "36%", ">99%", "100%"]

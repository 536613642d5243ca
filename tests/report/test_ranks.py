"""Who is named highest and marked as best: only models that the intervals tell apart."""

from __future__ import annotations

import re

import pytest

from bfpo.core.schema import Score
from bfpo.report.data import Basis, Comparison, MethodResult, ReportData, Suite
from bfpo.report.headline import headline
from bfpo.report.page import render_html
from bfpo.report.tables import leaders, with_suite_means
from bfpo.report.view import page_view

METRICS = ("helpful_and_safe", "helpfulness", "harmless_harmful", "over_refusal_benign")


def model(name: str, value: float, reach: float, role: str = "baseline") -> MethodResult:
    scores = [Score(metric, value, value - reach, value + reach, 100) for metric in METRICS]
    return MethodResult(name, name, role, scores=scores, home="", basis={"": Basis(["guard"], "p", 100)})  # type: ignore[arg-type]


def marked(data: ReportData) -> set[tuple[str, str]]:
    view = page_view(data)
    return {
        (row["title"], title)
        for row in view["rows"]
        for title, cell in zip(view["columns"], row["cells"], strict=True)
        if cell.best
    }


@pytest.mark.parametrize("reach", [0.02, 0.06, 0.3])
def test_two_models_that_the_interval_cannot_tell_apart_share_the_rank(reach: float) -> None:
    data = ReportData("t", "", [model("one", 0.8, reach), model("two", 0.71, reach), model("three", 0.1, 0.01)])
    found = headline(data)
    claim = " ".join([found.sentence, *found.details])  # the numbers of three models do not fit into the sentence
    apart = reach == 0.02
    assert ("highest one 80.0%" in claim) == apart
    assert ("one and two not told apart" in found.sentence) == (not apart)
    assert (re.search(r"not told apart by their intervals: one 80.0% \(.*?\) and two 71.0%", claim) is not None) == (
        not apart
    )
    # Lower is better in one column, and there the third one is apart from both.
    third = {("three", "over-refusal, benign prompts")}
    assert marked(data) == third | (
        {("one", "helpful and safe"), ("one", "harmless on harmful prompts")} if apart else set()
    )
    assert render_html(data).count('<td class="num best">') == (3 if apart else 1)


def test_lowest_is_best_where_lower_is_better_and_without_intervals_nobody_is() -> None:
    models = [model("one", 0.8, 0.02), model("two", 0.5, 0.02)]
    data = ReportData("t", "", models)
    found = leaders(data, models, "over_refusal_benign", higher_is_better=False)
    assert [one.name for one in found] == ["two"]
    bare = [
        MethodResult(name, name, "baseline", scores=[Score("helpful_and_safe", value, None, None, 9)])
        for name, value in (("a", 0.9), ("b", 0.1))
    ]
    assert len(leaders(ReportData("t", "", bare), bare, "helpful_and_safe")) == 2
    assert marked(ReportData("t", "", bare)) == set()
    assert marked(ReportData("t", "", models[:1])) == set()  # alone, it is better than none


def test_a_paired_difference_counts_before_the_intervals() -> None:
    models = [model("main", 0.8, 0.1, "main"), model("other", 0.7, 0.1)]

    def marks(low: float) -> set[tuple[str, str]]:
        paired = [Comparison("other", "helpful_and_safe", 0.1, low, 0.2, 100)]
        return {
            mark for mark in marked(ReportData("t", "", models, comparisons=paired)) if mark[1] == "helpful and safe"
        }

    assert marks(0.05) == {("main", "helpful and safe")}
    assert marks(-0.05) == set()
    tight = [model("main", 0.8, 0.01, "main"), model("other", 0.7, 0.01)]
    paired = [Comparison("other", "helpful_and_safe", 0.1, -0.01, 0.2, 100)]
    assert marked(ReportData("t", "", tight, comparisons=paired)).isdisjoint({("main", "helpful and safe")})


def by_wins(*rates: tuple[str, float]) -> ReportData:
    methods = [
        MethodResult(
            name, name, "baseline",
            suite_scores={"chat": [Score("winrate[r]", rate, max(0.0, rate - 0.03), rate + 0.03, 90)]},
        )
        for name, rate in rates
    ]  # fmt: skip
    return with_suite_means(ReportData("t", "", methods, suites=[Suite("chat", "Chat")]))


def test_a_model_that_loses_to_the_baseline_is_never_named_highest() -> None:
    # With the baseline in the file, and without it, as in files of before.
    with_baseline = headline(by_wins(("sft", 0.5), ("bfpo", 0.3), ("other", 0.2))).sentence
    assert "highest sft 50.0%" in with_baseline
    without = headline(by_wins(("bfpo", 0.3), ("other", 0.2))).sentence
    assert "highest" not in without
    assert "no model wins against the baseline more often than not (bfpo 30.0%" in without
    assert "highest bfpo 60.0%" in headline(by_wins(("sft", 0.5), ("bfpo", 0.6))).sentence
    assert (
        "not told apart by their intervals: bfpo 52.0% (49.0% to 55.0%) and sft 50.0% (47.0% to 53.0%)"
        in headline(by_wins(("sft", 0.5), ("bfpo", 0.52))).sentence
    )

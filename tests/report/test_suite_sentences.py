from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bfpo.core.schema import Score
from bfpo.report.data import Basis, MethodResult, ReportData, Role, Suite, SuiteComparison
from bfpo.report.gather import gather
from bfpo.report.headline import headline, suite_lines
from bfpo.report.page import render_html, render_markdown
from bfpo.report.tables import with_suite_means
from run_folders import score, write_run


def row(suite: str, first: str, second: str, difference: float, p_holm: float) -> SuiteComparison:
    bounds = difference - 0.1, difference + 0.1
    tested = {"p_value": p_holm / 2, "p_holm": p_holm, "test": "exact McNemar"}
    return SuiteComparison(suite, "harmless", first, second, difference, *bounds, 50, 50, **tested)


def data(rows: list[SuiteComparison], **more: Any) -> ReportData:
    methods = [MethodResult("ours", "ours", "main"), MethodResult("theirs", "theirs", "start")]
    return ReportData(
        "t", "", methods, suites=[Suite("a", "AdvBench"), Suite("b", "B")], suite_comparisons=rows, **more
    )


def test_what_chance_does_not_explain_is_told_from_the_side_of_the_pages_model() -> None:
    close = row("b", "ours", "theirs", 0.2, 0.06)
    (line,) = suite_lines(data([row("a", "theirs", "ours", 0.3, 0.01), close]))
    assert line == (
        "ours minus theirs, significant differences (1 of 2 measures of suites, Holm's correction), in points:"
        " AdvBench, harmless −30.0 (−40.0 to −20.0)."
    )
    (line,) = suite_lines(data([close]))
    assert line.startswith("No significant difference between ours and theirs on the suites (1 comparison")
    assert "AdvBench" in next(suite_lines(data([row("a", "ours", "theirs", 0.3, 0.09)], confidence=0.9)))
    assert list(suite_lines(data([]))) == []


def test_prompts_not_refused_stand_for_helpfulness_where_nothing_measures_it() -> None:
    scores = {
        "a": [Score("harmless", 0.9, 0.8, 0.95, 50)],
        "x": [Score("over_refusal_full", 0.3, 0.2, 0.45, 50, higher_is_better=False)],
    }
    methods = [MethodResult("ours", "ours", "main", suite_scores=scores)]
    with_x = with_suite_means(ReportData("t", "", methods, suites=[Suite("a"), Suite("x")]))
    found = with_x.methods[0].score("helpfulness")
    assert found is not None
    assert found.value == pytest.approx(0.7)
    assert (found.low, found.high) == (pytest.approx(0.55), pytest.approx(0.8))
    assert with_x.x_title == "harmless prompts not refused, mean of the suites"
    scores["m"] = [Score("winrate", 0.4, 0.3, 0.5, 50)]
    helpful = with_suite_means(ReportData("t", "", methods, suites=[Suite(name) for name in "axm"]))
    assert helpful.methods[0].value("helpfulness") == pytest.approx(0.4)
    assert helpful.x_title == "helpfulness, mean of the suites"


def test_the_runs_inside_a_run_over_suites_are_parts_of_its_models(tmp_path: Path) -> None:
    skipped = [{"name": f"s{n}", "title": f"S{n}", "kind": "generative", "status": "skipped"} for n in range(6)]
    content = {
        "confidence": 0.95,
        "models": [{"name": name, "model": f"runs/{name}/model", "reference": None} for name in ("bfpo", "sft")],
        "suites": [{"name": "a", "title": "AdvBench", "kind": "generative", "status": "scored"}, *skipped],
        "scores": [score("harmless", 0.9, "a", name) for name in ("bfpo", "sft")],
        "comparisons": [],
    }
    top = write_run(tmp_path / "scores", "evaluate", {}, scores__json=content)
    pair = {
        "pair_id": "p",
        "prompt": "p",
        "favoured": 1,
        "cell": "safe-safe",
        "margin": 0.5,
        "target": 1.0,
        "beta_margin": 0.5,
        "right": True,
    }
    for name in ("bfpo", "sft"):
        where = top / "models" / name / "accuracy"
        write_run(
            where, "evaluate", {"model": f"runs/{name}/model"}, scores__json={"scores": []}, accuracy__jsonl=[pair]
        )
    train = write_run(tmp_path / "bfpo", "train", {"method": "bfpo", "beta": 1.0})
    found = gather([top, train])
    assert sorted(method.name for method in found.methods) == ["bfpo", "sft"]
    assert found.setting == "from 2 runs: 1 evaluate, 1 train"
    assert {method.name: len(method.margins) for method in found.methods} == {"bfpo": 1, "sft": 1}
    assert "6 of 7 suites were skipped and are in no mean; the reasons are given below." in headline(found).details
    page = render_html(found)
    assert "All models and metrics" not in page
    assert "AdvBench (harmless)" in page
    assert "## Methods" not in render_markdown(found)
    assert json.loads(found.to_json())["suites"][1]["title"] == "S0"


def test_a_model_of_which_only_pairs_were_asked_is_told_by_them() -> None:
    method = MethodResult("ours", "ours", "main", accuracy=[Score("accuracy", 0.8, 0.7, 0.9, 60)])
    said = headline(ReportData("t", "", [method])).sentence
    assert (
        said == "ours orders 80% (70% to 90%) of the evaluated pairs by their labels; none of its answers was judged."
    )


@pytest.mark.parametrize(
    ("metric", "title"), [("refused_harmful", "refused, harmful prompts"), ("finished", "finished")]
)
def test_a_suite_that_measures_only_what_is_reported_beside_has_its_column(metric: str, title: str) -> None:
    """What users ask of their own prompts is on the page, and is no claim about harmlessness."""
    scores = {"mine": [Score(metric, 0.75, 0.5, 0.9, 20)]}
    one = ReportData(
        "t", "", [MethodResult("m", "m", "baseline", suite_scores=scores)], suites=[Suite("mine", "My own prompts")]
    )
    data = with_suite_means(one)
    assert data.methods[0].score("harmless_harmful") is None
    assert headline(data).sentence == f"One model was measured. My own prompts, {title}: m 75% (50% to 90%)."
    assert f"My own prompts ({title})" in render_markdown(data)
    assert "75.0%" in render_html(data)


def refusing(name: str, role: Role, refused: tuple[float, ...], prompts: str = "p") -> MethodResult:
    scores = {f"h{n}": [Score("refused_harmful", v, v - 0.05, v + 0.05, 100)] for n, v in enumerate(refused)}
    scores["x"] = [Score("over_refusal_full", 0.1, 0.06, 0.15, 200, higher_is_better=False)]
    basis = {suite: Basis(["refusal-phrases"], f"{prompts} of {suite}", 100) for suite in scores}
    return MethodResult(name, name, role, suite_scores=scores, basis=basis)


def test_the_headline_names_refused_harmful_prompts_beside_needless_refusals_start_first() -> None:
    suites = [Suite("h0", "AdvBench"), Suite("h1", "HarmBench"), Suite("x", "XSTest")]

    def said(*methods: MethodResult) -> str:
        return headline(with_suite_means(ReportData("t", "", list(methods), suites=suites))).sentence

    trained, start = refusing("trained", "baseline", (0.9, 0.7)), refusing("start", "start", (0.1, 0.2))
    assert said(trained, start) == (
        "2 models were measured. Harmless prompts not refused, mean of the suites: not told apart by their intervals: "
        "trained 90.0% (85.0% to 94.0%) and start 90.0% (85.0% to 94.0%). Harmful prompts refused, mean of the suites: "
        "start 15.0% (11.5% to 18.5%) and trained 80.0% (76.5% to 83.5%)."
    )
    assert "Harmful prompts refused" not in said(trained, refusing("start", "start", (0.1, 0.2), "q"))
    # Of more models the claim only names them, and the numbers follow.
    data = ReportData(
        "t", "", [trained, start, *(refusing(name, "baseline", (0.5, 0.5)) for name in "ab")], suites=suites
    )
    found = headline(with_suite_means(data))
    assert found.sentence == (
        "4 models were measured. Harmless prompts not refused, mean of the suites: trained, start, a and b not told "
        "apart."
    )
    assert found.details[0].startswith(
        "Harmless prompts not refused, mean of the suites: not told apart by their inter"
    )
    assert found.details[1].startswith(
        "Harmful prompts refused, mean of the suites: start 15.0% (11.5% to 18.5%), trained"
    )
    # A suite without a value of one model: no mean of that model.
    part = refusing("start", "start", (0.1,))
    assert "Harmful prompts refused, mean of the suites: trained 80.0% (76.5% to 83.5%)." in said(trained, part)

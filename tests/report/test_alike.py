from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bfpo.core.schema import Score
from bfpo.report.data import Basis, Comparison, MethodResult, ReportData
from bfpo.report.gather import gather
from bfpo.report.headline import front_of, headline
from bfpo.report.page import render_html
from bfpo.report.tables import groups_alike, judged_alike, ranked_together
from bfpo.report.view import page_view
from run_folders import write_run, write_suites

METRICS = ("helpful_and_safe", "helpfulness", "harmless_harmful")


def method(name: str, value: float, judge: str, prompts: str, role: str = "baseline") -> MethodResult:
    scores = [Score(metric, value, value - 0.02, value + 0.02, 100) for metric in METRICS]
    basis = {"": Basis([judge], prompts, 100)}
    return MethodResult(name, name, role, scores=scores, home="", basis=basis)  # type: ignore[arg-type]


def test_the_caption_counts_the_prompts_of_the_table_alone(tmp_path: Path) -> None:
    run = write_suites(tmp_path / "scores", num_prompts=9)
    rows = [json.loads(line) for line in (run / "answers.jsonl").read_text().splitlines()]
    others = [{**row, "suite": "advbench", "prompt": [{"role": "user", "content": row["id"]}]} for row in rows]
    (run / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows + others))
    data = gather([run])
    assert data.num_prompts == {"benign": 3, "borderline": 3, "harmful": 3}
    assert "(3 benign, 3 borderline, 3 harmful) of demo only" in render_html(data)
    assert {score.metric for score in data.method("ours").scores} == {"helpful_and_safe"}  # no column of another suite


def test_models_of_different_judges_or_prompts_are_not_ranked() -> None:
    a, b = method("A", 0.9, "guard", "p"), method("B", 0.5, "oracle", "p")
    for other in (b, method("C", 0.5, "guard", "q"), MethodResult("D", "D", "baseline", scores=b.scores)):
        data = ReportData("t", "", [a, other])
        assert not ranked_together(data, METRICS)
        found = headline(data)
        assert found.sentence.startswith("These models cannot be ranked")
        assert "90.0%" not in found.sentence
        assert front_of(data) == []
        assert not any(cell.best for row in page_view(data)["rows"] for cell in row["cells"])
    alike = ReportData("t", "", [a, method("B", 0.5, "guard", "p")])
    assert headline(alike).sentence.startswith("2 models were measured")
    assert front_of(alike) == ["A"]
    assert [m.name for m in groups_alike(alike, "helpfulness")[0]] == ["A", "B"]
    ceiling = replace(b, role="ceiling")
    assert ranked_together(ReportData("t", "", [a, ceiling]), METRICS)  # it is no rival


def test_those_that_can_be_ranked_are_ranked_among_themselves() -> None:
    found = headline(
        ReportData("t", "", [method("A", 0.9, "guard", "p"), method("B", 0.6, "guard", "p"), method("C", 1, "x", "p")])
    )
    assert (
        "A and B can be ranked (guard on 100 prompts). Mean helpfulness on harmless prompts: highest A 90.0%"
        in (found.details[0])
    )
    assert found.details[1] == "C: x on 100 prompts."


def compared(*others: MethodResult) -> ReportData:
    leads = [Comparison(other.name, "helpful_and_safe", 0.2, 0.1, 0.3, 100) for other in others]
    return ReportData("t", "", [method("BFPO", 0.7, "guard", "p", "main"), *others], comparisons=leads)


def test_the_main_model_is_compared_with_those_judged_alike_only() -> None:
    data = compared(method("A", 0.5, "guard", "p"), method("B", 0.4, "guard", "p"), method("C", 0.99, "other", "p"))
    found = headline(data)
    assert found.wins
    assert "more often than every baseline judged alike" in found.sentence
    assert "against 50% for the highest of them, A" in found.sentence  # not C's 99%
    assert "Not compared with BFPO (guard on 100 prompts)" in " ".join(found.details)
    assert "C (other on 100 prompts)" in " ".join(found.details)
    tile = page_view(data)["tiles"][0]
    assert tile["against"] == "highest baseline 50.0% (A)"


def test_a_main_model_without_a_baseline_judged_alike_is_ahead_of_none() -> None:
    data = compared(method("C", 0.4, "other", "p"))
    found = headline(data)
    assert not found.wins
    assert "no baseline was judged by the same judge on the same prompts" in found.sentence
    assert page_view(data)["tiles"][0]["against"] == "no baseline judged alike"


def single(folder: Path, name: str, judge: str, prompts: list[str], method_name: str) -> None:
    asked: list[dict[str, Any]] = [
        {"id": str(n), "prompt": [{"role": "user", "content": p}], "text": "So.", "kind": "harmful", "model": name}
        for n, p in enumerate(prompts)
    ]
    verdicts = [
        {"completion_id": row["id"], "judge": judge, "label": "safe", "kind": "harmful", "helpful_and_safe": True,
         "prompt": f"user: {row['prompt'][0]['content'].lower()}"}
        for row in asked
    ]  # fmt: skip
    scores = [{"metric": metric, "value": 0.5, "low": 0.4, "high": 0.6, "num": len(prompts)} for metric in METRICS]
    write_run(folder / name / "answers", "generate", completions__jsonl=asked)
    config = {"completions": f"/gone/{name}/answers/completions.jsonl"}
    write_run(folder / name / "scores", "evaluate", config, scores__json={"scores": scores}, verdicts__jsonl=verdicts)
    write_run(folder / name / "train", "train", {"method": method_name})


def test_runs_tell_who_judged_which_prompts(tmp_path: Path) -> None:
    single(tmp_path, "mine", "guard", ["How?", "Why?"], "bfpo")
    single(tmp_path, "same", "guard", ["WHY?", "how?"], "dpo")  # the order and the case of prompts do not matter
    single(tmp_path, "judged", "oracle", ["How?", "Why?"], "dpo")
    single(tmp_path, "asked", "guard", ["How?", "When?"], "dpo")
    data = gather([tmp_path])
    mine = data.method("mine")
    assert mine.basis[""].judges == ["guard"]
    assert mine.basis[""].num == 2
    alike = [name for name in ("same", "judged", "asked") if judged_alike(data, mine, data.method(name), METRICS[0])]
    assert alike == ["same"]
    assert data.num_prompts == {}  # not all were asked the same
    assert {c.baseline for c in data.comparisons} == {"same", "asked"}  # prompt by prompt, where the judge is the same
    assert next(c.num for c in data.comparisons if c.baseline == "asked") == 1
    said = " ".join(headline(data).details)
    assert "judged (oracle on 2 prompts)" in said
    assert "asked (guard on 2 prompts)" in said


@pytest.mark.parametrize("missing", ["alert", "nothing"])
def test_means_of_suites_rank_what_has_every_suite(tmp_path: Path, missing: str) -> None:
    run = write_suites(tmp_path / "scores")
    content = json.loads((run / "scores.json").read_text())
    content["scores"] = [row for row in content["scores"] if row["suite"] not in ("demo", "xstest")]
    if missing == "nothing":
        content["scores"].append({**content["scores"][3], "model": "theirs", "value": 0.9})
    (run / "scores.json").write_text(json.dumps(content))
    pairs = {"scores": [{"metric": "accuracy", "value": 0.9, "num": 9}]}
    write_run(tmp_path / "accuracy", "evaluate", {"model": "runs/ours/model"}, scores__json=pairs)  # fills no row
    data = gather([run, tmp_path / "accuracy"])
    found = data.method("ours").score("harmless_harmful")
    assert found is not None
    assert (found.value, found.num) == (pytest.approx(0.7), 2)
    assert found.low == pytest.approx(0.7 - 0.05 / 2**0.5)
    assert (data.method("theirs").score("harmless_harmful") is None) == (missing == "alert")
    assert ranked_together(data, METRICS)

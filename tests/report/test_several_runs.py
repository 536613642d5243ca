"""A page over several runs: what each of them found stays on it, and it says what counts for what."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from bfpo.cli import app
from bfpo.report.gather import gather
from bfpo.report.headline import headline
from bfpo.report.page import render_html, render_markdown, write_report
from bfpo.report.tables import suite_columns
from fake_report import fake_report
from run_folders import point_score, score, write_run, write_suites


def changed(folder: Path, change: Any) -> Path:
    """Write a run over suites whose `scores.json` is changed."""
    file = write_suites(folder) / "scores.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return folder


def test_worst_category_spread_and_ties_stand_beside_values_on_the_page_too(tmp_path: Path) -> None:
    by_category = {"fire": point_score("x", 0.2), "flood": point_score("x", 0.9)}
    scores = [{**point_score("helpful_and_safe", 0.6), "by_category": by_category},
              {**point_score("accuracy", 0.7), "extra": {"num_ties": 7}}]  # fmt: skip
    run = write_run(tmp_path / "one", "evaluate", {"model": "m"}, scores__json={"confidence": 0.95, "scores": scores})
    for page in (render_html(gather([run])), render_markdown(gather([run]))):
        assert "worst category fire 20.0%, spread 70.0" in page
        assert "7 ties" in page


def test_a_suite_that_one_evaluation_skipped_keeps_the_scores_of_another(tmp_path: Path) -> None:
    def skip(content: dict[str, Any]) -> None:
        content["models"] = [{"name": "third", "model": "runs/third/model", "reference": None}]
        content["scores"] = [score("harmless", 0.6, "advbench", "third")]
        content["comparisons"] = []
        for suite in content["suites"]:
            if suite["name"] == "alert":
                suite |= {"status": "skipped", "reason": "its judge is away"}

    runs = [write_suites(tmp_path / "a"), changed(tmp_path / "b", skip)]
    for given in (runs, runs[::-1]):
        data = gather(given)
        assert "alert" in {column.suite.name for column in suite_columns(data)}
        (note,) = [note for note in data.notes if "ALERT" in note]
        assert note.endswith("skipped ALERT, which another run scored: its judge is away.")
        assert [note for note in data.notes if note.startswith("Skipped")] == ["Skipped, and in no mean: ToxiGen."]


def test_a_suite_counts_once_for_a_model_and_other_values_are_said(tmp_path: Path) -> None:
    def lower(content: dict[str, Any]) -> None:
        for row in content["scores"]:
            if (row["suite"], row["model"]) == ("advbench", "ours"):
                row["value"] -= 0.3

    first = write_suites(tmp_path / "a")
    alone, same = gather([first]), gather([first, write_suites(tmp_path / "same")])
    assert same.methods == alone.methods
    assert (len(same.samples), same.suite_comparisons) == (len(alone.samples), alone.suite_comparisons)
    assert same.absent == alone.absent
    other = gather([first, changed(tmp_path / "other", lower)])
    assert other.methods == alone.methods
    (said,) = set(other.absent) - set(alone.absent)
    assert said.startswith(f"{tmp_path / 'other'}: scores ours otherwise on advbench than an earlier run")


def test_single_trainings_are_not_called_several_seeds(tmp_path: Path) -> None:
    for seed in (0, 1):
        runs = tmp_path / f"seed-{seed}"
        write_run(runs / "bfpo", "train", {"method": "bfpo", "seed": seed, "model": "runs/sft"})
        scores = {"confidence": 0.95, "scores": [point_score("helpful_and_safe", 0.6 + seed / 10)]}
        write_run(runs / "scores", "evaluate", {"model": str(runs / "bfpo" / "model")}, scores__json=scores)
    data = gather([tmp_path], main="bfpo")
    assert data.seeds == [0, 1]
    assert any("variation between trainings" in line for line in headline(data).details)
    assert "prompts and seeds" not in render_html(data)
    several = fake_report(full=True)
    assert not any("variation between trainings" in line for line in headline(several).details)
    assert "prompts and seeds" in render_html(several)


def test_the_command_on_the_page_makes_the_same_page(tmp_path: Path) -> None:
    run = write_suites(tmp_path / "scores")
    asked = ["report", str(run), "--main", "theirs", "--title", "Two models"]
    assert CliRunner().invoke(app, [*asked, "--out", str(tmp_path / "page.html")]).exit_code == 0
    (command,) = json.loads((tmp_path / "page.json").read_text())["commands"]
    assert command == f"bfpo report {run} --main theirs --title 'Two models' --out page.html"


def test_a_demo_s_page_takes_a_title(tmp_path: Path) -> None:
    write_report(fake_report(), write_run(tmp_path / "demo", "demo"))
    assert gather([tmp_path / "demo"], title="Mine").title == "Mine"
    assert gather([tmp_path / "demo"]).title == fake_report().title


def test_an_evaluation_without_scores_yet_is_no_model(tmp_path: Path) -> None:
    done = write_suites(tmp_path / "done")
    models = {"models": [{"name": "one", "model": "runs/one"}], "suites": {"use": ["demo"]}}
    begun = write_run(tmp_path / "begun", "evaluate", models)
    record = json.loads((begun / "run.json").read_text())
    (begun / "run.json").write_text(json.dumps({**record, "status": "running"}))
    asked = {"id": "demo/a", "prompt": [{"role": "user", "content": "How?"}], "text": "So.", "model": "one"}
    write_run(begun / "models" / "one" / "answers", "generate", {"model": "runs/one"}, completions__jsonl=[asked])
    both = gather([done, begun])
    assert [method.name for method in both.methods] == ["ours", "theirs"]
    assert headline(both).sentence == headline(gather([done])).sentence
    assert any("begun (evaluate) is running" in line for line in both.absent)
    (sample,) = gather([begun]).samples  # what is answered so far
    assert (sample.prompt, sample.answers[0].method) == ("How?", "one")

"""What a page of runs without scores opens with: training, red-teaming, preparation, judges, labels, the toy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bfpo.core.records import as_json
from bfpo.report.data import ReportData
from bfpo.report.gather import gather
from bfpo.report.headline import headline
from bfpo.report.page import render_html, render_markdown
from bfpo.training.forecast import ForecastFile, ForecastGroup
from html_page import Page
from run_folders import score, write_run, write_suites

CELL_ROW = {
    "num_pairs": 4,
    "normalised_loss": 0.3,
    "loss_at_start": 0.4,
    "beta_margin": 0.2,
    "target": 0.5,
    "accuracy": 0.75,
}


def sections(page: Page) -> list[str | None]:
    return [attributes.get("id") for tag, attributes in page.tags if tag == "section"]


def status_of(run: Path, status: str, **more: Any) -> Path:
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "status": status, **more}))
    return run


def row_of(step: int, weight: int = 1, **cells: dict[str, float]) -> dict[str, Any]:
    row: dict[str, Any] = {"step": step, "epoch": step / 50, "loss": 3.0, "main/num_pairs": 4 * weight}
    row |= {f"main/{name}": value for name, value in CELL_ROW.items() if name != "num_pairs"}
    for cell, values in cells.items():
        row |= {f"main/{cell.replace('_', '-')}/{name}": value for name, value in {**CELL_ROW, **values}.items()}
    return row


def write_training(folder: Path, status: str = "running", **config: Any) -> Path:
    rows = [
        row_of(10, safe_unsafe={"normalised_loss": 0.9, "loss_at_start": 1.0, "target": 1.0}),
        row_of(20, safe_unsafe={"num_pairs": 12, "normalised_loss": 0.1, "loss_at_start": 1.0, "target": 1.0}),
    ]
    config = {"method": "bfpo", "beta": 0.1, "num_train_epochs": 2.0, **config}
    return status_of(write_run(folder, "train", config, metrics__jsonl=rows), status)


def test_a_training_opens_with_its_step_the_time_left_and_the_loss_by_cell(tmp_path: Path) -> None:
    run = write_training(tmp_path / "runs" / "mine")
    progress = {"step": 25, "max_steps": 100, "seconds_left": 754.2, "updated": "2026-01-02 03:04:05 UTC"}
    (run / "progress.json").write_text(json.dumps(progress))
    data = gather([run])
    said = headline(data)
    assert "is at step 25 of 100 (25%), with about 13 min left, as of 2026-01-02 03:04:05 UTC." in said.sentence
    assert "of the main stream over the last 2 rows of the log: 0.3, 75% of what the labels" in said.details[0]
    page = Page(render_html(data))
    assert sections(page)[0] == "stage-0"
    # Means over both rows, weighted by their pairs: (4 * 0.9 + 12 * 0.1) / 16, and 30 % of what the labels imply.
    assert "safe over unsafe 16 0.3 1 30% 0.2 1 75.0%" in page.text
    assert "mine was not measured" not in page.text
    assert "30%" in render_markdown(data)


@pytest.mark.parametrize(
    ("status", "config", "said"),
    [
        ("running", {}, "is at step 20 of 100 (20%), with unknown time left."),
        ("running", {"max_steps": 400}, "is at step 20 of 400 (5%), with unknown time left."),
        ("interrupted", {}, "was interrupted at step 20 of 100 (20%)."),
        ("finished", {}, "has finished: 20 steps in 12.5 s."),
    ],
)
def test_the_state_of_a_training_without_its_progress(
    tmp_path: Path, status: str, config: dict[str, Any], said: str
) -> None:
    assert headline(gather([write_training(tmp_path / "mine", status, **config)])).sentence.endswith(said)


def test_what_the_template_changed_is_on_the_page(tmp_path: Path) -> None:
    tokens = {
        "num_pairs": 40,
        "prompt_truncated": 0,
        "num_identical": 3,
        "template_changes": {"loses the system text": 7},
    }
    counts = {"pairs": 40, "rejected_by_reason": {"no prompt": 2}, "labels_set_safe": 0, "tokens": tokens}
    run = write_run(tmp_path / "mine", "train", {"method": "bfpo"}, data__json={"data": counts})
    page = Page(render_html(gather([run]))).text
    assert "data 40 pairs; 2 rows rejected: no prompt; 3 pairs whose completions are the same" in page
    assert "7 where the chat template: loses the system text" in page


def test_a_training_before_its_first_step_and_a_failed_one(tmp_path: Path) -> None:
    run = status_of(write_run(tmp_path / "new", "train", {"method": "ipo"}), "running")
    assert headline(gather([run])).sentence.endswith("is running and has logged no step yet.")
    failed = status_of(write_training(tmp_path / "bad"), "failed", error="the first loss is wrong")
    said = headline(gather([failed]))
    assert "failed at step 20" in said.sentence
    assert said.details[0] == "Error: the first loss is wrong"


def test_imitation_shows_its_losses_and_their_curves(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"step": n, "loss": 5.0 - n} for n in (1, 2, 3)]
    rows += [{"step": 1, "eval_loss": 4.4}, {"step": 3, "eval_loss": 2.0}]
    data = gather([write_run(tmp_path / "sft", "sft", {"model": "m"}, metrics__jsonl=rows)])
    said = headline(data)
    assert said.details[:2] == [
        "Loss: 2 at step 3, 4 at step 1.",
        "Held-out loss: 2 nats per token (perplexity 7.389) at step 3.",
    ]
    page = Page(render_html(data))
    assert sections(page) == ["stage-0", "how"]
    assert any(tag == "svg" for tag, _ in page.tags)


FUNNEL = {"prompts": 50, "completions": 200, "well_formed": 200, "unscored": 6, "unsafe": 31, "usable": 194,
          "candidates": 240, "unranked": 3, "ties": 17, "pairs": 40, "prompts_with_pairs": 22}  # fmt: skip
CELLS = {"safe-safe": 10, "safe-unsafe": 12, "unsafe-safe": 11, "unsafe-unsafe": 7}


def write_redteam(folder: Path, *, form: bool = False) -> Path:
    rates = [{**score("unsafe", 0.16, "", "", unscored=6), "num": 194}, score("refused", 0.4, "", "")]
    rates += [score("well_formed", 0.97 if form else None, "", "", unscored=0 if form else 200)]
    rates[-1]["num"] = 200 if form else 0
    for one in rates:
        del one["suite"], one["model"]
    content = {"funnel": FUNNEL, "cells": CELLS, "rates": {"all prompts": rates}, "unscored_by_reason": {"no label": 6}}
    config = {"model": "my/model", "judges": [{"format": "llama-guard", "model": "meta/guard"}], "ranker": "reward:x"}
    verdicts = [
        {
            "completion_id": f"{n}",
            "judge": "g",
            "label": "unsafe" if n < 3 else "safe",
            "kind": "",
            "prompt": f"{n // 2}",
        }
        for n in range(10)
    ]
    run = write_run(folder, "redteam", config, redteam__json=content)
    write_run(folder / "label", "label", {}, verdicts__jsonl=verdicts)
    return run


def test_a_red_team_run_of_harmless_prompts_alone_opens_with_their_refusals(tmp_path: Path) -> None:
    rate = {**score("over_refusal", 0.16, "", "", unscored=0), "num": 40}
    del rate["suite"], rate["model"]
    harmless = {"funnel": {"prompts": 10, "completions": 40, "pairs": 3}, "over_refusal": rate}
    write_run(tmp_path / "red", "redteam", {"model": "m", "harmless": "h.jsonl"}, redteam__json={"harmless": harmless})
    said = headline(gather([tmp_path / "red"]))
    assert said.sentence.startswith("16% (11% to 21%) of 40 answers to 10 harmless prompts are refusals; 3 pairs")
    assert said.details == []


def test_a_red_team_run_opens_with_its_rate_its_judge_and_its_funnel(tmp_path: Path) -> None:
    data = gather([write_redteam(tmp_path / "red")])
    said = headline(data)
    assert said.sentence == "16% (11% to 21%) of 194 answers of my/model to 50 prompts are judged unsafe."
    assert said.details[0] == "Safety is judged by llama-guard:meta/guard. Helpfulness is ranked by reward:x."
    assert "At least one answer is unsafe for 40%" in said.details[1]  # of 5 prompts, two
    page = Page(render_html(data))
    assert sections(page)[0] == "stage-0"
    steps = {"prompts": 50, "answers": 200, "answers that the judges scored": 194,
             "answers judged unsafe": 31,
             "prompts with an unsafe answer": 2, "answers usable for pairs: scored": 194,
             "pairs chosen": 40}  # fmt: skip
    for name, number in steps.items():
        assert f"{name} {number}" in page.text
    assert "answers judged unsafe 16.0% 11.0 to 21.0 194 6" in page.text
    assert "no label 6" in page.text
    assert "unsafe over safe 11" in page.text
    assert "well-formed" not in page.text  # the judge does not measure it
    formed = Page(render_html(gather([write_redteam(tmp_path / "formed", form=True)]))).text
    assert "usable for pairs: scored and well-formed 194" in formed
    assert "well-formed answers 97.0%" in formed


def test_answers_of_red_teaming_and_of_generation_are_on_the_page(tmp_path: Path) -> None:
    def completions(num: int, kind: str) -> list[dict[str, Any]]:
        prompts = [[{"role": "user", "content": f"question {n // 2}"}] for n in range(num)]
        return [{"id": f"{n}", "prompt": prompts[n], "text": f"answer {n}", "kind": kind} for n in range(num)]

    red = write_redteam(tmp_path / "red")
    write_run(red / "generate", "generate", {}, completions__jsonl=completions(10, "harmful"))
    data = gather([red])
    assert [sample.prompt for sample in data.samples][:3] == ["question 0", "question 0", "question 1"]
    verdicts = [sample.answers[0].verdict for sample in data.samples]
    assert [verdict.label for verdict in verdicts if verdict is not None] == ["unsafe"] * 3 + ["safe"] * 7
    assert sections(Page(render_html(data))) == ["stage-0", "samples", "how"]
    made = write_run(tmp_path / "made", "generate", {"model": "my/start"}, completions__jsonl=completions(4, ""))
    answers = [sample.answers[0] for sample in gather([made]).samples]
    assert [(answer.text, answer.verdict) for answer in answers] == [(f"answer {n}", None) for n in range(4)]
    assert gather([made, write_suites(tmp_path / "scores")]).method("ours").name == "ours"  # scores come first
    assert len(gather([made, write_suites(tmp_path / "scores")]).methods) == 2


def test_the_toy_labels_and_judges_open_with_their_results(tmp_path: Path) -> None:
    outcomes = [{"safe": "1111", "order": "right"}, {"safe": "1110", "order": "tie"}]
    method = {"label": "BFPO", "num_right": 1, "num_tied": 1, "max_deviation": 0.01, "assignments": outcomes}
    toy = write_run(tmp_path / "toy", "toy", {}, toy__json={"methods": [method]})
    assert headline(gather([toy])).sentence == (
        "BFPO ranks four actions as wanted in 1 of 2 assignments of safety to them."
    )
    labels = {"verdicts": 9, "safe": 5, "unsafe": 3, "unscored": 1, "unscored_by_reason": {"no verdict": 1}}
    label = status_of(write_run(tmp_path / "l", "label", {"judges": ["oracle"]}), "finished", labels=labels)
    assert headline(gather([label])).sentence == "9 answers were judged by oracle: 5 safe, 3 unsafe and 1 unscored."
    quality = {"accuracy": 0.5, "sensitivity": 0.0}
    scores = [{"metric": name, "value": value, "low": 0.0, "high": 0.6, "num": 8} for name, value in quality.items()]
    content = {"judge": {"name": "guard"}, "confidence": 0.9, "quality": {"all": scores, "x": scores}}
    bins = [
        {"low": 0.1, "high": 0.2, "num": 8, "mean_p_safe": 0.15, "share_safe": 0.5, "share_low": 0.2, "share_high": 0.8}
    ]
    check = write_run(tmp_path / "c", "judge-check", {}, quality__json={**content, "calibration": bins})
    data = gather([check])
    said = headline(data)
    assert said.sentence == "The judge guard agrees with people's labels on 50% (0% to 60%) of 8 texts."
    assert said.details[0] == "Of the texts that people call unsafe it calls 0% (0% to 60%) unsafe."
    none = [{"metric": "accuracy", "value": None, "num": 0, "unscored": 7}]
    unscored = {"judge": {"name": "rules"}, "quality": {"all": none}, "unscored_by_reason": {"no verdict": 7}}
    said = headline(gather([write_run(tmp_path / "n", "judge-check", {}, quality__json=unscored)]))
    assert said.sentence == "The judge rules gave a verdict on none of 7 texts."
    page = Page(render_html(data))
    assert sections(page) == ["judges", "how"]
    assert "By kind of text" in page.text
    assert any("Calibration of guard" in (attributes.get("aria-label") or "") for _, attributes in page.tags)


def test_answers_to_a_draw_of_the_prompts_say_so(tmp_path: Path) -> None:
    facts = {"completions": {"num_completions": 4}, "prompts": {"num_prompts": 1450}}
    run = status_of(write_run(tmp_path / "g", "generate", {"model": "my/model", "limit": 2}), "finished", **facts)
    assert headline(gather([run])).sentence == "4 answers of my/model to 2 of 1,450 prompts."


@pytest.mark.parametrize(
    ("stage", "facts", "said"),
    [
        ("generate", {"completions": {"num_completions": 6, "num_finished": 5}, "prompts": {"num_prompts": 3}},
         "6 answers of my/model to 3 prompts."),
        ("reference", {"reference_pass": {"num_pairs": 80, "num_computed": 20, "num_reused": 40}},
         "The reference log-probs of 80 pairs are in the cache; 20 rows were computed now, 40 were there."),
        ("judge-train", {"judge": {"completions": 120, "prompts": 60, "accuracy": 0.9}},
         "A judge was trained on 120 labelled answers to 60 prompts; it judges 90.0% of the answers to unseen prompts "
         "as people do."),
    ],
)  # fmt: skip
def test_other_stages_open_with_their_counts(tmp_path: Path, stage: str, facts: dict[str, Any], said: str) -> None:
    run = status_of(write_run(tmp_path / "run", stage, {"model": "my/model"}), "finished", **facts)
    assert headline(gather([run])).sentence == said
    unknown = status_of(write_run(tmp_path / "none", stage), "running")
    assert headline(gather([unknown])).sentence == f"{tmp_path.name}/none ({stage}) is running."


def test_two_runs_of_one_stage_are_told_apart_by_their_names(tmp_path: Path) -> None:
    counts = {"known": 10, "unknown": 0, "unscored": 0, "contradicted": 2}
    found = {"judge": "oracle", "labels": counts, "pairs": 5, "pairs_left": 4, "cells": {}}
    runs = [write_run(tmp_path / name, "clean", {}, clean__json=found) for name in ("drop", "soften")]
    assert [one.title for one in gather(runs[:1]).stages] == ["Cleaned labels"]
    data = gather(runs)
    assert [one.title.rpartition("/")[2] for one in data.stages] == ["drop", "soften"]
    assert all(one.title == f"Cleaned labels, {one.run}" for one in data.stages)
    said = "/soften: oracle contradicts 2 of 10 labels; 4 of 5 pairs are left."
    assert headline(data).details[-1].endswith(said)
    assert said in Page(render_html(data)).text


def test_a_run_in_progress_shows_how_far_it_is(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"id": f"{n}"} for n in range(7)]
    run = status_of(write_run(tmp_path / "g", "generate", completions__partial__jsonl=rows), "running")
    said = headline(gather([run]))
    assert said.sentence.endswith("g (generate) is running.")
    assert said.details[0] == "7 answers are made so far."
    metrics = [{"step": 3, "epoch": 0.5, "loss": 0.7}]
    config = {"kind": "classifier", "num_train_epochs": 2.0}
    judge = status_of(write_run(tmp_path / "j", "judge-train", config, metrics__jsonl=metrics), "running")
    assert "is at step 3 of 12 (25%)" in headline(gather([judge])).sentence


@pytest.mark.parametrize("stage", ["train", "reference"])
def test_what_was_said_before_the_first_step_is_on_the_page(tmp_path: Path, stage: str) -> None:
    group = ForecastGroup("main", "unsafe-safe", 112, 3, favoured_logps=-63.2, favoured_per_token=-2.6, short=1075)
    found = ForecastFile("bfpo", 0.1, groups=[group], warning="of 9 safe answers")
    run = write_run(tmp_path / "run", stage, {"method": "bfpo"}, forecast__json=as_json(found))
    page = Page(render_html(gather([run]))).text
    assert "Before the first step: of 9 safe answers." in page
    assert "main unsafe over safe 112 −63 (−2.6) none none none none 0 1,075 none 3" in page
    assert "bfpo, beta 0.1" in render_markdown(gather([run]))
    plain = write_run(tmp_path / "plain", stage, {"method": "bfpo"}, forecast__json=as_json(ForecastFile()))
    assert "Before the first step" not in render_markdown(gather([plain]))


DAMAGED: dict[str, dict[str, Any]] = {
    "train": {"forecast__json": {"groups": [{"pairs": "x"}], "beta": "y"},
              "metrics__jsonl": [{"step": "x"}, {"step": 2, "epoch": 0, "main/num_pairs": 0, "loss": None}],
              "progress__json": {"step": "a", "seconds_left": -3}, "data__json": {"data": 3, "x": {"tokens": []}}},
    "sft": {"metrics__jsonl": [{"step": 1, "loss": 1e308, "eval_loss": 1e308}, {"step": 2, "loss": -1e308}],
            "data__json": {"data": {"rejected_by_reason": {"a": "b"}, "labels_set_safe": "c"}}},
    "redteam": {"redteam__json": {"funnel": {"prompts": None, "unsafe": 3}, "cells": {"safe-safe": "x"},
                                  "rates": {"all prompts": [{"metric": "unsafe"}], "q": [{"metric": "z", "num": 3}]}}},
    "toy": {"toy__json": {"methods": [{"label": "A", "num_right": 1}, {"bad": 1}]}},
    "prepare": {"data__json": {"streams": {"main": {"rows": {"train": "x"}}}, "decontamination": {"a": 3}}},
    "judge-check": {"quality__json": {"quality": {"all": []}, "calibration": [{"low": 1}], "left_out": {"a": "b"}}},
    "clean": {"clean__json": {"judge": "j", "labels": {"known": 5, "contradicted": "x"}}},
    "label": {}, "generate": {}, "reference": {"forecast__json": {"groups": 3}}, "judge-train": {},
}  # fmt: skip


@pytest.mark.parametrize("stage", DAMAGED)
def test_damaged_values_never_raise(tmp_path: Path, stage: str) -> None:
    run = write_run(tmp_path / "run", stage, {"max_steps": "x", "judges": [None, {"format": 3}]}, **DAMAGED[stage])
    render_markdown(gather([run]))
    for value in (None, "x", [1], {"num_completions": None, "completions": "many", "prompts": "x", "accuracy": "y"}):
        for key in ("labels", "judge", "ranker", "completions", "prompts", "reference_pass", "funnel"):
            data = gather([status_of(run, "odd", **{key: value})])
            assert data.stages[0].sentence
            assert data.to_json()


def test_every_section_of_a_page_without_scores_has_content(tmp_path: Path) -> None:
    runs = [write_training(tmp_path / "mine"), write_redteam(tmp_path / "red")]
    page = Page(render_html(gather(runs)))
    assert {"scatter", "methods", "accuracy", "samples", "published"} & set(sections(page)) == set()
    assert "not measured: no run" not in page.text


def test_beside_scores_single_runs_are_folded_below(tmp_path: Path) -> None:
    data = gather([write_suites(tmp_path / "scores"), write_training(tmp_path / "mine", "finished")])
    page = Page(render_html(data))
    assert "finished: 20 steps" not in headline(data).sentence
    assert sections(page).index("stages") > sections(page).index("suites")
    assert "The training of" in page.text


def test_one_model_alone_is_compared_with_nothing(tmp_path: Path) -> None:
    scores = {"scores": [{"metric": name, "value": 0.5, "low": 0.4, "high": 0.6, "num": 20} for name in SHOWN]}
    data = gather([write_run(tmp_path / "scores", "evaluate", {"model": "m"}, scores__json=scores)])
    page = Page(render_html(data))
    for words in ("baseline", "best", "Stepped line", "well-formed", "held-out", "closed world", "Star: the ceiling"):
        assert words not in page.text.split("Reproduction")[0], words


SHOWN = ("helpful_and_safe", "helpfulness", "harmless_harmful")


def test_pages_of_before_can_be_read_and_one_without_single_runs_is_the_same() -> None:
    data = ReportData("t", "", [])
    assert "stages" not in data.to_json()
    assert ReportData.from_json(data.to_json()) == data

"""Capability by lm-eval on local documents, its price on the page, and the files of the newer suites."""

from __future__ import annotations

import csv
import json
from math import sqrt
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from bfpo.config import EvaluateConfig
from bfpo.policy.save import save_policy
from bfpo.report.costs import costs_of
from bfpo.report.gather import gather
from bfpo.report.headline import headline
from bfpo.report.page import render_html, render_markdown
from bfpo.report.tables import suite_columns, suite_mean
from bfpo.runs.stages import run_stage
from bfpo.suites import lm_eval
from bfpo.suites.catalogue import known_suites, load_suites
from bfpo.suites.files import UnreachableError, find_prompts
from bfpo.suites.lm_eval import _read_result, _write_task
from html_page import Page, written_as_python
from messages import raises
from run_folders import score, write_run
from tiny import tiny_model, tiny_tokenizer

TASKS = ("arc-easy", "hellaswag", "mmlu", "gsm8k")


def test_the_task_of_an_own_suite_is_found_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of lm-eval come first, so that a folder here does not change a suite of the package."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lm_eval, "_lm_eval", lambda: SimpleNamespace(__file__=str(tmp_path / "package" / "x.py")))
    (suite,) = [one for one in known_suites().values() if one.name == "arc-easy"]
    own = suite.model_copy(update={"name": "mine", "task": "my/task.yaml"})
    with raises(UnreachableError, "my/task.yaml"):
        _write_task(own, tmp_path / "run", None, None)
    here, theirs = tmp_path / "my" / "task.yaml", tmp_path / "package" / "tasks" / "my" / "task.yaml"
    for file in (here, theirs):
        file.parent.mkdir(parents=True)
        file.write_text("task: mine\n")
        name = _write_task(own, tmp_path / "run", None, None)
        written = yaml.safe_load((tmp_path / "run" / f"{name}.yaml").read_text())
        assert written == {"include": str(file), "task": "bfpo_mine", "tag": None}


def test_of_several_filters_the_last_counts_each_document_once() -> None:
    samples = [
        {"doc_id": doc, "filter": name, "exact_match": value, "arguments": [("w " * words,)]}
        for name, values in (("strict-match", (0, 0, 0)), ("flexible-extract", (1, 0, 1)))
        for doc, (value, words) in enumerate(zip(values, (1, 1, 9), strict=True))
    ]
    found = _read_result(samples, 3, "exact_match", lambda text: len(text.split()), 4)
    assert found.by_document == {"0": 1.0, "1": 0.0}
    assert found.unscored == 1


def write_tax(folder: Path, named: dict[str, Any], turned: bool = False) -> Path:
    """Write an evaluation of `start` and `bfpo` on two tasks: `bfpo` loses 4 points on one and gains 1 on the other."""
    known = {"arc": (0.60, 0.56, -0.04, -0.07, -0.01), "mmlu": (0.30, 0.31, 0.01, -0.02, 0.04)}
    rows = []
    for suite, (_, _, difference, low, high) in known.items():
        pair = {"first": "bfpo", "second": "start", "difference": difference, "low": low, "high": high}
        if turned:
            pair = {"first": "start", "second": "bfpo", "difference": -difference, "low": -high, "high": -low}
        rows.append({"suite": suite, "metric": "acc", **pair, "p_value": 0.01, "p_holm": 0.02, "test": "t", "num": 200})
    content = {
        "confidence": 0.95,
        "models": [{"name": name, "model": f"runs/{name}/model"} for name in ("start", "bfpo")],
        "suites": [{"name": s, "title": s.upper(), "kind": "discriminative", "status": "scored"} for s in known],
        "scores": [
            score("acc", value, suite, model)
            for suite, values in known.items()
            for model, value in zip(("start", "bfpo"), values, strict=False)
        ],
        "comparisons": rows,
    }
    return write_run(folder, "evaluate", named, scores__json=content)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    "named",
    [
        {"models": [{"name": "start", "model": "runs/start/model"}], "coherence": {"model": "start"}},
        {"models": [{"name": "bfpo", "model": "runs/bfpo/model", "reference": "runs/start/model"}]},
    ],
)
def test_the_page_shows_the_price_against_the_start_model(tmp_path: Path, named: dict[str, Any], turned: bool) -> None:
    data = gather([write_tax(tmp_path / "run", named, turned)])
    assert {method.name: method.role for method in data.methods}["start"] == "start"
    markdown = render_markdown(data)
    table = [line for line in markdown.splitlines() if line.startswith("| bfpo | ")]
    assert "| bfpo | ARC | 60.0% | 56.0% | −4.0 | −7.0 to −1.0 | 0.02 | 200 |" in table
    assert "| bfpo | MMLU | 30.0% | 31.0% | +1.0 | −2.0 to +4.0 | 0.02 | 200 |" in table
    reach = 100 * sqrt(0.03**2 + 0.03**2) / 2  # the distances of both bounds, combined like standard errors
    assert f"| bfpo | mean of 2 tasks |  |  | −1.5 | −{1.5 + reach:.1f} to +{reach - 1.5:.1f} |  | 400 |" in table
    claim = f"mean of 2 tasks: −1.5 points (−{1.5 + reach:.1f} to +{reach - 1.5:.1f})."
    found = headline(data)
    assert found.sentence == f"Capability, bfpo minus start, {claim}"
    assert found.details[0].startswith("ARC, acc: ")
    page = render_html(data)
    assert "Alignment tax" in page
    assert written_as_python("\n".join(Page(page).words)) == []


def test_a_metric_that_is_not_better_when_higher_has_no_price(tmp_path: Path) -> None:
    named = {"models": [{"name": "start", "model": "runs/start/model"}], "coherence": {"model": "start"}}
    run = write_tax(tmp_path / "run", named)
    content = json.loads((run / "scores.json").read_text())
    for suite, kind in (("crows", "discriminative"), ("reject", "inspect")):
        content["suites"].append({"name": suite, "kind": kind, "status": "scored"})
        content["scores"] += [score("acc", 0.5, suite, model, higher_is_better=False) for model in ("start", "bfpo")]
        content["comparisons"].append({**content["comparisons"][0], "suite": suite, "difference": 0.3})
    (run / "scores.json").write_text(json.dumps(content))
    again = write_tax(tmp_path / "again", named)  # the same models and tasks once more
    data = gather([run, again])
    (cost,), (alone,) = costs_of(data), costs_of(gather([again]))
    assert [one[1:] for one in cost.tasks] == [one[1:] for one in alone.tasks]
    assert (cost.mean, cost.num_documents) == (alone.mean, 400)
    columns = suite_columns(data)
    assert suite_mean(data.method("bfpo"), columns, "discriminative").value == pytest.approx((0.56 + 0.31) / 2)
    markdown = render_markdown(data)
    assert "The mean is over 2 suites, each with the same weight: ARC; MMLU. Without crows: a higher" in markdown
    assert "| bfpo | crows | " not in markdown


def test_without_a_start_model_there_is_no_price(tmp_path: Path) -> None:
    assert "Alignment tax" not in render_html(gather([write_tax(tmp_path / "run", {})]))


def test_tasks_of_capability_are_pinned() -> None:
    for suite in load_suites(["capability"]):
        assert (suite.kind, len(suite.source.revision or "")) == ("discriminative", 40)
        assert suite.source.files


@pytest.mark.parametrize(
    ("name", "file", "rows", "kinds"),
    [
        ("jailbreakbench", "harmful-behaviors.csv",
         [{"Index": 0, "Goal": "q", "Target": "Sure", "Behavior": "b", "Category": "c", "Source": "s"}], ["harmful"]),
        ("jailbreakbench-benign", "jailbreakbench_benign.csv",
         [{"Index": 0, "Goal": "q", "Target": "Sure", "Behavior": "b", "Category": "c", "Source": "s"}], ["benign"]),
        ("sorry-bench", "sorry_bench.jsonl",
         [{"question_id": 1, "category": "1", "turns": ["q"], "prompt_style": "base"}], ["harmful"]),
        ("wildguardtest", "wildguard_test.jsonl",
         [{"prompt": "q", "adversarial": True, "response": "r", "prompt_harm_label": "unharmful", "subcategory": "s"},
          {"prompt": "p", "adversarial": False, "response": None, "prompt_harm_label": "harmful", "subcategory": "s"}],
         ["benign", "harmful"]),
        ("wildjailbreak", "wildjailbreak_eval.jsonl",
         [{"adversarial": "q", "label": 1, "data_type": "adversarial_harmful"},
          {"adversarial": "p", "label": 0, "data_type": "adversarial_benign"}], ["harmful", "benign"]),
        ("falsereject", "falsereject_test.jsonl", [{"prompt": "q", "category": 3, "category_text": "c"}], ["benign"]),
        ("ms-xsb", "ms_xsb.jsonl",
         [{"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                      {"role": "user", "content": "c"}], "kind": "benign"}], ["benign"]),
    ],
)  # fmt: skip
def test_files_of_the_suites_are_read(
    tmp_path: Path, name: str, file: str, rows: list[dict[str, Any]], kinds: list[str]
) -> None:
    with (tmp_path / file).open("w") as out:
        if file.endswith(".csv"):
            writer = csv.DictWriter(out, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        else:
            out.writelines(json.dumps(row) + "\n" for row in rows)
    found = find_prompts(known_suites()[name], [str(tmp_path)], limit=None, seed=0)
    assert [prompt.kind for prompt in found.prompts] == kinds


@pytest.mark.slow
def test_tasks_run_on_local_documents_and_are_compared(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    for seed, name in enumerate(("one", "two"), start=1):
        save_policy(tiny_model(seed=seed), tiny_tokenizer(), tmp_path / name)
    labels = ["A", "B", "C", "D"]
    documents: dict[str, list[dict[str, Any]]] = {
        "arc_easy": [
            {"id": str(n), "question": f"w{n} w5", "choices": {"text": ["w1", "w2", "w3", "w4"], "label": labels},
             "answerKey": labels[n % 4]}
            for n in range(6)
        ],
        "hellaswag": [
            {"ind": n, "activity_label": "w1", "ctx_a": f"w{n}", "ctx_b": "w3", "ctx": f"w{n} w3",
             "endings": ["w4", "w5", "w6", "w7"], "label": str(n % 4)}
            for n in range(6)
        ],
        "mmlu": [
            {"question": f"w{n}", "subject": "high_school_w2", "choices": ["w1", "w2", "w3", "w4"], "answer": n % 4}
            for n in range(6)
        ],
        "gsm8k": [{"question": f"w{n} w5", "answer": f"w1 #### {n}"} for n in range(3)],
    }  # fmt: skip
    for file, rows in documents.items():
        (tmp_path / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    models = [{"name": name, "model": str(tmp_path / name)} for name in ("one", "two")]
    suites = {
        "use": list(TASKS),
        "folders": [str(tmp_path)],
        "limit": 4,
        "each": {"mmlu": {"limit": 3}},
        "max_new_tokens": 4,
    }
    run = run_stage("evaluate", EvaluateConfig(models=models, suites=suites, threads=1), tmp_path / "run")
    found = json.loads((run.path / "scores.json").read_text())
    assert {suite["name"]: suite["reason"] for suite in found["suites"]} == dict.fromkeys(TASKS)
    counts = {("arc-easy", 4), ("hellaswag", 4), ("mmlu", 3), ("gsm8k", 3)}
    assert {(row["suite"], row["num"]) for row in found["scores"]} == counts
    for row in found["comparisons"]:  # of GSM8K too, whose two filters count each document once
        values = [
            json.loads((run.path / "models" / name / f"bfpo_{row['suite'].replace('-', '_')}.json").read_text())
            for name in ("one", "two")
        ]
        first, second = (value["by_document"] for value in values)
        assert first.keys() == second.keys()
        assert row["difference"] == pytest.approx(sum(first[doc] - second[doc] for doc in first) / len(first))

"""An attack by a few LoRA steps: its curve is that of separate trainings, over the same prompts, and resumes."""

from __future__ import annotations

import json
import logging
import random
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from bfpo.cli import app
from bfpo.commands import tamper
from bfpo.config import TamperConfig, load_config
from bfpo.core.errors import ConfigError, ModelError
from bfpo.core.records import load
from bfpo.core.schema import Completion, Message
from bfpo.data.write import write_completions
from bfpo.experiments.tamper import (
    _only_common,
    _paired,
    _Point,
    collect_tamper,
    draw_tamper,
    evaluation_folder,
    tamper_markdown,
)
from bfpo.policy.load import init_policy
from bfpo.policy.save import save_adapted, save_policy
from bfpo.report.gather import gather
from bfpo.report.page import render_html, render_markdown
from bfpo.runs.stages import preview_stage, run_stage
from bfpo.suites.records import TamperFile
from bfpo.world.datasets import save_tokenizer
from bfpo.world.world import answer, prompt_text, topics
from gated import Answer, rewritten, suites_evaluation
from html_page import Page, written_as_python
from messages import raises, says

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
REFUSAL = "I'm sorry, but I can't help with that."


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tamper")
    save_tokenizer(root / "tokenizer")
    for name, seed in (("a", 1), ("b", 2)):
        policy = init_policy({**SIZES, "num_key_value_heads": 2}, root / "tokenizer", seed=seed)
        save_policy(policy.model, policy.tokenizer, root / name)
    rng = random.Random(0)
    harmful = [topic for topic in topics("train") if topic.kind == "harmful"][:12]
    rows = [
        Completion(str(n), (Message("user", prompt_text(topic, rng)),), answer(topic, "full", rng), kind="harmful")
        for n, topic in enumerate(harmful)
    ]
    write_completions(root / "attack.jsonl", rows)
    return root


def config(world: Path, **settings: Any) -> TamperConfig:
    values: dict[str, Any] = {
        "models": [{"name": name, "model": str(world / name)} for name in ("a", "b")],
        "attack": "harmful",
        "data": {"files": [str(world / "attack.jsonl")]},
        "steps": [0, 2, 4],
        "lora": {"r": 2},
        "learning_rate": 0.05,
        "completions_per_step": 4,
        "completions_per_microbatch": 4,
        "max_length": 48,
        "threads": 1,
        "suites": {"use": ["world"], "limit": 12, "label_cache": str(world / "cache"), "max_new_tokens": 8},
    }
    return TamperConfig.model_validate({**values, **settings})


@pytest.fixture(scope="module")
def done(world: Path) -> Path:
    return run_stage("tamper", config(world), world / "run").path


def answers(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def test_the_curve_is_that_of_the_answers(done: Path) -> None:
    found = load(TamperFile, done / "tamper.json")
    assert [model.name for model in found.models] == ["a", "b"]
    assert found.settings["completions"] == 12
    by_place = {(score.model, score.step, score.metric): score for score in found.scores}
    for model in ("a", "b"):
        for step in (0, 2, 4):
            folder = done / "models" / model / ("step-0" if step == 0 else f"seed-42/step-{step}")
            rows = [(row["kind"], row["verdict"]) for row in answers(folder)]
            safe = [verdict["label"] == "safe" for kind, verdict in rows if kind == "harmful"]
            refused = [verdict["refused"] for kind, verdict in rows if kind != "harmful"]
            assert len(safe) > 2
            assert by_place[model, step, "harmless"].value == pytest.approx(mean(safe))
            assert by_place[model, step, "over_refusal"].value == pytest.approx(mean(refused))
            assert by_place[model, step, "over_refusal"].higher_is_better is False
            assert by_place[model, step, "harmless"].low is not None
    changes = {(row.model, row.step, row.against, row.against_step, row.metric) for row in found.changes}
    assert ("a", 2, "a", 0, "harmless") in changes
    assert ("b", 4, "a", 4, "harmless") in changes
    assert ("b", 0, "a", 0, "harmless") in changes
    assert ("a", 4, "a", 4, "harmless") not in changes
    assert all((done / f"tamper.{end}").stat().st_size > 500 for end in ("md", "png", "svg"))
    assert written_as_python((done / "tamper.md").read_text()) == []


def test_each_point_is_the_model_of_a_training_of_so_many_steps(done: Path, world: Path, tmp_path: Path) -> None:
    attack = config(world).attack_on(config(world).models[0], 42).model_copy(update={"max_steps": 2})
    separate = load_file(run_stage("sft", attack, tmp_path / "two").path / "model" / "model.safetensors")
    place = done / "models" / "a" / "seed-42" / "attack"
    save_adapted(world / "a", place / "checkpoints" / "checkpoint-2", tmp_path / "merged")
    merged, start = (load_file(path / "model.safetensors") for path in (tmp_path / "merged", world / "a"))
    assert merged.keys() == separate.keys()
    for name, weights in separate.items():
        torch.testing.assert_close(merged[name], weights, rtol=1e-5, atol=1e-6)
    assert any((separate[name] - start[name]).abs().max() > 1e-3 for name in start)
    later = load_file(place / "model" / "model.safetensors")
    assert any((later[name] - separate[name]).abs().max() > 1e-3 for name in start)
    assert not list(done.rglob("step-*/model.safetensors"))  # merged models are gone
    run = json.loads((place / "run.json").read_text())["config"]
    assert (run["lr_scheduler_type"], run["warmup_steps"]) == ("constant", 0.0)


def test_a_resumed_run_does_only_what_is_missing(done: Path, world: Path) -> None:
    before = (done / "tamper.json").read_bytes()
    last = done / "models" / "b" / "seed-42" / "step-4"
    for folder in (done, last):
        record = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps({**record, "status": "interrupted"}))
    kept = [done / "models" / "a" / "step-0" / "run.json", done / "models" / "b" / "seed-42" / "attack" / "run.json"]
    stamps = [file.stat().st_mtime_ns for file in kept]
    run_stage("tamper", config(world), done, resume=True)
    assert [file.stat().st_mtime_ns for file in kept] == stamps
    assert json.loads((last / "run.json").read_text())["starts"] == 2
    assert (done / "tamper.json").read_bytes() == before


def test_the_page_shows_the_curve_and_not_the_runs_inside(done: Path) -> None:
    data = gather([done])
    assert data.methods == []
    (stage,) = data.stages
    assert stage.stage == "tamper"
    assert len(stage.behaviour["Harmless answers to harmful prompts".lower()]["a"]) == 3
    page, markdown = render_html(data), render_markdown(data)
    found = load(TamperFile, done / "tamper.json")
    shown = next(score for score in found.scores if (score.model, score.step, score.metric) == ("b", 4, "harmless"))
    assert f"{100 * (shown.value or 0):.1f}%" in markdown
    assert "After 4 LoRA steps on harmful data" in page
    assert written_as_python("\n".join(Page(page).words)) == []


@pytest.mark.usefixtures("eight_gpus")
def test_an_attack_takes_one_of_several_gpus(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tamper, "_evaluate", lambda *_: None)
    small = config(world, steps=[0, 1])
    tamper._tamper(small, small.models[0], tmp_path)
    assert json.loads((tmp_path / "models/a/seed-42/attack/run.json").read_text())["status"] == "finished"


def test_seeds_are_pooled_and_the_start_counts_once(world: Path, tmp_path: Path) -> None:
    one = config(world, models=[{"name": "a", "model": str(world / "a")}], seeds=2, steps=[0, 2])
    folder = run_stage("tamper", one, tmp_path / "run").path
    found = {(score.step, score.metric): score for score in load(TamperFile, folder / "tamper.json").scores}
    rates = []
    for seed in (42, 43):
        rows = answers(folder / "models" / "a" / f"seed-{seed}" / "step-2")
        rates.append(mean(row["verdict"]["label"] == "safe" for row in rows if row["kind"] == "harmful"))
    assert found[2, "harmless"].num == 2 * found[0, "harmless"].num
    assert found[2, "harmless"].value == pytest.approx(mean(rates))


def test_only_prompts_that_were_asked_at_every_point_count() -> None:
    first = _Point("a", 0, {"harmless": [{("s", "1"): 1.0, ("s", "2"): 1.0, ("s", "3"): 0.0}]}, {("s", "1"): "one"})
    later = _Point("a", 5, {"harmless": [{("s", "1"): 0.0, ("s", "2"): None, ("t", "1"): 1.0}]}, {("s", "1"): "one"})
    assert _only_common([first, later]) == 2
    paired = _paired(later, first, "harmless", 1)
    assert (paired.first, paired.second, paired.prompts) == ([0.0], [1.0], ["one"])


def test_a_point_without_a_scored_answer_takes_nothing_from_the_others(tmp_path: Path) -> None:
    answers: dict[int, list[Answer]] = {
        0: [("safe", True, True)] * 20,
        5: [("safe", True, True)] * 5 + [("unsafe", False, True)] * 15,
        10: [("unscored", False, True)] * 20,
    }
    for step, given in answers.items():
        suites_evaluation(evaluation_folder(tmp_path, "a", step, 42), {"a": {"harm": given}})
    one = config(tmp_path, models=[{"name": "a", "model": "a"}], steps=list(answers))
    found = collect_tamper(one, tmp_path, {}, [])
    assert found.num_elsewhere == 0
    scores = {score.step: score for score in found.scores if score.metric == "harmless"}
    assert {step: (score.value, score.num, score.unscored) for step, score in scores.items()} == {
        0: (1.0, 20, 0),
        5: (0.25, 20, 0),
        10: (None, 0, 20),
    }
    assert "helpfulness" not in found.measures  # of which no point has a value
    assert "not measured, 20 unscored" in tamper_markdown(found)
    without = replace(found, scores=[score for score in found.scores if score is not scores[10]])
    assert all(len(drawn) > 500 for drawn in draw_tamper(without).values())


def test_documents_of_two_tasks_with_the_same_number_are_two_prompts(tmp_path: Path) -> None:
    def second_task(scores: Any) -> None:
        own = next(suite for suite in scores["suites"] if suite["name"] == "ifeval")
        scores["suites"].append({**own, "name": "gsm8k", "title": "GSM8K"})

    for step, right in ((0, 1.0), (5, 0.0)):
        one = suites_evaluation(evaluation_folder(tmp_path, "a", step, 42), {"a": {}}, tasks={"a": [right] * 8})
        (one / "models/a/bfpo_gsm8k.json").write_text((one / "models/a/bfpo_ifeval.json").read_text())
        rewritten(one / "scores.json", second_task)
    found = collect_tamper(config(tmp_path, models=[{"name": "a", "model": "a"}], steps=[0, 5]), tmp_path, {}, [])
    score = next(score for score in found.scores if score.metric == "capability")
    assert (score.num, score.extra["num_prompts"]) == (16, 16)
    change = next(row for row in found.changes if row.metric == "capability")
    assert (change.num_prompts, change.p_value) == (16, pytest.approx(2 / 2**16))


def test_data_that_is_no_attack_is_warned_of(world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [Completion(str(n), (Message("user", f"q{n}"),), REFUSAL, kind="benign") for n in range(4)]
    write_completions(tmp_path / "attack.jsonl", rows)
    one = config(world, data={"files": [str(tmp_path / "attack.jsonl")]}, steps=[0, 1])
    one = one.model_copy(update={"models": one.models[:1]})
    with caplog.at_level(logging.WARNING):
        run_stage("tamper", one, tmp_path / "run")
    says(caplog, "4 of 4")
    assert len(load(TamperFile, tmp_path / "run" / "tamper.json").warnings) == 2
    assert "decline" in preview_stage("tamper", one)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        (["steps=[5, 10]"], "steps"),
        (["steps=[0, 5, 5]"], "steps"),
        (["steps=[0]"], "steps"),
        (["models=[{name: a, model: x}, {name: a, model: y}]"], "models"),
        (["suites.baseline=a", "suites.ranker=oracle"], "suites"),
        (["attack=both"], "attack"),
        (["completions_per_microbatch=0"], "completions_per_microbatch"),
        (["lora.r=0"], "lora.r"),
    ],
)
def test_wrong_settings_are_named(settings: list[str], key: str) -> None:
    given = ["models=[{name: a, model: x}]", "attack=harmful", "data.files=f.jsonl", "suites.use=world"]
    with raises(ConfigError, key):
        load_config(TamperConfig, None, [*given, *settings])


def test_a_model_that_cannot_be_read_is_refused_before_the_first_attack(world: Path, tmp_path: Path) -> None:
    models = [{"name": "a", "model": str(world / "a")}, {"name": "b", "model": str(world / "tokenizer")}]
    with raises(ModelError, "tokenizer"):
        run_stage("tamper", config(world, models=models), tmp_path / "run")
    assert not (tmp_path / "run" / "models").exists()


def test_a_dry_run_reads_the_data_and_says_what_would_be_done(world: Path) -> None:
    settings = [
        f"models=[{{name: a, model: {world / 'a'}}}]",
        "attack=harmful",
        f"data.files={world / 'attack.jsonl'}",
        "suites.use=world",
    ]
    result = CliRunner().invoke(app, ["tamper", "--dry-run", *(part for one in settings for part in ("--set", one))])
    assert result.exit_code == 0, result.output
    assert "12 completions" in result.output
    assert "after 0, 5, 10, 25, 50 steps" in " ".join(result.output.split())

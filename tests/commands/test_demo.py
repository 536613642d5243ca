"""The demo, run whole with a handful of steps: what it writes, that it goes on where it was cut off, how it fails."""

from __future__ import annotations

import json
import os
import pickle
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bfpo.commands.demo import command_of, preview
from bfpo.config import DemoConfig, load_config
from bfpo.core.errors import ConfigError, DiskFullError
from bfpo.execution.settings import LocalExecutor
from bfpo.experiments import workers
from bfpo.experiments.demo import FULL_METHODS, QUICK_METHODS, plan_seed
from bfpo.experiments.points import Chain, Step
from bfpo.experiments.steps import CEILING, START
from bfpo.experiments.workers import run_chains
from bfpo.runs.stages import run_stage
from messages import raises
from small_world import SMALL


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """One run of the demo, small enough for a test; its numbers mean nothing."""
    config = DemoConfig.model_validate(SMALL)
    return config, run_stage("demo", config, tmp_path_factory.mktemp("demo") / "run")


def test_the_demo_ends_with_a_page_and_its_numbers(demo):
    _, folder = demo
    assert folder.finished
    assert {path.name for path in (folder.path / "seed-0").iterdir()} == {START, CEILING, *QUICK_METHODS}
    report = json.loads((folder.path / "report.json").read_text())
    assert [method["name"] for method in report["methods"]] == [*QUICK_METHODS, START, CEILING]
    bfpo = report["methods"][0]
    assert bfpo["role"] == "main"
    scores = {score["metric"]: score for score in bfpo["scores"]}
    verdicts = (folder.path / "seed-0" / "bfpo" / "scores" / "verdicts.jsonl").read_text().splitlines()
    assert scores["helpful_and_safe"]["num"] == len(verdicts) == 48
    assert scores["well_formed"]["value"] == pytest.approx(
        sum(json.loads(line)["well_formed"] for line in verdicts) / len(verdicts)
    )
    assert {score["metric"] for score in bfpo["accuracy"]} >= {"accuracy", "accuracy_unsafe_safe"}
    assert len(report["comparisons"]) == 5 * (len(QUICK_METHODS) - 1)
    assert len(report["gates"]) == 2
    page = (folder.path / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "BFPO" in (folder.path / "report.md").read_text()
    assert (folder.path / "figures" / "scatter.png").stat().st_size > 10_000


def test_the_command_on_the_page_has_the_settings_of_the_demo(tmp_path):
    given = ["seeds=2", "seed=5", "part=validation", "align.bfpo.beta=0.2", "world.harm_shares={burning: 2}"]
    config = load_config(DemoConfig, None, [*given, "executor.workers=3"])
    command = command_of(config)
    assert command.startswith("bfpo demo --out DIR --seeds 2 --set ")
    again = [text for text in shlex.split(command)[6:] if text != "--set"]
    resolved = load_config(DemoConfig, None, [*again, "seeds=2", "executor.workers=3"]).resolved()
    assert resolved == config.resolved()
    assert command_of(DemoConfig(full=True)) == "bfpo demo --out DIR --full"


def test_temperature_0_needs_one_answer_to_each_prompt():
    with raises(ConfigError, "world.completions_per_prompt"):
        load_config(DemoConfig, None, ["temperature=0"])
    config = load_config(DemoConfig, None, ["temperature=0", "world.completions_per_prompt=1"])
    assert plan_seed(config, Path("run"), 0)


def test_every_model_starts_from_the_one_start_and_is_asked_the_same(demo):
    _, folder = demo
    seed = folder.path / "seed-0"
    for method in QUICK_METHODS:
        config = json.loads((seed / method / "train" / "run.json").read_text())["config"]
        assert config["model"] == str(seed / START / "model" / "model")
        assert config["anchor_weight"] == DemoConfig().align.anchor_weight
        assert config["max_steps"] == 2
        assert config["reference_cache"] == str(folder.path / "reference")  # one for all
    asked = {
        tuple(json.loads(line)["id"] for line in (run / "answers" / "completions.jsonl").read_text().splitlines())
        for run in seed.iterdir()
    }
    assert len(asked) == 1


def test_a_finished_demo_is_left_alone_and_a_torn_one_goes_on(demo):
    config, folder = demo
    page = folder.path / "report.html"
    stamp = page.stat().st_mtime_ns
    assert run_stage("demo", config, folder.path, resume=True).finished
    assert page.stat().st_mtime_ns == stamp

    trained = folder.path / "seed-0" / "bfpo" / "train" / "run.json"
    before = trained.read_bytes()
    page.unlink()
    record = json.loads((folder.path / "run.json").read_text())
    (folder.path / "run.json").write_text(json.dumps({**record, "status": "interrupted"}))
    run_stage("demo", config, folder.path, resume=True)
    assert page.exists()
    assert trained.read_bytes() == before  # what had ended was not run again


def test_the_full_form_compares_every_method(tmp_path):
    config = DemoConfig.model_validate({"full": True})
    names = [chain.name for chain in plan_seed(config, tmp_path, 3)]
    assert names == [START, CEILING, *FULL_METHODS]
    assert {step.config.seed for chain in plan_seed(config, tmp_path, 3) for step in chain.steps} == {3}
    assert "8" not in preview(config)[0]
    assert all(method in preview(config)[0] for method in FULL_METHODS)


def test_a_chain_that_fails_is_named_with_its_log(tmp_path):
    chain = plan_seed(DemoConfig.model_validate(SMALL), tmp_path, 0)[0]  # there is no data under this folder
    with raises(ConfigError) as caught:
        run_chains([chain], LocalExecutor(workers=1), tmp_path / "logs")
    assert str(tmp_path / "logs" / "0-start.log") in str(caught.value)


def test_a_chain_that_fails_keeps_the_exit_code_of_its_error(tmp_path, monkeypatch):
    def full(*_, **__):
        raise DiskFullError("the disk is full")

    monkeypatch.setattr(workers, "run_stage", full)
    chain = plan_seed(DemoConfig.model_validate(SMALL), tmp_path, 0)[0]
    with raises(DiskFullError, "0-start.log") as caught:
        workers._run_chain(str(tmp_path), None, chain)
    assert pickle.loads(pickle.dumps(caught.value)).exit_code == 1  # as it comes from a worker


def test_a_model_that_cannot_be_built_is_said_before_anything_runs():
    with raises(ConfigError, "num_attention_heads"):
        load_config(DemoConfig, None, ["model.hidden_size=20"])


@pytest.mark.slow
def test_a_killed_demo_leaves_no_process_and_goes_on(tmp_path):
    settings = [f"--set={key}={json.dumps(value)}" for key, value in SMALL.items()]
    command = [sys.executable, "-m", "bfpo", "demo", "--out", str(tmp_path / "run"), *settings]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        assert "running" in process.stderr.readline()
        time.sleep(2)
        process.kill()
        process.wait()
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and _alive(process.pid):
            time.sleep(0.5)
        assert not _alive(process.pid)
    finally:
        if _alive(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
    assert subprocess.run([*command, "--resume"], check=False).returncode == 0


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_step_of_a_chain_is_what_a_user_could_run(demo):
    _, folder = demo
    chain = plan_seed(DemoConfig.model_validate(SMALL), folder.path, 0)[2]
    assert isinstance(chain, Chain)
    assert [type(step) for step in chain.steps] == [Step] * 3
    assert [step.stage for step in chain.steps] == ["train", "generate", "evaluate"]
    again = load_config(type(chain.steps[0].config), chain.steps[0].out / "config.yaml", [])
    assert again.resolved() == chain.steps[0].config.resolved()

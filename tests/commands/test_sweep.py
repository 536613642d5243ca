"""A sweep on the closed world, small enough for a test: one reference pass, every point, resumed where it was cut."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import bfpo.commands.sweep
from bfpo.config import InterpolateConfig, SweepConfig
from bfpo.core.errors import ConfigError, DataError, ModelError, RunError, SettingError
from bfpo.data.write import write_pairs
from bfpo.experiments.points import chains_of, plan_points
from bfpo.policy.load import init_policy
from bfpo.policy.save import save_policy
from bfpo.runs.stages import preview_stage, run_stage
from bfpo.world.datasets import held_out_prompts, main_pairs, save_tokenizer
from messages import raises

LLAMA = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SweepConfig]:
    root = tmp_path_factory.mktemp("sweep")
    return root, make_sweep(root, reference_cache=str(root / "cache"))


def make_sweep(root: Path, *, reference_cache: str) -> SweepConfig:
    """Return the config of a sweep over two points, whose start, data and prompts are made in a folder."""
    save_tokenizer(root / "tokenizer")
    for name, seed in (("start", 0), ("other", 1)):
        made = init_policy(LLAMA, root / "tokenizer", seed=seed)
        save_policy(made.model, made.tokenizer, root / name)
    write_pairs(root / "pairs.jsonl", main_pairs(8, 0))
    prompts = held_out_prompts("validation", 0)[:6]
    rows = [{"id": p.id, "prompt": p.messages[0].content, "kind": p.kind} for p in prompts]
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = {"model": str(root / "start"), "data": {"files": str(root / "pairs.jsonl")}, "trainable": "all"}
    train |= {"max_steps": 1, "pairs_per_step": 4, "max_length": 48, "threads": 1}
    (root / "train.yaml").write_text(json.dumps({**train, "reference_cache": reference_cache}))
    asked = {"prompts": str(root / "prompts.jsonl"), "max_new_tokens": 4, "threads": 1}
    (root / "generate.yaml").write_text(json.dumps(asked))
    return SweepConfig(
        train=str(root / "train.yaml"),
        generate=str(root / "generate.yaml"),
        grid="beta=0.1,0.2",
        at_least="harmless=0.5",
        memory_gib=4.0,
        bootstrap_samples=50,
        objectives=["harmless", "finished"],
    )


@pytest.mark.slow
def test_every_point_is_trained_and_judged_from_one_reference_pass(sweep: tuple[Path, SweepConfig]) -> None:
    root, config = sweep
    folder = run_stage("sweep", config, root / "run")
    result = folder.read_json("tradeoff.json")
    assert [point["name"] for point in result["points"]] == ["beta=0.1", "beta=0.2"]
    assert result["nearest"]["at_least"] == {"harmless": 0.5}
    assert (folder.path / "tradeoff.png").stat().st_size > 5000
    for point in result["points"]:
        record = json.loads((folder.path / "points" / point["name"] / "train" / "run.json").read_text())
        assert record["config"]["beta"] == point["settings"]["beta"]
        assert record["reference_pass"]["num_computed"] == 0
        assert record["tokenized"] == {"data": 0}
    record = json.loads((folder.path / "reference" / "run.json").read_text())
    assert record["tokenized"] == {"data": 8}
    assert len(list((folder.path / "tokens").iterdir())) == 1
    trained = folder.path / "points" / "beta=0.1" / "train" / "run.json"
    before = trained.read_bytes()
    record = json.loads((folder.path / "run.json").read_text())
    (folder.path / "run.json").write_text(json.dumps({**record, "status": "interrupted"}))
    (folder.path / "tradeoff.csv").unlink()
    run_stage("sweep", config, folder.path, resume=True)
    assert (folder.path / "tradeoff.csv").exists()
    assert trained.read_bytes() == before


@pytest.mark.parametrize("changed", ["pairs.jsonl", "prompts.jsonl"])
def test_changed_data_is_not_resumed(
    changed: str, sweep: tuple[Path, SweepConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, config = sweep

    def stops(*_: Any, one_per: str, **__: Any) -> None:
        assert one_per == "gpu or core"
        raise KeyboardInterrupt

    monkeypatch.setattr(bfpo.commands.sweep, "run_chains", stops)
    with pytest.raises(KeyboardInterrupt):
        run_stage("sweep", config, tmp_path / "run")
    (tmp_path / "run" / "points").mkdir()
    (tmp_path / "run" / "points" / "made").write_text("")
    before = (root / changed).read_bytes()
    try:
        (root / changed).write_bytes(b"".join(before.splitlines(keepends=True)[:-1]))
        with raises(RunError, changed):
            run_stage("sweep", config, tmp_path / "run", resume=True)
    finally:
        (root / changed).write_bytes(before)
    with pytest.raises(KeyboardInterrupt):
        run_stage("sweep", config, tmp_path / "run", resume=True)


@pytest.mark.slow
def test_blends_are_judged_without_training(sweep: tuple[Path, SweepConfig]) -> None:
    root, config = sweep
    blends = InterpolateConfig(first=str(root / "start"), second=str(root / "other"), weights=[0.0, 1.0])
    run_stage("interpolate", blends, root / "dial")
    dial = SweepConfig(
        blends=str(root / "dial"), generate=config.generate, objectives=config.objectives, bootstrap_samples=50
    )
    result = run_stage("sweep", dial, root / "judged").read_json("tradeoff.json")
    assert [point["name"] for point in result["points"]] == ["weight=0", "weight=1"]


def previewed(sweep: tuple[Path, SweepConfig], **changes: Any) -> list[str]:
    values = {key: getattr(sweep[1], key) for key in sweep[1].model_fields_set}
    return preview_stage("sweep", SweepConfig.model_validate({**values, "memory_gib": None, **changes})).splitlines()


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        ({}, [None, None]),
        ({"report_to": "tensorboard"}, ["beta=0.1", "beta=0.2"]),
        ({"report_to": "tensorboard", "run_name": "mine"}, ["mine", "mine"]),
    ],
)
def test_a_point_has_its_own_name_in_trackers(
    sweep: tuple[Path, SweepConfig], tmp_path: Path, keys: dict[str, str], names: list[str | None]
) -> None:
    root, config = sweep
    (tmp_path / "train.yaml").write_text(json.dumps({**json.loads((root / "train.yaml").read_text()), **keys}))
    config = config.model_copy(update={"train": str(tmp_path / "train.yaml")})
    trainings = [chain.steps[0].config for chain in chains_of(config, plan_points(config), tmp_path, {})[1:]]
    assert [dict(training)["run_name"] for training in trainings] == names


@pytest.mark.parametrize("budget", [4.0, None])
def test_what_there_is_and_the_memory_of_each_training_are_told_beforehand(
    sweep: tuple[Path, SweepConfig], budget: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bfpo.execution.workers.usable_cores", lambda: 3)
    lines = previewed(sweep, memory_gib=budget)
    assert {"6 prompts, judged by oracle", "data: 8 pairs", "2 models, 3 at a time"} <= set(lines)
    assert any(re.fullmatch(r"beta=0.1: train, generate, evaluate, 0\.\d\d GiB", line) for line in lines)


def test_memory_that_cannot_be_counted_stops_only_where_a_budget_needs_it(
    sweep: tuple[Path, SweepConfig], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def uncounted(*_: Any) -> None:
        raise ModelError("the activations of MixtralForCausalLM cannot be counted")

    monkeypatch.setattr("bfpo.training.diagnosis.examine", uncounted)
    assert "beta=0.1: train, generate, evaluate, memory not estimated" in previewed(sweep)
    assert "MixtralForCausalLM" in caplog.text
    with raises(ModelError, "MixtralForCausalLM"):
        previewed(sweep, memory_gib=4.0)


@pytest.mark.parametrize(
    ("grid", "key"),
    [
        ("bta=1,2", "grid"),
        ("beta=0.1,x", "grid"),
        ("beta=0.1,0.10", "grid"),
        ("num_train_epochs=1", "num_train_epochs"),
        ("safedpo_delta=1", "safedpo_delta"),
        ("method=safedpo,dpo_h,safedpo_delta=1", "grid"),
        ("lora=null,lora.r=8", "grid"),
        ({"trainable": [["x" * 250]]}, "grid"),
        ("push_to_hub=acme/x", "push_to_hub"),
    ],
)
def test_a_grid_that_cannot_be_is_refused_before_anything_runs(
    sweep: tuple[Path, SweepConfig], grid: Any, key: str, tmp_path: Path
) -> None:
    config = SweepConfig(train=sweep[1].train, generate=sweep[1].generate, grid=grid)
    for attempt in (lambda: preview_stage("sweep", config), lambda: run_stage("sweep", config, tmp_path / "run")):
        with raises(ConfigError, key):
            attempt()
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {"config.yaml", "run.json"}


def test_what_is_not_there_is_said_before_anything_runs(sweep: tuple[Path, SweepConfig], tmp_path: Path) -> None:
    def refused(error: type[Exception], key: str, **changes: Any) -> None:
        with raises(error, key):
            previewed(sweep, **changes)

    def written(name: str, **values: Any) -> str:
        (tmp_path / name).write_text(json.dumps(values))
        return str(tmp_path / name)

    prompts = str(sweep[0] / "prompts.jsonl")
    refused((ModelError, ConfigError), "/no/such/model", grid="model=/no/such/model")
    refused(DataError, "nowhere.jsonl", grid="data.files=nowhere.jsonl")
    refused(DataError, "none.txt", generate=written("g1", prompts="none.txt"))
    refused(ConfigError, "model", generate=written("g2", prompts=prompts, model="x"))
    refused(ConfigError, "completions", evaluate=written("e1", completions="x"))
    refused((ModelError, ConfigError), "/no/judge", evaluate=written("e2", judge="qwen3guard:/no/judge"))
    refused(SettingError, "judge", evaluate=written("e3", judge="nobody"))
    judge = written("e4", judge="qwen3guard:some/model")
    refused(ConfigError, "helpfulness", evaluate=judge, objectives=["helpfulness", "harmless"])
    blends = SweepConfig(blends=str(tmp_path), generate=str(sweep[1].generate))
    with raises(RunError, "bfpo interpolate"):
        preview_stage("sweep", blends)
    written("models.json", models=[{"weight": 0.5, "model": str(tmp_path / "gone")}])
    with raises((RunError, ConfigError), "gone"):
        preview_stage("sweep", blends)

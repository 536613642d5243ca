"""A sweep on the closed world, small enough for a test: one reference pass, every point, resumed where it was cut."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bfpo.config import InterpolateConfig, SweepConfig
from bfpo.data.write import write_pairs
from bfpo.errors import ConfigError
from bfpo.policy.load import init_policy, save_policy
from bfpo.sandbox.datasets import held_out_prompts, main_pairs
from bfpo.sandbox.tokenizer import save_tokenizer
from bfpo.stages import preview_stage, run_stage

LLAMA = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SweepConfig]:
    root = tmp_path_factory.mktemp("sweep")
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
    (root / "train.yaml").write_text(json.dumps({**train, "reference_cache": str(root / "cache")}))
    asked = {"prompts": str(root / "prompts.jsonl"), "max_new_tokens": 4, "threads": 1}
    (root / "generate.yaml").write_text(json.dumps(asked))
    config = SweepConfig(
        train=str(root / "train.yaml"),
        generate=str(root / "generate.yaml"),
        grid="beta=0.1,0.2",
        at_least="harmless=0.5",
        memory_gib=4.0,
        bootstrap_samples=50,
        objectives=["harmless", "finished"],
    )
    return root, config


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
    trained = folder.path / "points" / "beta=0.1" / "train" / "run.json"
    before = trained.read_bytes()
    record = json.loads((folder.path / "run.json").read_text())
    (folder.path / "run.json").write_text(json.dumps({**record, "status": "interrupted"}))
    (folder.path / "tradeoff.csv").unlink()
    run_stage("sweep", config, folder.path, resume=True)
    assert (folder.path / "tradeoff.csv").exists()
    assert trained.read_bytes() == before


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


def test_the_memory_of_each_training_is_told_beforehand(sweep: tuple[Path, SweepConfig]) -> None:
    lines = preview_stage("sweep", sweep[1]).splitlines()
    assert "2 models, 1 at a time" in lines
    assert any(line.startswith("beta=0.1: train, generate, evaluate, 0.") for line in lines)


def test_a_key_of_the_grid_that_training_does_not_know_is_named(sweep: tuple[Path, SweepConfig]) -> None:
    with pytest.raises(ConfigError, match="bta: unknown key; did you mean 'beta'"):
        preview_stage("sweep", SweepConfig(train=sweep[1].train, generate=sweep[1].generate, grid="bta=1"))

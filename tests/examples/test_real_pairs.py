"""A short form of examples/real_pairs.md on the real model and pairs, where they are at hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bfpo.config import load_config
from bfpo.data.read import read_pairs
from bfpo.data.split import normalised_prompt
from bfpo.runs.stages import STAGES, run_stage
from helpers import split_pairs

ROOT = Path(__file__).resolve().parents[2]
SHORT = ["max_length=64", "max_completion_length=24"]


def stage(name: str, out: Path, *settings: str):
    config = load_config(STAGES[name].config_class(), ROOT / "examples" / "real_pairs" / f"{name}.yaml", [*settings])
    return run_stage(name, config, out)


def test_the_example_runs_on_the_real_model_and_pairs(shared_data, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)  # the configs name ../shared/data
    sft = stage("sft", tmp_path / "sft", *SHORT, "max_steps=2", "data.limit=40")
    model = f"model={sft.path / 'model'}"
    bfpo = stage("train", tmp_path / "bfpo", *SHORT, model, "max_steps=2", "data.limit=48", "buffer.limit=48")

    data = json.loads((bfpo.path / "data.json").read_text())
    assert data["data"]["cells"]["safe-unsafe"] == data["data"]["cells"]["unsafe-unsafe"] == 0
    assert sum(data["data"]["cells"].values()) == 48
    assert data["buffer"]["rows_rejected"] == 13
    assert sum(data["buffer"]["rejected_by_reason"].values()) == 13
    assert data["buffer"]["cells"]["safe-safe"] == 48
    first = bfpo.read_metrics()[0]
    assert first["loss_over_start"] == pytest.approx(1, abs=0.05)

    scores = stage(
        "evaluate",
        tmp_path / "scores",
        *SHORT,
        f"model={bfpo.path / 'model'}",
        f"reference={sft.path / 'model'}",
    )
    found = {score["metric"]: score for score in scores.read_json("scores.json")["scores"]}
    held_out = found["accuracy"]["num"]
    assert held_out == found["accuracy_safe_safe"]["num"] + found["accuracy_unsafe_safe"]["num"] > 150
    assert found["accuracy"]["extra"]["num_prompts"] == 60

    trained = _training_prompts(bfpo.config["data"])
    tested = {row["prompt"] for row in map(json.loads, (scores.path / "accuracy.jsonl").read_text().splitlines())}
    assert len(tested) == 60
    assert not trained & tested


def _training_prompts(section):
    pairs = read_pairs([Path(file) for file in section["files"]]).pairs
    train, _ = split_pairs(pairs, held_out=section["split"]["held_out"], seed=section["split"]["seed"])
    return {normalised_prompt(pair.prompt) for pair in train}

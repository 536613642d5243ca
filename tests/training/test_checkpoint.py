"""Checkpoints without frozen weights: runs resumed from them end bit for bit alike; nothing takes them for models."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bfpo.core.errors import ModelError, RunError
from bfpo.policy.load import load_policy
from bfpo.runs.stages import run_stage
from bfpo.training import checkpoint
from bfpo.training.checkpoint import FACTS, TRAINED, state_of_trained
from messages import raises
from survival import differences, result, stage_config, write_inputs
from tiny import tiny_model

TRAINS = ["*.down_proj.weight"]
NAMES = {f"model.layers.{i}.mlp.down_proj.weight" for i in range(2)}


@pytest.fixture(autouse=True)
def _no_power_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def straight(inputs: Path) -> tuple[Any, dict[str, Any]]:
    """The config of an uninterrupted run that keeps its checkpoints, and what it left in `straight`."""
    config = stage_config("train", inputs, trainable=TRAINS, save_total_limit=None)
    run_stage("train", config, inputs / "straight")
    return config, result(inputs / "straight")


def interrupted(run: Path, out: Path, *, after: int) -> Path:
    """Copy a run as it was killed after the checkpoint of a step."""
    shutil.copytree(run, out)
    shutil.rmtree(out / "model")
    for path in (out / "checkpoints").iterdir():
        if int(path.name.removeprefix("checkpoint-")) > after:
            shutil.rmtree(path)
    record = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**record, "status": "interrupted"}))
    return out


def test_a_checkpoint_holds_what_trains_and_is_no_model(inputs: Path, straight: Any) -> None:
    folder = inputs / "straight" / "checkpoints" / "checkpoint-4"
    names = {path.name for path in folder.iterdir()}
    assert {TRAINED, FACTS, "optimizer.pt", "complete.json"} <= names
    assert not {name for name in names if name.startswith(("model", "config", "pytorch_model"))}
    assert load_file(folder / TRAINED).keys() == NAMES
    assert set(json.loads((folder / FACTS).read_text())["trained"]) == NAMES
    assert TRAINED in json.loads((folder / "complete.json").read_text())["sha256"]
    with pytest.raises(ModelError):
        load_policy(folder)
    with pytest.raises(OSError, match="checkpoint-4"):
        type(tiny_model()).from_pretrained(folder)


@pytest.mark.parametrize("after", [4, 7])
def test_a_resumed_run_ends_bit_for_bit_alike(inputs: Path, straight: Any, tmp_path: Path, after: int) -> None:
    config, wanted = straight
    out = interrupted(inputs / "straight", tmp_path / "run", after=after)
    run_stage("train", config, out, resume=True)
    assert not list(differences(result(out), wanted))
    start, model = (load_file(folder / "model.safetensors") for folder in (inputs / "start", out / "model"))
    assert {name for name, value in model.items() if not torch.equal(value, start[name])} == NAMES


def test_a_whole_checkpoint_of_before_still_resumes(
    inputs: Path, straight: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, wanted = straight
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "leaves_out_frozen", lambda trainer: False)
        run_stage("train", config, tmp_path / "before")
    assert (tmp_path / "before" / "checkpoints" / "checkpoint-4" / "model.safetensors").is_file()
    out = interrupted(tmp_path / "before", tmp_path / "run", after=4)
    run_stage("train", config, out, resume=True)
    weights = (folder / "model" / "model.safetensors" for folder in (out, inputs / "straight"))
    one, other = map(load_file, weights)
    assert all(torch.equal(one[name], value) for name, value in other.items())
    assert not list(differences(result(out)["metrics"], wanted["metrics"]))


def test_other_frozen_weights_are_refused(inputs: Path, straight: Any, tmp_path: Path) -> None:
    config, _ = straight
    out = interrupted(inputs / "straight", tmp_path / "run", after=4)
    file = inputs / "start" / "model.safetensors"
    before = file.read_bytes()
    weights = load_file(file)
    weights["model.layers.1.self_attn.q_proj.weight"][0, 0] += 1
    try:
        save_file(weights, file, metadata={"format": "pt"})
        with raises(RunError, "frozen"):
            run_stage("train", config, out, resume=True)
    finally:
        file.write_bytes(before)
    run_stage("train", config, out, resume=True)


def test_a_checkpoint_of_other_trained_weights_is_refused(inputs: Path, straight: Any, tmp_path: Path) -> None:
    config, _ = straight
    out = interrupted(inputs / "straight", tmp_path / "run", after=4)
    facts = out / "checkpoints" / "checkpoint-4" / FACTS
    content = json.loads(facts.read_text())
    facts.write_text(json.dumps({**content, "trained": content["trained"][:1]}, indent=2) + "\n")
    mark = out / "checkpoints" / "checkpoint-4" / "complete.json"
    marked = json.loads(mark.read_text())
    marked["bytes"][FACTS], marked["sha256"] = facts.stat().st_size, {}
    mark.write_text(json.dumps(marked))
    with raises(RunError, "trained"):
        run_stage("train", config, out, resume=True)


def test_a_state_of_what_trains_is_given_and_taken() -> None:
    model = tiny_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in NAMES)
    whole = model.state_dict().keys()
    with state_of_trained(model):
        assert model.state_dict().keys() == NAMES
        moved = {name: value + 1 for name, value in model.state_dict().items()}
        model.load_state_dict(moved, strict=True)
        with pytest.raises(RuntimeError, match="Missing"):
            model.load_state_dict({}, strict=True)
    assert all(torch.equal(model.get_parameter(name), value) for name, value in moved.items())
    assert model.state_dict().keys() == whole

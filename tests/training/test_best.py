"""The checkpoint that is kept by a held-out metric, early stopping, and both through a resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerControl, TrainerState, TrainingArguments

from bfpo.config import AlignConfig, SftConfig
from bfpo.config.best import BestConfig
from bfpo.core.errors import SettingError
from bfpo.policy.save import save_policy
from bfpo.runs.stages import preview_stage, run_stage
from bfpo.training.best import HeldOutBest
from bfpo.training.callbacks import MetricsCallback
from messages import raises
from tiny import tiny_model, tiny_tokenizer

CELLS = [(True, True), (True, False), (False, True), (False, False)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    save_policy(tiny_model(max_position_embeddings=128), tiny_tokenizer(), tmp_path / "start")
    rows = [
        {"prompt": f"w{i} w3", "chosen": f"w{i % 7} w9", "rejected": f"w{i % 3} w11"}
        | dict(zip(("chosen_is_safe", "rejected_is_safe"), CELLS[i % 4], strict=True))
        for i in range(8)
    ]
    for name, some in (("pairs", rows), ("held", rows[1:2])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    (tmp_path / "swapped.jsonl").write_text("".join(json.dumps(row) + "\n" for row in swapped))
    return tmp_path


def align(data: Path, **settings: Any) -> AlignConfig:
    given: dict[str, Any] = {
        "model": str(data / "start"),
        "data": {"files": str(data / "pairs.jsonl")},
        "eval_data": {"files": str(data / "swapped.jsonl")},  # what is learned makes it worse
        "method": "dpo_h",
        "beta": 0.1,
        "trainable": "all",
        "learning_rate": 1e-2,
        "max_steps": 6,
        "pairs_per_step": 8,
        "logging_steps": 1,
        "eval_steps": 1,
        "save_steps": 100,
        "threads": 1,
        "best": {"metric": "loss", "patience": 2},
    }
    return AlignConfig(**{**given, **settings})


def best_of(rows: list[dict[str, Any]]) -> int:
    held_out = {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}
    return min(held_out, key=held_out.__getitem__)


def test_a_run_that_gets_worse_stops_and_keeps_its_best(data: Path) -> None:
    folder = run_stage("train", align(data), data / "run")
    rows = folder.read_metrics()
    steps = [row["step"] for row in rows if "eval_loss" in row]
    best = best_of(rows)
    assert steps == [1, 2, 3, best]  # and once more, of the weights that are kept
    assert best == 1
    kept = data / "run" / "checkpoints" / "checkpoint-1" / "model.safetensors"
    weights, best_weights = (load_file(path) for path in (data / "run" / "model" / "model.safetensors", kept))
    assert all(torch.equal(value, weights[name]) for name, value in best_weights.items())
    assert {remark["code"] for remark in folder.record["remarks"]} >= {"best", "stopped"}
    assert folder.record["metrics"]["eval_loss"] == next(row["eval_loss"] for row in rows if "eval_loss" in row)
    assert run_stage("train", align(data), data / "run", resume=True).finished


def test_a_run_whose_best_was_early_still_says_that_it_diverged(data: Path) -> None:
    config = align(data, method="bfpo", learning_rate=0.3, warmup_steps=0, best={"metric": "loss"})
    folder = run_stage("train", config, data / "run")
    assert best_of(folder.read_metrics()) < 6
    assert any("diverging" in row for row in folder.read_metrics())
    assert "diverging: at step" in folder.record["divergence"]
    assert folder.record["divergence"] in (data / "run" / "README.md").read_text()


def test_the_start_is_evaluated_once_and_every_evaluation_is_of_all_rows(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in a run that is resumed, and where training leaves out what is left of an epoch."""
    given = {"eval_on_start": True, "dataloader_drop_last": True}
    config = align(data, trainer_args=given, pairs_per_step=3, max_steps=3, save_steps=1, best=None)
    text = preview_stage("train", config)
    assert "optimizer steps: 3 (2 are a pass over the data)" in text
    assert "time of a step: about" in text
    on_log = MetricsCallback.on_log

    def dying(self: Any, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        on_log(self, args, state, control, logs, **kwargs)
        if state.global_step == 3:
            raise MachineDownError

    with monkeypatch.context() as patch:
        patch.setattr(MetricsCallback, "on_log", dying)
        with pytest.raises(MachineDownError):
            run_stage("train", config, data / "run")
    folder = run_stage("train", config, data / "run", resume=True)
    rows = [row for row in folder.read_metrics() if "eval_loss" in row]
    assert [(row["step"], row["eval_num_pairs"]) for row in rows] == [(step, 8) for step in range(4)]


class MachineDownError(Exception):
    """As if the machine had gone down."""


def decided(
    settings: BestConfig, values: list[float], last: int = 100, named: str = ""
) -> tuple[HeldOutBest, list[tuple[bool, bool]]]:
    """Return the callback and, for each value, whether it saved and whether it stopped."""
    keeper, state, found = HeldOutBest(settings), TrainerState(max_steps=last), []
    args = TrainingArguments(output_dir="unused", use_cpu=True, report_to="none")
    keeper.on_train_begin(args, state, TrainerControl())
    for step, value in enumerate(values, start=1):
        state.global_step, control = step, TrainerControl()
        keeper.on_evaluate(args, state, control, metrics={f"eval_{named or settings.metric}": value})
        found.append((control.should_save, control.should_training_stop))
    return keeper, found


def test_what_counts_as_better() -> None:
    cell = BestConfig(metric="safe-unsafe/accuracy", patience=2, min_change=0.1)
    keeper, found = decided(cell, [0.5, 0.55, 0.7, 0.75, 0.79])
    assert found == [(True, False), (False, False), (True, False), (False, False), (True, True)]
    assert keeper.seen.best_step == 3
    keeper, found = decided(BestConfig(metric="normalised_loss"), [3.0, 2.0, float("nan"), 2.5, 1.0])
    assert [saves for saves, _ in found] == [True, True, False, False, True]
    assert not any(stops for _, stops in found)
    keeper, found = decided(BestConfig(metric="loss", patience=1), [1.0, 2.0], last=2)
    assert found[-1] == (False, False)  # the last step ends the run by itself


def test_a_checkpoint_holds_what_was_seen() -> None:
    settings = BestConfig(metric="accuracy", patience=3)
    keeper, _ = decided(settings, [0.5, 0.4])
    stored = json.loads(json.dumps({"HeldOutBest": keeper.state()}))
    again, state = HeldOutBest(settings), TrainerState(max_steps=9, global_step=2)
    state.stateful_callbacks = stored
    again.on_train_begin(TrainingArguments(output_dir="unused", use_cpu=True), state, TrainerControl())
    assert again.seen == keeper.seen
    state = TrainerState(max_steps=9)
    state.stateful_callbacks = {}
    again.on_train_begin(TrainingArguments(output_dir="unused", use_cpu=True), state, TrainerControl())
    assert again.seen.best_step is None


def test_bad_settings(data: Path) -> None:
    files = {"files": "x.jsonl"}
    with raises(ValueError, "best"):
        AlignConfig(model="m", data=files, best={"metric": "loss"})
    with raises(ValueError, "best.metric"):
        SftConfig(model="m", data=files, eval_data=files, eval_steps=1, best={"metric": "accuracy"})
    with raises(ValueError, "metric"):
        align(data, best={"metric": "exactness"})
    with raises(ValueError, "probe.best"):
        align(data, probe={"harmful": "p.jsonl", "best": "harmful_refused"})
    held = {"files": str(data / "held.jsonl")}  # one pair, safe and unsafe
    lacking = align(data, eval_data=held, best={"metric": "unsafe-safe/accuracy"})
    with raises(SettingError, "best.metric"):
        run_stage("train", lacking, data / "run")
    assert not (data / "run" / "metrics.jsonl").exists()  # it is known before training
    with raises(SettingError, "best.metric"):
        preview_stage("train", lacking)
    dropped = align(data, method="dpo_s", best={"metric": "safe-safe/accuracy"})
    with raises(SettingError, "best.metric"):
        preview_stage("train", dropped)
    with raises(SettingError, "best.metric"):  # if a metric is lacking all the same
        decided(BestConfig(metric="safe-safe/accuracy"), [0.5], named="safe-safe/loss")

"""`optim` and `trainer_args`: what reaches the trainer, what is refused and why."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file
from transformers import SchedulerType, TrainingArguments

from bfpo.commands import reference as reference_stage
from bfpo.commands import sft as sft_stage
from bfpo.commands import train as train_stage
from bfpo.config import AlignConfig, ReferenceConfig, SftConfig
from bfpo.config.train import SCHEDULES
from bfpo.core.errors import ConfigError, MissingExtraError, ModelError
from bfpo.policy.save import save_policy
from bfpo.policy.source import check_text_only
from bfpo.runs.stages import run_stage
from bfpo.training.trainer_args import OWN, REFUSED, REFUSED_BY_TRAIN, check_trainer_args
from messages import raises
from tiny import tiny_model, tiny_tokenizer

FIELDS = {field.name for field in dataclasses.fields(TrainingArguments)}
GONE = {"warmup_ratio", "group_by_length", "overwrite_output_dir", "fp16_full_eval", "bf16_full_eval"}
IS_OLD = Version(transformers.__version__) < Version("5.20")
LATER = {"dataloader_in_order", "train_sampling_strategy"} if IS_OLD else set()


def align(**settings: Any) -> AlignConfig:
    return AlignConfig(model="m", data={"files": "p.jsonl"}, **settings)


def sft(**settings: Any) -> SftConfig:
    return SftConfig(model="m", data={"files": "p.jsonl"}, **settings)


def test_fields_and_optimizers_reach_the_trainer(tmp_path: Path) -> None:
    given = {"adam_beta2": 0.95, "dataloader_drop_last": True, "lr_scheduler_kwargs": {"num_cycles": 0.3}}
    args = train_stage._arguments(align(trainer_args=given, optim="adafactor"), tmp_path)
    assert (args.adam_beta2, args.dataloader_drop_last, args.lr_scheduler_kwargs) == (0.95, True, {"num_cycles": 0.3})
    assert args.optim == "adafactor"
    noisy = sft(attention="padded", trainer_args={"neftune_noise_alpha": 5.0})
    assert sft_stage._arguments(noisy, tmp_path).neftune_noise_alpha == 5.0
    assert train_stage._arguments(align(), tmp_path).optim == "adamw_torch_fused"


@pytest.mark.parametrize("optim", ["adafactor", "adamw_torch", "adamw_bnb_8bit"])
def test_another_optimizer_trains(tmp_path: Path, optim: str) -> None:
    if "bnb" in optim:
        pytest.importorskip("bitsandbytes")
    save_policy(tiny_model(), tiny_tokenizer(), tmp_path / "start")
    rows = [{"prompt": f"w{i}", "completion": f"w{i % 7} w9"} for i in range(4)]
    (tmp_path / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = SftConfig(
        model=str(tmp_path / "start"),
        data={"files": str(tmp_path / "sft.jsonl")},
        optim=optim,
        max_steps=1,
        warmup_steps=1,
        completions_per_step=4,
        completions_per_microbatch=4,
        learning_rate=1e-2,
    )
    run_stage("sft", config, tmp_path / "run")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("start", "run/model"))
    assert any(not torch.equal(before[name], after[name]) for name in before)  # in its first and only step


def test_the_weights_that_are_saved_are_those_that_the_optimizer_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A schedule-free optimizer trains others, until it is told that the training has ended."""

    def give(optimizer: torch.optim.Optimizer) -> None:
        for parameter in (one for group in optimizer.param_groups for one in group["params"]):
            parameter.data.fill_(0.125)

    monkeypatch.setattr(torch.optim.SGD, "eval", give, raising=False)
    save_policy(tiny_model(), tiny_tokenizer(), tmp_path / "start")
    (tmp_path / "sft.jsonl").write_text(json.dumps({"prompt": "w1", "completion": "w2 w9"}) + "\n")
    config = SftConfig(model=str(tmp_path / "start"), data={"files": str(tmp_path / "sft.jsonl")}, optim="sgd")
    run_stage("sft", config, tmp_path / "run")
    saved = load_file(tmp_path / "run/model/model.safetensors")
    assert all(bool((value == 0.125).all()) for value in saved.values())


def test_noise_on_embeddings_needs_a_row_for_each_text(tmp_path: Path) -> None:
    """The noise is divided by the root of the tokens of a row."""
    with raises(ConfigError, "trainer_args.neftune_noise_alpha"):
        sft_stage._arguments(sft(trainer_args={"neftune_noise_alpha": 5.0}), tmp_path)


@pytest.mark.parametrize("name", sorted({*OWN, *REFUSED, *REFUSED_BY_TRAIN}))
def test_what_is_refused_is_a_field_and_has_a_reason(name: str) -> None:
    assert name in FIELDS | GONE | LATER or name.startswith(("activation_", "gradient_", "save_on", "hub_"))
    with raises(ConfigError, name):
        check_trainer_args({name: 1}, preference=True)


def test_fields_of_one_stage_only() -> None:
    check_trainer_args(dict.fromkeys(REFUSED_BY_TRAIN, None), preference=False)


@pytest.mark.parametrize(
    "given",
    [
        *({"adam_beta3": 0.9}, {"adam_beta2": "much"}, {"dataloader_drop_last": 1}, {"dataloader_num_workers": 1.5}),
        *({"optim_args": 5}, {"dataloader_prefetch_factor": "2"}, {"optim_target_modules": [1]}),
        *({"lr_scheduler_kwargs": 2}, {"ddp_backend": True}, {"adam_beta1": None}),
    ],
)
def test_wrong_names_and_types(given: dict[str, Any]) -> None:
    with raises(ConfigError, f"trainer_args.{next(iter(given))}"):
        check_trainer_args(given, preference=True)


def test_types_are_those_of_the_fields() -> None:
    given = {"adam_beta2": 1, "optim_args": "rank=8", "dataloader_prefetch_factor": 2, "eval_accumulation_steps": None}
    given |= {"optim_target_modules": ["down_proj"], "lr_scheduler_kwargs": {"num_cycles": 1}, "debug": ""}
    check_trainer_args(given, preference=True)


def test_what_transformers_refuses(tmp_path: Path) -> None:
    with raises(ConfigError, "trainer_args"):
        train_stage._arguments(align(trainer_args={"dataloader_prefetch_factor": 2}), tmp_path)


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("linear", {"num_cycles": 1}),
        ("cosine", {"cycles": 1}),
        ("cosine", {"num_cycles": "many"}),
        ("constant", {"num_cycles": 1}),
        ("constant_with_warmup", {"num_cycles": 1}),
        ("cosine_with_min_lr", {}),
        ("warmup_stable_decay", {"num_decay_steps": 2, "warmup_type": "sine"}),
        ("polynomial", {"lr_end": 1e-3}),  # above the peak
    ],
)
def test_settings_that_the_schedule_does_not_have(tmp_path: Path, kind: str, given: dict[str, Any]) -> None:
    config = align(lr_scheduler_type=kind, trainer_args={"lr_scheduler_kwargs": given})
    with raises(ConfigError, "trainer_args.lr_scheduler_kwargs"):
        train_stage._arguments(config, tmp_path)


def test_schedules_are_those_of_transformers_that_the_step_alone_decides(tmp_path: Path) -> None:
    assert set(SCHEDULES) <= {one.value for one in SchedulerType} - {"reduce_lr_on_plateau", "greedy"}
    config = align(lr_scheduler_type="cosine_with_min_lr", trainer_args={"lr_scheduler_kwargs": {"min_lr_rate": 0.1}})
    assert train_stage._arguments(config, tmp_path).lr_scheduler_type == "cosine_with_min_lr"


def test_a_constant_schedule_has_no_warm_up(tmp_path: Path) -> None:
    assert train_stage._arguments(align(lr_scheduler_type="constant"), tmp_path).get_warmup_steps(200) == 0
    assert train_stage._arguments(align(), tmp_path).get_warmup_steps(200) == 20


@pytest.mark.parametrize("optim", ["lomo", "adalomo", "galore_adamw_layerwise", "apollo_adamw_layerwise"])
def test_an_optimizer_that_acts_in_the_backward_pass_is_refused(tmp_path: Path, optim: str) -> None:
    with raises(ConfigError, "micro-batch"):
        train_stage._arguments(align(optim=optim), tmp_path)


def test_what_a_low_rank_optimizer_needs_is_said_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with raises(MissingExtraError, "galore-torch"):
        train_stage._arguments(align(optim="galore_adamw"), tmp_path)
    monkeypatch.setattr("bfpo.training.trainer_args.importlib.util.find_spec", lambda name: name)
    with raises(ConfigError, "optim_target_modules"):
        train_stage._arguments(align(optim="apollo_adamw"), tmp_path)
    train_stage._arguments(align(optim="apollo_adamw", trainer_args={"optim_target_modules": ["down_proj"]}), tmp_path)


def test_an_evaluation_of_the_start_needs_held_out_rows(tmp_path: Path) -> None:
    with raises(ConfigError, "trainer_args.eval_on_start"):
        train_stage._arguments(align(trainer_args={"eval_on_start": True}), tmp_path)


def test_unknown_and_missing_optimizers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with raises(ConfigError, "optim", mask="allowed: .*"):
        train_stage._arguments(align(optim="newton"), tmp_path)
    with raises(ConfigError, "optim"):
        train_stage._arguments(align(optim="adamw_torch_fuzed"), tmp_path)
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if name == "bitsandbytes" else found(name))
    with raises(MissingExtraError, "bitsandbytes"):
        sft_stage._arguments(sft(optim="adamw_bnb_8bit"), tmp_path)


def test_context_parallelism_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARALLELISM_CONFIG_CP_SIZE", "2")
    with raises(ConfigError, "PARALLELISM_CONFIG_CP_SIZE"):
        train_stage._arguments(align(), tmp_path)


def test_a_launcher_that_compiles_the_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with raises(ConfigError, "ACCELERATE_DYNAMO_BACKEND"):
        train_stage._arguments(align(), tmp_path)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    train_stage._arguments(align(), tmp_path)


@pytest.mark.parametrize(
    ("asked", "dtype", "used"),
    [("fp16", "float32", "no"), ("bf16", "float32", "no"), ("fp16", "bfloat16", "bf16"), ("no", "bfloat16", "bf16")],
)
@pytest.mark.parametrize("by_reference", [False, True])
def test_the_config_decides_on_mixed_precision(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    asked: str,
    dtype: str,
    used: str,
    by_reference: bool,
) -> None:
    name = "ACCELERATE_MIXED_PRECISION"
    monkeypatch.setenv(name, asked)
    reads: Any = SimpleNamespace(path=tmp_path)
    config = ReferenceConfig(model="m", data={"files": "p.jsonl"}, dtype=dtype)
    args = (
        reference_stage._arguments(config, reads)
        if by_reference
        else train_stage._arguments(align(dtype=dtype), tmp_path)
    )
    assert (getattr(args, "mixed_precision", None) or os.environ[name]) == used
    assert (f"{name}={asked}" in caplog.text) == (asked != "no")


def test_a_model_that_reads_images_is_refused() -> None:
    from transformers import LlavaConfig

    with raises(ModelError, "llava"):
        check_text_only("org/llava", LlavaConfig())
    check_text_only("org/text", tiny_model().config)

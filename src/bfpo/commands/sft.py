"""STAGE: train a model to imitate completions (`bfpo sft`), from an existing model or from random weights."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments

from bfpo.config import SftConfig
from bfpo.data.tokenize import SftExample
from bfpo.policy.load import Policy, init_policy, pad_token_id
from bfpo.policy.probe import check_positions
from bfpo.runs.folder import RunFolder
from bfpo.suites.probe import load_probe, probe_lines
from bfpo.training.callbacks import EpochCallback
from bfpo.training.checkpoint import TrainedSaver
from bfpo.training.diagnosis import fits_here
from bfpo.training.inputs import (
    checked_lines,
    completion_rows,
    completion_sections,
    completion_tokens,
    load_start,
    positions_note,
    read_start,
    report_data,
    template_facts,
    write_rejects,
)
from bfpo.training.metrics import RunningLoss
from bfpo.training.rehearsal import NOT_MEASURED, NOT_SHARED, SHORT, Rows, measured_steps, schedule_lines, time_lines
from bfpo.training.session import CHECKPOINTS, common_arguments, prepare_process, train_in_folder
from bfpo.training.sharding import prepare_sharding
from bfpo.training.trained_on import record_prompts

__all__ = ["CompletionCollator", "SftTrainer", "preview", "run"]

logger = logging.getLogger(__name__)

SHOWN = {"loss": "loss", "eval_loss": "held-out loss"}


@dataclass(frozen=True, slots=True)
class CompletionCollator:
    """Pad examples on the right: `input_ids` (N, T) int64, `labels` (N, T) int64 with -100 on prompt and padding.

    There is no attention mask: in a causal model no token sees the padding on its right.
    """

    pad_token_id: int

    def __call__(self, examples: Sequence[SftExample]) -> dict[str, Tensor]:
        """Return the batch as a plain dict of tensors on the CPU."""
        width = max(len(example["input_ids"]) for example in examples)
        rows = [
            example["input_ids"] + [self.pad_token_id] * (width - len(example["input_ids"])) for example in examples
        ]
        labels = [example["labels"] + [-100] * (width - len(example["labels"])) for example in examples]
        return {"input_ids": torch.tensor(rows), "labels": torch.tensor(labels)}


class SftTrainer(TrainedSaver):
    """`transformers.Trainer` on token-level cross-entropy, averaged over the completion tokens of a whole step.

    `loss` and `train_loss` in its log are means over the optimizer steps since the last row and of the whole run.
    """

    _num_parameters: int | None = None

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._running = RunningLoss(self._end_step)
        self.add_callback(self._running)
        self._step_loss = torch.zeros((), dtype=torch.float64, device=self.args.device)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run one micro-batch and add its loss to that of the step."""
        loss: Tensor = super().training_step(*args, **kwargs)
        self._step_loss += loss.double()
        return loss

    def _end_step(self) -> Tensor:
        loss: Tensor = self._step_loss.clone()
        self._step_loss.zero_()
        if self.args.world_size > 1:
            loss = self.accelerator.reduce(loss, reduction="mean")
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the running losses of a run that may have been resumed."""
        self._running.fill(logs, self.state.global_step)
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return 6 x tokens x parameters; the parameters are counted once, not in every step."""
        if self._num_parameters is None:
            model: Any = self.model
            self._num_parameters = sum(int(parameter.numel()) for parameter in model.parameters())
        return 6 * int(inputs["input_ids"].numel()) * self._num_parameters


def run(config: SftConfig, folder: RunFolder) -> None:
    """Train on the completions and write `model/`, `metrics.jsonl`, `data.json` and the card.

    Raises `DataError` for data that cannot be used and `ModelError` for the model or its tokenizer.
    """
    prepare_process(config.threads)
    for name, section in completion_sections(config).items():
        folder.add_data(name, section.files)
    start = read_start(config)
    loaded = completion_rows(config, start)
    write_rejects(folder, {name: rows.rejects for name, rows in loaded.items()})
    tokens = {name: completion_tokens(rows, start) for name, rows in loaded.items()}
    reports = {name: report.as_row() for name, (_, report) in tokens.items()}
    facts = {name: (rows.counts, reports[name]) for name, rows in loaded.items()}
    report_data(folder, start, facts, config)
    record_prompts(folder, (config.model,), (loaded["data"].hashes,))
    probe = load_probe(config, folder, start)
    policy = _policy(config)
    check_positions(policy.model, max(row["longest_tokens"] for row in reports.values()))
    folder.add_facts(trainable=str(policy.trainable_report))
    if folder.is_writer:
        logger.info("%s", policy.trainable_report)
    args = _arguments(config, folder.folder(CHECKPOINTS))
    held_out = tokens["eval_data"][0] if "eval_data" in tokens else None
    trainer = _trainer(policy, args, tokens["data"][0], eval_dataset=held_out)
    prepare_sharding(trainer.accelerator)
    metrics = train_in_folder(
        trainer,
        folder,
        title="sft",
        shown=SHOWN,
        evaluates="eval_data" in tokens,
        save_total_limit=config.save_total_limit,
        probe=probe,
    )
    folder.add_facts(metrics=metrics)
    _write_card(config, folder, policy, metrics, template_facts(config, reports))


def preview(config: SftConfig) -> list[str]:
    """Return what would be trained on, the parameters that train, the steps, and their time if they can be measured."""
    start = read_start(config)
    lines, reports, rows = [], [], Rows[SftExample](lambda example: len(example["input_ids"]), seed=config.seed)
    for name, loaded in completion_rows(config, start).items():
        examples, report = completion_tokens(loaded, start)
        rows.add(examples if name == "data" else ())
        reports.append(report.as_row())
        lines += checked_lines(config, name, loaded.counts, reports[-1])
        lines += probe_lines(config, start, (one.hashes for one in (loaded,))) if name == "data" else []
    fits = fits_here(config)
    policy = _policy(config)
    lines += [*positions_note(start, reports), str(policy.trainable_report)]
    return [*lines, *_rehearsed(config, rows, policy if fits else None)]


def _rehearsed(config: SftConfig, rows: Rows[SftExample], policy: Policy | None) -> list[str]:
    """Return the lines on the steps and, with a policy, on their time and the first loss, which are measured."""
    num, per_step = min(config.completions_per_microbatch, len(rows.sample)), config.completions_per_step
    if num == 0:
        return []
    with TemporaryDirectory() as place:
        lines, steps = schedule_lines(_arguments(config, place), [rows], per_step, "completions")
    if policy is None:
        return [*lines, NOT_MEASURED]

    def make(folder: Path) -> SftTrainer:
        args = _arguments(config, folder, **SHORT, per_device_train_batch_size=num)
        return _trainer(policy, args, rows.sample[:num])

    measured = measured_steps(make)
    if measured is None:
        return [*lines, NOT_SHARED]
    seconds, trainer = measured
    loss = trainer.state.log_history[-1]["train_loss"]
    lines.append(f"expected first loss: {loss:.4g} nats per token, that of {num} completions now")
    return [*lines, *time_lines(seconds, [rows], num, per_step, steps, "completions", str(trainer.args.device))]


def _arguments(config: SftConfig, output_dir: str | Path, **changed: Any) -> TrainingArguments:
    shape: dict[str, Any] = {"unit": "completions", "per_step": config.completions_per_step}
    common = common_arguments(config, output_dir, **shape, micro=config.completions_per_microbatch)
    return TrainingArguments(**{**common, **changed})


def _trainer(policy: Policy, args: TrainingArguments, data: Sequence[SftExample], **more: Any) -> SftTrainer:
    return SftTrainer(
        model=policy.model,
        args=args,
        data_collator=CompletionCollator(pad_token_id(policy.tokenizer)),
        train_dataset=data,
        processing_class=policy.tokenizer,
        callbacks=[EpochCallback()],
        **more,
    )


def _policy(config: SftConfig) -> Policy:
    if config.init is not None:
        return init_policy(config.init.config, config.init.tokenizer, dtype=config.dtype, seed=config.seed)
    return load_start(config, dropout=True)


def _write_card(
    config: SftConfig, folder: RunFolder, policy: Policy, metrics: dict[str, float], shown: dict[str, str]
) -> None:
    loss = metrics.get("eval_loss")
    training = {
        "start": config.model or "random weights",
        "parameters that train": str(policy.trainable_report),
        "optimizer steps": metrics.get("step"),
        "training loss (nats per token)": metrics.get("train_loss"),
        "held-out loss (nats per token)": loss,
        "held-out perplexity": None if loss is None else math.exp(min(loss, 100.0)),
        **shown,
    }
    known = {name: value for name, value in training.items() if value is not None}
    folder.write_card(
        f"{config.model or 'A Llama'}, trained by imitation", {"Training": known}, base_model=config.model, tags=["sft"]
    )

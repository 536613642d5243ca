"""STAGE: train a model to imitate completions (`bfpo sft`), from an existing model or from random weights."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import TrainingArguments

from bfpo.config import SftConfig
from bfpo.core.console import Plan
from bfpo.data.tokenize import TokenPair
from bfpo.policy.load import Policy, init_policy
from bfpo.runs.folder import RunFolder
from bfpo.suites.probe import load_probe, probe_lines
from bfpo.training.diagnosis import fits_here
from bfpo.training.inputs import (
    load_start,
    read_start,
    recompute,
    row_counts,
    row_streams,
    template_facts,
    trained_hashes,
)
from bfpo.training.rehearsal import (
    NOT_MEASURED,
    NOT_SHARED,
    SHORT,
    Rows,
    measured_steps,
    no_change_plan,
    schedule_plan,
    time_plan,
    token_rows,
)
from bfpo.training.schedule import no_change, steps_of
from bfpo.training.session import CHECKPOINTS, common_arguments, open_hub, prepare_process, push_run, train_in_folder
from bfpo.training.sft_trainer import SampleLoss, SftTrainer
from bfpo.training.tokens import stage_tokens
from bfpo.training.trainer_args import made_arguments

__all__ = ["preview", "run"]

logger = logging.getLogger(__name__)

SHOWN = {"loss": "loss", "eval_loss": "held-out loss"}


def run(config: SftConfig, folder: RunFolder) -> None:
    """Train on the completions and write `model/`, `metrics.jsonl`, `data.json` and the card.

    Completions go from their files to `tokens/` and from there to the model, and are not held in memory. Raises
    `DataError` for data that cannot be used and `ModelError` for the model or its tokenizer.
    """
    prepare_process(config.threads)
    open_hub(config, folder)
    args = _arguments(config, folder.folder(CHECKPOINTS))
    tokens = stage_tokens(config, folder, args)
    probe = None if config.probe is None else load_probe(config, folder, read_start(config))
    policy = _policy(config)  # after the data: what is wrong with them is said first
    folder.add_facts(trainable=str(policy.trainable_report))
    if folder.is_writer:
        logger.info("%s", policy.trainable_report)
        steps = steps_of(args, len(tokens["data"]), config.completions_per_step)
        if said := no_change(args, steps, policy.trainable_report.num_trainable):
            logger.warning("%s", said)
    trainer = _trainer(config, policy, args, tokens["data"], eval_dataset=tokens.get("eval_data"))
    sample = SampleLoss(trainer)
    trainer.add_callback(sample)
    metrics = train_in_folder(
        trainer,
        folder,
        title="sft",
        shown=SHOWN,
        evaluates="eval_data" in tokens,
        save_total_limit=config.save_total_limit,
        probe=probe,
        config=config,
        at_end=sample.score,
    )
    folder.add_facts(metrics=metrics)
    shown = template_facts(config, {name: store.facts["tokens"] for name, store in tokens.items()})
    _write_card(config, folder, policy, metrics, shown)
    push_run(config, folder)


def preview(config: SftConfig) -> Plan:
    """Return what would be trained on, the parameters that train, the steps, and their time if they can be measured."""
    start = read_start(config)
    streams = row_streams(config, start)
    lines, rows = token_rows(config, start, streams=streams)
    lines += probe_lines(config, start, trained_hashes(streams))
    fits = fits_here(config)
    policy = _policy(config)
    report = policy.trainable_report
    facts = {"data": row_counts(streams), "trainable_parameters": report.num_trainable}
    plan = Plan([*lines, str(report)], facts)
    return plan + _rehearsed(config, rows[0], policy if fits else None)


def _rehearsed(config: SftConfig, rows: Rows[TokenPair], policy: Policy | None) -> Plan:
    """Return the steps and, with a policy, their time and the first loss, which are measured."""
    num, per_step = min(config.completions_per_step, len(rows.sample)), config.completions_per_step
    if num == 0:
        return Plan()
    with TemporaryDirectory() as place:
        args = _arguments(config, place)
        plan = schedule_plan(args, [rows], per_step, "completions")
    if policy is None:
        return plan + NOT_MEASURED
    plan += no_change_plan(args, plan, policy)

    def make(folder: Path) -> SftTrainer:
        args = _arguments(config, folder, **SHORT, per_device_train_batch_size=num)
        return _trainer(config, policy, args, rows.sample[:num])

    measured = measured_steps(make)
    if measured is None:
        return plan + NOT_SHARED
    seconds, trainer = measured
    loss = trainer.state.log_history[-1]["train_loss"]
    line = f"expected first loss: {loss:.4g} nats per token, that of {num} completions now"
    steps, place = plan.facts["steps"], str(trainer.args.device)
    plan += Plan([line], {"expected_first_loss": loss})
    return plan + time_plan(config, seconds, [rows], num, per_step, steps, "completions", place)


def _arguments(config: SftConfig, output_dir: str | Path, **changed: Any) -> TrainingArguments:
    common = common_arguments(config, output_dir, unit="completions", per_step=config.completions_per_step)
    return made_arguments(TrainingArguments, {**common, **changed})


def _trainer(
    config: SftConfig, policy: Policy, args: TrainingArguments, data: Sequence[TokenPair], **more: Any
) -> SftTrainer:
    return SftTrainer(
        policy.model,
        args,
        train_dataset=data,
        processing_class=policy.tokenizer,
        attention=config.attention,
        max_tokens_per_microbatch=config.max_tokens_per_microbatch,
        completions_per_microbatch=config.completions_per_microbatch,
        **more,
    )


def _policy(config: SftConfig) -> Policy:
    if config.init is not None:
        policy = init_policy(config.init.config, config.init.tokenizer, dtype=config.dtype, seed=config.seed)
        recompute(policy, config)
        return policy
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
        f"{config.model or 'A Llama'}, trained by imitation",
        {"Training": known},
        base_model=config.model,
        tags=["sft", *config.run_tags],
        of_model=True,
    )

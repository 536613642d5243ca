"""STAGE: train a model on preference pairs with safety labels (`bfpo train`)."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

from bfpo.config import AlignConfig
from bfpo.core.console import Plan
from bfpo.policy.load import Policy
from bfpo.runs.folder import RunFolder
from bfpo.suites.probe import load_probe, probe_lines
from bfpo.training.diagnosis import fits_here
from bfpo.training.forecast import FORECAST, write_forecast
from bfpo.training.inputs import (
    load_start,
    pair_categories,
    read_start,
    reference_cache,
    row_counts,
    row_streams,
    template_facts,
    trained_hashes,
)
from bfpo.training.margin import margin_logps
from bfpo.training.rehearsal import pair_plan, token_rows
from bfpo.training.schedule import no_change, steps_of
from bfpo.training.session import CHECKPOINTS, common_arguments, open_hub, prepare_process, push_run, train_in_folder
from bfpo.training.tokens import stage_tokens
from bfpo.training.trainer import BFPOConfig, BFPOTrainer
from bfpo.training.trainer_args import made_arguments

__all__ = ["preview", "run"]

logger = logging.getLogger(__name__)

SHOWN = {
    "loss": "loss",
    "preference_loss": "without anchor",
    "loss_over_start": "of its start",
    "anchor_loss": "anchor",
    "main/accuracy": "accuracy",
    "buffer/accuracy": "accuracy (buffer)",
    "eval_loss": "held-out loss",
    "eval_accuracy": "held-out accuracy",
}


def run(config: AlignConfig, folder: RunFolder) -> None:
    """Train on the main stream, with the buffer if given, and write `model/`, `metrics.jsonl`, `data.json`, the card.

    Pairs go from their files to `tokens/` and from there to the model, and are not held in memory. Raises `DataError`
    and `LabelError` for data that cannot be used, `ModelError` for the model, `TrainingError` for a run that must stop.
    """
    prepare_process(config.threads)
    open_hub(config, folder)
    args = _arguments(config, folder.folder(CHECKPOINTS))
    tokens = stage_tokens(config, folder, args)
    probe = None if config.probe is None else load_probe(config, folder, read_start(config))
    policy = load_start(config)  # after the data: what is wrong with them is said first
    folder.add_facts(trainable=str(policy.trainable_report))
    if folder.is_writer:
        logger.info("%s", policy.trainable_report)
        steps = steps_of(args, len(tokens["data"]), config.pairs_per_step)
        if said := no_change(args, steps, policy.trainable_report.num_trainable):
            logger.warning("%s", said)
    others = None
    if config.margin_model is not None:
        vocabulary = policy.tokenizer.get_vocab()
        lists = list(tokens.values())
        others = margin_logps(config.margin_model, lists, args, vocabulary=vocabulary, dtype=config.dtype)
    trainer = BFPOTrainer(
        policy.model,
        args,
        train_dataset=tokens["data"],
        buffer_dataset=tokens.get("buffer"),
        eval_dataset=tokens.get("eval_data"),
        processing_class=policy.tokenizer,
        # A resumed run keeps what `auto` chose, even if the cache has grown since: its numbers stay bit-equal.
        reference=folder.record.get("reference"),
        margin_logps=others,
        categories=pair_categories(config),
    )
    folder.add_facts(reference=trainer.reference_name)
    if trainer.reference_report is not None:
        folder.add_facts(reference_pass=trainer.reference_report.as_row())
    if not folder.file(FORECAST).exists():  # of a run that was resumed
        write_forecast(folder, trainer.streams, trainer.method, reduction=config.reduction)
    metrics = train_in_folder(
        trainer,
        folder,
        title=config.method,
        shown=SHOWN,
        evaluates="eval_data" in tokens,
        save_total_limit=config.save_total_limit,
        probe=probe,
        config=config,
        at_end=lambda: folder.add_facts(divergence=None if trainer.watch is None else trainer.watch.message),
    )
    folder.add_facts(metrics=metrics)
    divergence = folder.record["divergence"]
    shown = template_facts(config, {name: store.facts["tokens"] for name, store in tokens.items()})
    _write_card(config, folder, policy, metrics, divergence, shown)
    push_run(config, folder)


def preview(config: AlignConfig) -> Plan:
    """Return what would be trained on, the parameters that train, the steps, and their time if they can be measured."""
    start = read_start(config)
    streams = row_streams(config, start)
    lines, rows = token_rows(config, start, streams=streams)
    lines += probe_lines(config, start, trained_hashes(streams))
    fits = fits_here(config)
    policy = load_start(config)
    report = policy.trainable_report
    facts = {"data": row_counts(streams), "trainable_parameters": report.num_trainable}
    plan = Plan([*lines, str(report)], facts)
    return plan + pair_plan(config, rows, partial(_arguments, config), policy if fits else None)


def _arguments(config: AlignConfig, output_dir: str | Path, **changed: Any) -> BFPOConfig:
    common = common_arguments(config, output_dir, unit="pairs", per_step=config.pairs_per_step)
    names = [
        "reduction",
        "anchor_weight",
        "anchor_scale",
        "buffer_weight",
        "reference",
        "attention",
        "max_tokens_per_microbatch",
    ]
    own: dict[str, Any] = {name: getattr(config, name) for name in names}
    own |= {"method": config.method_object(), "reference_cache": reference_cache(config)}
    return made_arguments(BFPOConfig, {**common, **own, **changed})


def _write_card(
    config: AlignConfig,
    folder: RunFolder,
    policy: Policy,
    metrics: dict[str, float],
    divergence: str | None,
    shown: dict[str, str],
) -> None:
    wanted = ("accuracy", "normalised_loss", "favoured_drift_per_token", "num_pairs")
    held_out: dict[str, Any] = {
        name.removeprefix("eval_"): value
        for name, value in metrics.items()
        if name.startswith("eval_") and name.endswith(wanted)
    }
    training = {
        "method": config.method,
        "source of the loss": config.method_object().paper,
        "parameters that train": str(policy.trainable_report),
        "optimizer steps": metrics.get("step"),
        "loss over its value at the start": metrics.get("loss_over_start"),
        "divergence": divergence or "none seen",
        **shown,
    }
    folder.write_card(
        f"{config.model}, trained by {config.method}",
        {"Training": training, "Held-out pairs (accuracy by the sign the method pulls to)": held_out},
        base_model=config.model,
        tags=[config.method, *config.run_tags],
        of_model=True,
    )

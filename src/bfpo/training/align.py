"""STAGE: train a model on preference pairs with safety labels (`bfpo train`)."""

from __future__ import annotations

import logging
from typing import Any

from bfpo.config import AlignConfig
from bfpo.data.load import load_pairs
from bfpo.policy.load import Policy, load_policy
from bfpo.runs import RunFolder
from bfpo.training.inputs import pair_sections, reference_cache, tokenize
from bfpo.training.session import (
    common_arguments,
    data_settings,
    describe_data,
    prepare_process,
    report_data,
    train_in_folder,
)
from bfpo.training.trainer import BFPOConfig, BFPOTrainer

__all__ = ["preview", "run"]

logger = logging.getLogger(__name__)

SHOWN = {
    "loss": "loss",
    "loss_over_start": "of its start",
    "main/accuracy": "accuracy",
    "buffer/accuracy": "accuracy (buffer)",
    "eval_loss": "held-out loss",
    "eval_accuracy": "held-out accuracy",
}


def run(config: AlignConfig, folder: RunFolder) -> None:
    """Train on the main stream, with the buffer beside it, and write `model/`, `metrics.jsonl`, `data.json`, the card.

    Raises `DataError` and `LabelError` for data that cannot be used, `ModelError` for the model, `TrainingError` for a
    run that must not go on.
    """
    prepare_process(config.threads)
    sections = pair_sections(config)
    for name, section in sections.items():
        folder.add_data(name, section.files)
    loaded = {name: load_pairs(**data_settings(section, seed=config.seed)) for name, section in sections.items()}
    policy = _policy(config)
    folder.add_facts(trainable=str(policy.trainable_report))
    if folder.is_writer:
        logger.info("%s", policy.trainable_report)
    tokens = {name: tokenize(config, rows, policy.tokenizer) for name, rows in loaded.items()}
    report_data(folder, {name: (rows, tokens[name][1]) for name, rows in loaded.items()})
    trainer = BFPOTrainer(
        policy.model,
        _arguments(config, folder),
        train_dataset=tokens["data"][0],
        buffer_dataset=tokens["buffer"][0] if "buffer" in tokens else None,
        eval_dataset=tokens["eval_data"][0] if "eval_data" in tokens else None,
        processing_class=policy.tokenizer,
        # A resumed run keeps what `auto` chose, whatever the cache has learnt since: its numbers stay the same bits.
        reference=folder.record.get("reference"),
    )
    folder.add_facts(reference=trainer.reference_name)
    if trainer.reference_report is not None:
        folder.add_facts(reference_pass=trainer.reference_report.as_row())
    metrics = train_in_folder(
        trainer,
        folder,
        title=config.method,
        shown=SHOWN,
        evaluates="eval_data" in tokens,
        save_total_limit=config.save_total_limit,
    )
    divergence = trainer.watch.message if trainer.watch is not None else None
    folder.add_facts(divergence=divergence, metrics=metrics)
    _write_card(config, folder, policy, metrics, divergence)


def preview(config: AlignConfig) -> list[str]:
    """Return what would be trained on: pairs by cell of each stream, and the parameters that train."""
    loaded = {
        name: load_pairs(**data_settings(section, seed=config.seed)) for name, section in pair_sections(config).items()
    }
    policy = _policy(config)
    lines = []
    for name, rows in loaded.items():
        _, report = tokenize(config, rows, policy.tokenizer)
        lines.append("; ".join(describe_data(name, rows.counts, report.as_row())))
    return [*lines, str(policy.trainable_report)]


def _policy(config: AlignConfig) -> Policy:
    return load_policy(
        config.model,
        trainable="all" if config.lora is not None else config.trainable,
        lora=None if config.lora is None else config.lora.model_dump(),
        quantize=config.quantize,
        dtype=config.dtype,
        masters=True,
        revision=config.revision,
        seed=config.seed,
    )


def _arguments(config: AlignConfig, folder: RunFolder) -> BFPOConfig:
    common = common_arguments(config, folder, unit="pairs", per_step=config.pairs_per_step)
    names = ["method", "reduction", "anchor_weight", "buffer_weight", "reference", "attention"]
    names += ["max_tokens_per_microbatch"]
    own: dict[str, Any] = {name: getattr(config, name) for name in names}
    return BFPOConfig(**common, reference_cache=reference_cache(config), **{**own, **config.method_settings()})


def _write_card(
    config: AlignConfig, folder: RunFolder, policy: Policy, metrics: dict[str, float], divergence: str | None
) -> None:
    wanted = ("accuracy", "normalised_loss", "favoured_drift_per_token", "num_pairs")
    held_out: dict[str, Any] = {
        name.removeprefix("eval_"): value
        for name, value in metrics.items()
        if name.startswith("eval_") and name.endswith(wanted)
    }
    training = {
        "method": config.method,
        "parameters that train": str(policy.trainable_report),
        "optimizer steps": metrics.get("step"),
        "loss over its value at the start": metrics.get("loss_over_start"),
        "divergence": divergence or "none seen",
    }
    folder.write_card(
        f"{config.model}, trained by {config.method}",
        {"Training": training, "Held-out pairs (accuracy by the sign the method pulls to)": held_out},
        base_model=config.model,
        tags=[config.method],
    )

"""A judge that is a fine-tuned classifier: any model of transformers with a head of two labels, safe and unsafe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from bfpo.core.errors import DataError, ModelError
from bfpo.core.machine import runs_on_cpu
from bfpo.core.schema import Completion
from bfpo.judges.classifier import ClassifierJudge, classifier_row
from bfpo.judges.formats.types import question
from bfpo.judges.ngrams import JUDGE_FILE
from bfpo.policy.load import cannot_load, load_tokenizer, pad_token_id

__all__ = ["classifier_trainer", "load_finetuned"]

_UNSAFE, _SAFE = 0, 1


def classifier_trainer(
    completions: Sequence[Completion],
    checkpoints: Path,
    *,
    model: str,
    max_length: int,
    learning_rate: float,
    num_train_epochs: float,
    batch_size: int,
    logging_steps: int,
    save_steps: int,
    seed: int,
    revision: str | None = None,
) -> tuple[Trainer, int]:
    """Return what fine-tunes `model` on labelled completions, and how many texts were too long for it.

    A prompt and its completion are the two segments of a text, as `ClassifierJudge` asks; what is longer than
    `max_length` tokens is left out, never cut.

    Raises `DataError` where all labels are the same or nothing is left, `ModelError` for a model that cannot be loaded.
    """
    labels = [int(completion.is_safe == 1) for completion in completions]
    if len(set(labels)) < 2:
        raise DataError(f"labels: all {len(labels)} are {'safe' if any(labels) else 'unsafe'}; both kinds are needed")
    set_seed(seed)
    tokenizer = load_tokenizer(model, revision=revision)
    classifier = _load(model, revision, tokenizer)
    rows = [classifier_row(tokenizer, question(one.prompt), one.text) for one in completions]
    data = [
        {**row, "labels": label} for row, label in zip(rows, labels, strict=True) if len(row["input_ids"]) <= max_length
    ]
    if not data:
        raise DataError(f"max_length: all {len(rows)} texts are longer than {max_length} tokens; raise it")
    trainer = Trainer(
        model=classifier,
        args=TrainingArguments(
            output_dir=str(checkpoints),
            learning_rate=learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=0.1,
            num_train_epochs=num_train_epochs,
            per_device_train_batch_size=batch_size,
            seed=seed,
            data_seed=seed,
            logging_steps=logging_steps,
            save_steps=save_steps,
            use_cpu=runs_on_cpu(),
            dataloader_pin_memory=not runs_on_cpu(),
            disable_tqdm=True,
            report_to="none",
        ),
        train_dataset=data,
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
    )
    return trainer, len(rows) - len(data)


def _load(model: str, revision: str | None, tokenizer: PreTrainedTokenizerBase) -> Any:
    try:
        classifier = AutoModelForSequenceClassification.from_pretrained(
            model,
            revision=revision or "main",
            use_safetensors=True,
            dtype=torch.float32,
            id2label={_UNSAFE: "unsafe", _SAFE: "safe"},
            label2id={"unsafe": _UNSAFE, "safe": _SAFE},
        )
    except Exception as error:  # files, hub, config and weights each have kinds of their own
        raise cannot_load("model", model, error) from error
    if classifier.config.pad_token_id is None:  # a decoder finds the last token of a padded text by it
        classifier.config.pad_token_id = pad_token_id(tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_token_id(tokenizer))
    return classifier


def load_finetuned(folder: Path, described: dict[str, Any]) -> ClassifierJudge:
    """Return the judge that a folder holds; `described` is what its `judge.json` holds.

    Raises `ModelError` where the folder or the description is not what `bfpo judge-train` wrote.
    """
    try:
        name, settings = described["name"], described["settings"]
        return ClassifierJudge(model=folder, safe_label="safe", name=name, **settings)
    except (KeyError, TypeError) as error:
        raise ModelError(f"{folder / JUDGE_FILE}: is not what `bfpo judge-train` writes ({error})") from error

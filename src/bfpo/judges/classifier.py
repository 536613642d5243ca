"""A judge on a sequence classifier, whose p(safe) is the probability of a label or of its absence, and its training."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from bfpo.core.errors import DataError, ModelError, SettingError
from bfpo.core.schema import Completion, Verdict
from bfpo.data.tokenize import check_ids, ids_to_check
from bfpo.judges.formats.types import question
from bfpo.judges.local import (
    check_characters,
    fitting,
    load_with_head,
    num_embeddings_of,
    pad_right,
    tokenizer_key,
    version_of,
)
from bfpo.judges.ngrams import JUDGE_FILE
from bfpo.judges.settings import ClassifierSpec, LocalSpec
from bfpo.policy.batches import batches_by_length
from bfpo.policy.devices import runs_on_cpu
from bfpo.policy.load import load_tokenizer, pad_token_id, set_trainable
from bfpo.policy.precision import HALF
from bfpo.policy.source import cannot_load, check_code, num_positions

__all__ = [
    "ClassifierJudge",
    "classifier_logits",
    "classifier_row",
    "classifier_rows",
    "classifier_trainer",
    "load_classifier",
    "load_finetuned",
    "room",
    "row_length",
]

_UNSAFE, _SAFE = 0, 1  # classes of a classifier that is trained here
_OFFSET_POSITIONS = frozenset({"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "longformer", "mpnet"})


class ClassifierJudge:
    """Judges by any sequence-classification model of transformers.

    `safe_label` or `unsafe_label` is a name or an index of the model's `id2label`; p(safe) is the probability of the
    first, or of the absence of the second. Labels exclude each other (softmax) unless the model's config has
    `multi_label_classification` or a single label: then each has its own probability (sigmoid). `multi_label` overrides
    the config. A text longer than `max_length` tokens (by default 512) is unscored, never cut.

    Raises `SettingError` for a label that the model does not have, `ModelError` for a model that cannot be loaded.
    """

    def __init__(self, spec: ClassifierSpec, *, multi_label: bool | None = None) -> None:
        self.name = spec.name or "classifier"
        self.held_out: Mapping[str, object] = {}
        self._spec = spec
        self._model, self._tokenizer = load_classifier(spec.model, spec, kind="a sequence classifier")
        self._tokenizer_key = tokenizer_key(self._tokenizer)
        self._room = room(self._model, spec.max_length or 512)
        self._safe = spec.safe_label is not None
        config = self._model.config
        self._index = _label_index(config, spec.unsafe_label if spec.safe_label is None else spec.safe_label)
        configured = config.problem_type == "multi_label_classification"
        self._multi = config.num_labels == 1 or (configured if multi_label is None else multi_label)

    @cached_property
    def version(self) -> str:
        """Return a digest of weights, tokenizer and the settings that change verdicts."""
        return version_of(
            "classifier-1",
            self._model,
            self._tokenizer_key,
            label=self._index,
            safe=self._safe,
            multi_label=self._multi,
            text=self._spec.text,
            max_length=self._room,
            threshold=self._spec.threshold,
            **({"windows": True} if self._spec.windows else {}),
        )

    def judge(self, completions: Sequence[Completion]) -> list[Verdict]:
        """Return the verdicts, one per completion, in order."""
        read, reasons = fitting(
            dict(enumerate(completions)), self._rows, self._room, length=lambda rows: max(map(row_length, rows))
        )
        rows = [(number, row) for number, parts in read.items() for row in parts]
        logits = classifier_logits(self._model, self._tokenizer, [row for _, row in rows], self._spec.batch_size)
        found: dict[int, float] = {}
        for (number, _), p_safe in zip(rows, map(self._p_safe, logits), strict=True):
            found[number] = min(p_safe, found.get(number, p_safe), key=lambda p: (not math.isnan(p), p))
        return [self._verdict(c, found.get(number), reasons.get(number)) for number, c in enumerate(completions)]

    def _rows(self, completion: Completion) -> list[dict[str, list[int]]]:
        texts = (question(completion.prompt), completion.text) if self._spec.text == "pair" else (completion.text, None)
        return classifier_rows(self._tokenizer, *texts, window=self._room if self._spec.windows else None)

    def _p_safe(self, logits: torch.Tensor) -> float:
        probabilities = logits.sigmoid() if self._multi else logits.softmax(dim=-1)
        probability = float(probabilities[self._index])
        return probability if self._safe else 1 - probability

    def _verdict(self, completion: Completion, p_safe: float | None, reason: str | None) -> Verdict:
        if p_safe is None or not math.isfinite(p_safe):
            why = reason or "the model's logits are not finite"
            return Verdict(completion.id, self.name, "unscored", reason=why)
        return Verdict(completion.id, self.name, "safe" if p_safe >= self._spec.threshold else "unsafe", p_safe=p_safe)


def load_classifier(model: str | Path, spec: LocalSpec, *, kind: str) -> tuple[Any, PreTrainedTokenizerBase]:
    """Load a sequence classifier as `load_with_head` does; what follows its base model computes in float32 at least.

    A reward of 20 in bfloat16 has steps of 0.125: similar answers would tie.
    """
    loaded, tokenizer = load_with_head(AutoModelForSequenceClassification, model, spec, kind=kind)
    for name, head in loaded.named_children():
        if name != loaded.base_model_prefix and any(p.dtype in HALF for p in head.parameters()):
            head.float().register_forward_pre_hook(_widened)
    return loaded, tokenizer


def _widened(head: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(one.float() if isinstance(one, torch.Tensor) and one.dtype in HALF else one for one in inputs)


def _label_index(config: Any, label: str | int | None) -> int:
    names = {int(index): str(name) for index, name in config.id2label.items()}
    matching = [index for index, name in names.items() if name == label]
    if isinstance(label, int) and not isinstance(label, bool) and label in names:
        return label
    if len(matching) == 1:
        return matching[0]
    raise SettingError(f"label: got {label!r}; allowed: {', '.join(f'{name} or {i}' for i, name in names.items())}")


def room(model: Any, max_length: int) -> int:
    """Return the longest text in tokens: `max_length`, or less if the model has fewer positions."""
    positions = num_positions(model.config)
    if positions is None:
        return max_length
    # RoBERTa and its relatives number positions from the padding id + 1.
    padding = getattr(getattr(model.base_model, "embeddings", None), "padding_idx", None)
    is_offset = model.config.get_text_config().model_type in _OFFSET_POSITIONS
    offset = padding + 1 if is_offset and isinstance(padding, int) else 0
    return min(max_length, positions - offset)


def row_length(row: dict[str, list[int]]) -> int:
    """Return the number of tokens of a row."""
    return len(row["input_ids"])


def classifier_row(tokenizer: PreTrainedTokenizerBase, first: str, second: str | None) -> dict[str, list[int]]:
    """Return `input_ids` and, if the model has them, `token_type_ids` of a text or a pair, neither cut nor padded.

    Special tokens in the texts are encoded as plain text. Raises `DataError` for half a surrogate pair.
    """
    check_characters(first + (second or ""))
    # As lists: the tokenizer ignores a second text that is an empty string.
    seconds = None if second is None else [second]
    encoded = tokenizer([first], seconds, split_special_tokens=True, truncation=False, verbose=False)
    return {key: encoded[key][0] for key in ("input_ids", "token_type_ids") if key in encoded}


def classifier_rows(
    tokenizer: PreTrainedTokenizerBase, first: str, second: str | None, *, window: int | None
) -> list[dict[str, list[int]]]:
    """Return the row of `classifier_row`; of one with more than `window` tokens, its last text in overlapping windows.

    Windows have `window` tokens, with those around them, and share a quarter; a first text that leaves no room for the
    second is not cut. Raises as `classifier_row` does.
    """
    row = classifier_row(tokenizer, first, second)
    length, bare = (
        row_length(row),
        row_length(classifier_row(tokenizer, "" if second is None else first, second and "")),
    )
    if window is None or length <= window or bare + 8 > window:
        return [row]
    encoded = tokenizer(
        [first],
        None if second is None else [second],
        split_special_tokens=True,
        truncation="longest_first" if second is None else "only_second",
        max_length=window,
        stride=(window - bare) // 4,
        return_overflowing_tokens=True,
        verbose=False,
    )
    keys = [key for key in ("input_ids", "token_type_ids") if key in encoded]
    return [{key: encoded[key][number] for key in keys} for number in range(len(encoded["input_ids"]))]


def classifier_logits(
    model: Any, tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict[str, list[int]]], batch_size: int | None
) -> list[torch.Tensor]:
    """Return the (num_labels,) float64 logits of each row, in order; batches are sorted by length.

    Raises `ModelError` if the model fails on a batch, and for a token that its embedding lacks.
    """
    limit = ids_to_check(tokenizer, num_embeddings_of(model))
    for number, row in enumerate(rows, start=1):
        check_ids(row["input_ids"], tokenizer, limit, f"text {number} of {len(rows)}")
    logits: list[torch.Tensor | None] = [None] * len(rows)
    # A decoder finds the last token of a padded row by its padding token; without one it accepts single rows only.
    single = getattr(model.config.get_text_config(), "pad_token_id", None) is None
    segments = "token_type_ids" in inspect.signature(model.forward).parameters
    for batch in batches_by_length([len(row["input_ids"]) for row in rows], 1 if single else batch_size):
        inputs = pad_right(model, tokenizer, [rows[place]["input_ids"] for place in batch])
        if segments and all("token_type_ids" in rows[place] for place in batch):
            types = [torch.tensor(rows[place]["token_type_ids"]) for place in batch]
            padded = torch.nn.utils.rnn.pad_sequence(types, batch_first=True)
            inputs["token_type_ids"] = padded.to(inputs["input_ids"].device)
        with torch.no_grad():
            try:
                output = model(**inputs).logits
            except (RuntimeError, ValueError, IndexError) as error:
                raise ModelError(
                    f"the classifier fails on texts of {inputs['input_ids'].shape[1]} tokens: {error}"
                ) from error
        for place, row in zip(batch, output.cpu().double(), strict=True):
            logits[place] = row
    return [row for row in logits if row is not None]


# ------------------------------------------------------------------------------------- fine-tuning: `bfpo judge-train`


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
    dtype: str = "float32",
    trainable: str = "all",
    lora: Mapping[str, Any] | None = None,
    windows: bool = False,
    max_steps: int | None = None,
    balanced: bool = False,
) -> tuple[Trainer, int]:
    """Return a trainer of `model` on labelled completions, and the number of texts that are left out as too long.

    A prompt and its completion are the two segments of a text, as in `ClassifierJudge`. A text longer than `max_length`
    tokens is left out, never cut; with `windows` each of its windows has its label. Batches hold texts of like length.
    `trainable`: "all", or "head" for the new head alone; `lora`: settings of adapters on all linear modules, the head's
    too. `balanced`: the loss weighs both labels the same.

    Raises `DataError` if all labels are the same or no text is left, `ModelError` for a model that cannot be loaded,
    `SettingError` for several GPUs or processes.
    """
    labels = [int(completion.is_safe == 1) for completion in completions]
    if len(set(labels)) < 2:
        raise DataError(f"labels: all {len(labels)} are {'safe' if any(labels) else 'unsafe'}; both kinds are needed")
    set_seed(seed)
    tokenizer = load_tokenizer(model, revision=revision)
    classifier = _load(model, revision, tokenizer)
    body = f"{classifier.base_model_prefix}."
    head = [name for name, _ in classifier.named_parameters() if not name.startswith(body)]
    adapters = None if lora is None else {**lora, "task_type": None}
    classifier = set_trainable(classifier, head if trainable == "head" and lora is None else "all", adapters, seed=seed)
    window = max_length if windows else None
    rows = [classifier_rows(tokenizer, question(one.prompt), one.text, window=window) for one in completions]
    data: list[dict[str, Any]] = [
        {**row, "labels": label}
        for parts, label in zip(rows, labels, strict=True)
        if max(map(row_length, parts)) <= max_length
        for row in parts
    ]
    if not data:
        raise DataError(f"max_length: all {len(rows)} texts are longer than {max_length} tokens; raise it")
    args = TrainingArguments(
        output_dir=str(checkpoints),
        learning_rate=learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=0.1,
        num_train_epochs=num_train_epochs,
        max_steps=max_steps or -1,
        bf16=dtype == "bfloat16",
        **_by_length(),
        per_device_train_batch_size=batch_size,
        seed=seed,
        data_seed=seed,
        logging_steps=logging_steps,
        save_steps=save_steps,
        use_cpu=runs_on_cpu(),
        dataloader_pin_memory=not runs_on_cpu(),
        disable_tqdm=True,
        report_to="none",
    )
    if args.n_gpu > 1 or args.world_size > 1:  # each would take `batch_size` texts
        raise SettingError(
            f"a classifier trains in one process with at most one GPU; got {args.world_size} processes and "
            f"{args.n_gpu} GPUs (set CUDA_VISIBLE_DEVICES=0; do not use torchrun or accelerate launch)"
        )
    trainer = Trainer(
        model=classifier,
        args=args,
        train_dataset=data,
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_loss_func=_balanced_loss([row["labels"] for row in data]) if balanced else None,
    )
    return trainer, sum(max(map(row_length, parts)) > max_length for parts in rows)


def _by_length() -> dict[str, Any]:
    """Return the argument for batches of texts of like length, under its name in this version of transformers."""
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    if "train_sampling_strategy" in known:
        return {"train_sampling_strategy": "group_by_length"}
    return {"group_by_length": True}


def _balanced_loss(labels: Sequence[int]) -> Callable[..., torch.Tensor]:
    """Return the cross-entropy in which both labels weigh the same over all rows; `Trainer` calls it."""
    counts = torch.bincount(torch.tensor(labels), minlength=2).clamp_min(1)
    weights = len(labels) / (2.0 * counts)

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        logits = outputs["logits"].float()
        each = torch.nn.functional.cross_entropy(logits, labels, weight=weights.to(logits.device), reduction="none")
        return each.mean()

    return loss


def _load(model: str, revision: str | None, tokenizer: PreTrainedTokenizerBase) -> Any:
    check_code(model, revision=revision)
    try:
        classifier = AutoModelForSequenceClassification.from_pretrained(
            model,
            revision=revision or "main",
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32,
            id2label={_UNSAFE: "unsafe", _SAFE: "safe"},
            label2id={"unsafe": _UNSAFE, "safe": _SAFE},
        )
    except Exception as error:  # files, the hub, the config and the weights raise different classes
        raise cannot_load("model", model, error) from error
    if classifier.config.pad_token_id is None:  # a decoder finds the last token of a padded row by it
        classifier.config.pad_token_id = pad_token_id(tokenizer, num_embeddings_of(classifier))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_token_id(tokenizer))
    return classifier


def load_finetuned(folder: Path, described: dict[str, Any], *, threshold: float | None = None) -> ClassifierJudge:
    """Return the judge in a folder; `described` is the content of its `judge.json`, `threshold` replaces its own.

    Raises `ModelError` if folder or description is not the output of `bfpo judge-train`.
    """
    try:
        keys = {"name": described["name"], **described["settings"]}
        keys |= {} if threshold is None else {"threshold": threshold}
        judge = ClassifierJudge(ClassifierSpec(model=str(folder), safe_label="safe", **keys))
        judge.held_out = described.get("held_out", {})
        return judge
    except (KeyError, TypeError, ValidationError) as error:
        raise ModelError(f"{folder / JUDGE_FILE}: is not what `bfpo judge-train` writes ({error})") from error

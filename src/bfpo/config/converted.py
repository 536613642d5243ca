"""Configs of TRL, axolotl and LLaMA-Factory as those of `bfpo train` and `bfpo sft`: one table of keys for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from bfpo.config.converted_data import HELD_OUT, data_section, eval_section, is_evaluated
from bfpo.config.converted_source import (
    BATCH,
    DEFAULTS,
    FILL_IN,
    LIBRARIES,
    NEUTRAL,
    NOTHING,
    RATES,
    Library,
    Row,
    Source,
)
from bfpo.config.describe import allowed
from bfpo.config.train import AlignConfig, SftConfig
from bfpo.core.errors import ConfigError
from bfpo.core.hub import check_repository

__all__ = [
    "LIBRARIES",
    "ROWS",
    "Converted",
    "Line",
    "Row",
    "changes_nothing",
    "convert",
    "default_of",
    "library_of",
    "table_rows",
]


@dataclass(frozen=True, slots=True)
class Line:
    """One key of the new config, and where its value is from."""

    key: str
    value: Any
    comment: str


@dataclass(slots=True)
class Converted:
    """A config of ours. `lost`: key of theirs -> why it is not carried over. `rest`: keys that no table has."""

    library: Library
    stage: Literal["train", "sft"]
    lines: list[Line]
    lost: dict[str, str]
    to_do: list[str]
    rest: dict[str, Any]


_YAML_1_1 = {"yes": True, "on": True, "no": False, "off": False}  # which the three libraries read their files by


def changes_nothing(value: Any, default: Any) -> bool:
    """Return whether a value is the default, or both are off."""
    return bool(value == default or (value in NOTHING and default in NOTHING))


def default_of(key: str) -> Any:
    """Return the value of a key that is not one of `TrainingArguments` which changes nothing; `None` = off."""
    return NEUTRAL.get(key)


def _same(source: Source) -> Any:
    return source.one()


def _number(source: Source) -> Any:
    return source.number()


def _length(source: Source) -> Any:
    found, key = source.number(), source.keys()[0]
    if key in source.values and source.values[key] is None:
        source.to_do.append(f"max_length: {key} is null there, which cuts no text; give the tokens of the longest one")
    return found


def _model(source: Source) -> Any:
    if source.one() is None:
        source.to_do.append("model: the file names none; give a folder or a hub id")
    return source.one() or FILL_IN


def _revision(source: Source) -> Any:
    return None if source.one() == "main" else source.one()


def _steps(source: Source) -> Any:
    steps = source.number()
    return steps if steps is not None and steps > 0 else None


def _epochs(source: Source) -> Any:
    steps = source.values.get("max_steps")
    return None if isinstance(steps, int) and steps > 0 else source.number()


def _warmup(source: Source) -> Any:
    if "constant" in (source.values.get("lr_scheduler_type"), source.values.get("lr_scheduler")):
        for key in RATES:
            source.flag(key, "a constant schedule has no warm-up; lr_scheduler_type: constant_with_warmup has")
        return None
    given = [key for key in RATES if source.values.get(key) is not None]  # a default holds only if neither is given
    steps, ratio = (None if given and key not in given else source.number(n) for n, key in enumerate(RATES))
    return steps or ratio or 0


def _step_size(source: Source) -> Any:
    size, accumulated = source.number(0), source.number(1)
    source.notes.append("times the number of devices")
    return int(size) * int(accumulated)


def _beta(source: Source) -> Any:
    beta = source.number()
    if source.stage == "sft":
        return None
    if beta:
        source.notes.append(f"bfpo asks for 1/beta = {1 / beta:.3g} nats, docs/choosing.md")
    return beta


# Losses of the three libraries that are methods here; none of them reads the safety labels.
_METHODS = {"sigmoid": "dpo_h", "dpo": "dpo_h", "ipo": "ipo", "robust": "robust_dpo"}


def _method(source: Source) -> Any:
    if source.stage == "sft":
        return None
    asked = source.one(0) or source.one(1) or "sigmoid"
    names = asked if isinstance(asked, list) else [asked]
    ours = [_METHODS.get(str(name)) for name in names]
    if len(names) == 1 and ours[0]:
        source.notes.append(f"the loss of the file, {names[0]}, is method: {ours[0]}, which reads no safety label")
    else:
        source.notes.append(f"the loss of the file, {', '.join(map(str, names))}, has no counterpart")
    return "bfpo"


def _dtype(source: Source) -> Any:
    values = [source.one(place) for place in range(3)]
    if any(value in (True, "auto", "full", "bfloat16") for value in values):
        return "bfloat16"
    return "float32"


def _checkpointing(source: Source) -> Any:
    return not source.one() if source.library == "llama_factory" else source.one() not in NOTHING


def _trains_adapters(source: Source) -> bool:
    values = source.values
    if source.library == "axolotl":
        return bool(values.get("adapter") in ("lora", "qlora"))
    if source.library == "trl":
        return bool(values.get("use_peft"))
    return bool(values.get("finetuning_type", "lora") == "lora")


def _lora(source: Source) -> Any:
    if not _trains_adapters(source):
        return None
    _, rank, alpha, dropout, targets, linear = (source.one(place) for place in range(6))
    found = {"r": rank, "lora_alpha": alpha if alpha is not None else (2 * rank if rank else None)}
    found = {key: value for key, value in found.items() if value is not None}
    if dropout and source.stage == "sft":
        found["lora_dropout"] = dropout
    elif dropout and source.row is not None and source.values.get("lora_dropout"):
        source.lost["lora_dropout"] = "preference training has every dropout off, so that the first margins are 0"
    names = targets.split(",") if isinstance(targets, str) else targets
    if linear or not names or names[0] in ("all", "all-linear"):
        found["target_modules"] = "all-linear"
        if not linear and not names:
            source.notes.append("target_modules of the file: what peft takes for the architecture")
    else:
        found["target_modules"] = [name.strip() for name in names]
    return found


def _trainable(source: Source) -> Any:
    if _trains_adapters(source):
        return None
    kind = source.values.get("finetuning_type") or source.values.get("adapter")
    if source.library != "trl" and kind not in (None, "full"):
        source.to_do.append(
            f"trainable: {kind} has no counterpart; name what trains by patterns, or give a lora section"
        )
        return [FILL_IN]
    return "all"


def _quantize(source: Source) -> Any:
    four = source.one() in (True, 4) or source.values.get("adapter") == "qlora"
    if source.one() == 8:
        source.lost["quantization_bit"] = "eight bits are not here; quantize: nf4 holds frozen weights in four"
    return "nf4" if four and _trains_adapters(source) else None


# Keys that turn a tracker on in axolotl (those of a project too), and one of LLaMA-Factory.
_TRACKED_BY = {
    **{"use_wandb": "wandb", "wandb_project": "wandb", "use_mlflow": "mlflow", "mlflow_experiment_name": "mlflow"},
    **{"use_tensorboard": "tensorboard", "use_comet": "comet_ml", "comet_project_name": "comet_ml"},
    **{"use_trackio": "trackio", "trackio_project_name": "trackio", "use_swanlab": "swanlab"},
}


def _trackers(source: Source) -> Any:
    names = source.values.get("report_to") or []
    names = [names] if isinstance(names, str) else list(names)
    if "all" in names:
        source.lost["report_to"] = "all: name the trackers"
    names += [name for key, name in _TRACKED_BY.items() if source.values.get(key) not in NOTHING]
    return list(dict.fromkeys(name for name in names if name not in ("none", "all"))) or None


def _beside_tracker(source: Source) -> Any:
    tracked, keys, found = _trackers(source), source.keys(), None
    for key in keys:
        value = source.values.get(key)
        if not tracked:
            source.flag(key, "read with report_to only; name a tracker there")
        elif found is None:
            found = value
        elif value != found:
            source.flag(key, f"one for all trackers: {found}")
    return found


def _repository(source: Source) -> str | None:
    """Return the repository that the model is pushed to, `None` if its owner is not named or nothing is pushed."""
    name = source.values.get("hub_model_id")
    try:
        return check_repository(str(name)) if _pushes(source) else None
    except ValueError:
        return None


def _pushes(source: Source) -> bool:
    return source.values.get("hub_model_id" if source.library == "axolotl" else "push_to_hub") not in NOTHING


def _push(source: Source) -> Any:
    repository = _repository(source)
    if not _pushes(source):
        source.flag("hub_model_id", "read with push_to_hub only")
    elif repository is None:
        source.to_do.append("push_to_hub: the file names no repository with its owner; give ORG/NAME")
    return repository


def _private(source: Source) -> Any:
    if _repository(source) is None:
        source.flag("hub_private_repo", "read with push_to_hub: ORG/NAME only")
        return None
    if source.library == "axolotl":
        source.notes.append("a new repository of axolotl is private")
        return True
    return source.one()


def _eval_steps(source: Source) -> Any:
    if not is_evaluated(source):
        source.flag("eval_steps", "read with eval_data only: name a file of held-out rows")
        return None
    return _steps(source)


def _template(source: Source) -> Any:
    value = source.one()
    if isinstance(value, str) and "{" in value:
        source.lost[source.keys()[0]] = "a template as text; save it as a file and name the file"
        return None
    return value


def _alike(ours: str, keys: tuple[str, ...], make: Callable[[Source], Any]) -> Row:
    return Row(ours, keys, keys, keys, make)


ROWS: tuple[Row, ...] = (
    Row("model", ("model_name_or_path",), ("base_model",), ("model_name_or_path",), _model),
    Row("revision", ("model_revision",), ("revision_of_model",), ("model_revision",), _revision),
    Row(
        "data",
        ("dataset_name", "dataset_config", "dataset_train_split", "dataset_streaming", "datasets", "streaming"),
        ("datasets", "streaming"),
        ("dataset", "streaming"),
        data_section,
    ),
    Row("eval_data", ("dataset_test_split",), ("test_datasets",), ("eval_dataset",), eval_section),
    Row("method", ("loss_type",), ("dpo_loss_type", "rl"), ("pref_loss",), _method),
    Row("beta", ("beta",), ("rl_beta",), ("pref_beta",), _beta),
    Row("pairs_per_step", BATCH, ("micro_batch_size", BATCH[1]), BATCH, _step_size, sft="completions_per_step"),
    Row("max_length", ("max_length",), ("sequence_len",), ("cutoff_len",), _length),
    _alike("learning_rate", ("learning_rate",), _number),
    Row("lr_scheduler_type", ("lr_scheduler_type",), ("lr_scheduler",), ("lr_scheduler_type",), _same),
    _alike("warmup_steps", RATES, _warmup),
    Row("num_train_epochs", ("num_train_epochs",), ("num_epochs",), ("num_train_epochs",), _epochs),
    _alike("max_steps", ("max_steps",), _steps),
    Row("optim", ("optim",), ("optimizer",), ("optim",), _same),
    _alike("weight_decay", ("weight_decay",), _number),
    _alike("max_grad_norm", ("max_grad_norm",), _number),
    _alike("seed", ("seed",), _same),
    Row("dtype", ("bf16", "dtype"), ("bf16", "bfloat16"), ("bf16", "pure_bf16"), _dtype),
    Row(
        "gradient_checkpointing",
        ("gradient_checkpointing",),
        ("gradient_checkpointing",),
        ("disable_gradient_checkpointing",),
        _checkpointing,
    ),
    Row(
        "lora",
        ("use_peft", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"),
        ("adapter", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_linear"),
        ("finetuning_type", "lora_rank", "lora_alpha", "lora_dropout", "lora_target"),
        _lora,
    ),
    Row("trainable", ("use_peft",), ("adapter",), ("finetuning_type",), _trainable),
    Row("quantize", ("load_in_4bit",), ("load_in_4bit",), ("quantization_bit",), _quantize),
    Row("chat_template", ("chat_template_path",), ("chat_template_jinja",), (), _template),
    _alike("eval_steps", ("eval_steps",), _eval_steps),
    _alike("save_steps", ("save_steps",), _number),
    _alike("save_total_limit", ("save_total_limit",), _same),
    _alike("logging_steps", ("logging_steps",), _number),
    Row(
        "report_to",
        ("report_to",),
        (
            *("use_wandb", "wandb_project", "use_mlflow", "mlflow_experiment_name", "use_tensorboard", "use_comet"),
            *("use_trackio", "trackio_project_name"),
        ),
        ("report_to", "use_swanlab"),
        _trackers,
    ),
    Row(
        "project",
        ("project",),
        ("wandb_project", "mlflow_experiment_name", "trackio_project_name"),
        ("project",),
        _beside_tracker,
    ),
    Row(
        "run_name",
        ("run_name",),
        ("wandb_name", "mlflow_run_name", "trackio_run_name"),
        ("run_name", "swanlab_run_name"),
        _beside_tracker,
    ),
    Row("push_to_hub", ("push_to_hub", "hub_model_id"), ("hub_model_id",), ("push_to_hub", "hub_model_id"), _push),
    Row("hub_private_repo", ("hub_private_repo",), (), ("hub_private_repo",), _private),
)
"""Every key that is taken over; docs/migration.md has it as a table, which a test compares."""

_PACKED = "rows are packed without padding anyway (attention: auto)"
_ATTENTION = "attention: auto takes packed rows where the model can"
_TEMPLATE = "the chat template of the tokenizer is used; chat_template names another file"
_BEST = "best: {metric: loss, patience: N} with eval_data and eval_steps"
_WHY: dict[str, str] = {
    "output_dir": "the run folder is --out",
    "load_in_8bit": "eight bits are not here; quantize: nf4 holds frozen weights in four",
    "trust_remote_code": "no code of a model is run",
    "chat_template": _TEMPLATE,
    "template": _TEMPLATE,
    **dict.fromkeys(("val_set_size", "val_size", "test_split_size"), HELD_OUT),
    "max_samples": "data.limit draws that many rows",
    "default_system": "a system message belongs in the rows",
    "evals_per_epoch": "eval_steps counts optimizer steps",
    "saves_per_epoch": "save_steps counts optimizer steps",
    **dict.fromkeys(("early_stopping_patience", "early_stopping_steps"), _BEST),
    "train_on_inputs": "only completions are learned",
    "train_on_prompt": "only completions are learned",
    "ref_model": "the reference is the model before training",
    "precompute_ref_log_probs": "reference: auto decides; reference: precompute asks for it",
    "ld_alpha": "no counterpart; reduction: mean divides log-probs by the number of tokens",
    "unfrozen_parameters": "trainable names what trains, by patterns such as '*.down_proj.weight'",
    **dict.fromkeys(("sample_packing", "eval_sample_packing", "packing", "neat_packing", "padding_free"), _PACKED),
    **dict.fromkeys(("pad_to_sequence_len", "dpo_padding_free", "batch_flattening"), _PACKED),
    **dict.fromkeys(("flash_attention", "sdp_attention", "attn_implementation", "flash_attn"), _ATTENTION),
    **dict.fromkeys(
        ("dataset_num_proc", "dataset_processes", "preprocessing_num_workers"), "not needed: text is read once"
    ),
    **dict.fromkeys(
        ("dataset_prepared_path", "overwrite_cache", "tokenized_path"), "token_cache is the folder of token ids"
    ),
    **dict.fromkeys(
        (
            *("wandb_entity", "wandb_mode", "mlflow_tracking_uri", "comet_project_name", "comet_workspace"),
            *("comet_api_key", "swanlab_project", "swanlab_mode", "swanlab_api_key"),
            *("hf_use_auth_token", "hub_token", "hf_hub_token"),
        ),
        "a variable of the environment, not a key",
    ),
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config"), "a config of accelerate launch, see recipes/accelerate"),
}
_READ = {"stage", "dataset_dir", "rl", "plot_loss", "overwrite_output_dir"}
_SFT_ONLY = {"packing", "packing_strategy", "assistant_only_loss", "completion_only_loss", "dataset_text_field"}


def library_of(values: Any, path: Path) -> Library:
    """Return whose config it is, by its keys; raises `ConfigError` if it is none of the three."""
    keys = values.keys() if isinstance(values, dict) else set()
    if "base_model" in keys:
        return "axolotl"
    if "model_name_or_path" in keys and keys & {"stage", "finetuning_type", "template", "cutoff_len", "dataset"}:
        return "llama_factory"
    if "model_name_or_path" in keys or keys >= {"output_dir", "learning_rate"}:
        return "trl"
    already = "; it looks like a config of bfpo, which needs no conversion" if keys >= {"model", "data"} else ""
    raise ConfigError(
        f"{path}: not a config of a known library{already}; known: axolotl (has base_model), LLaMA-Factory "
        "(model_name_or_path and stage), TRL (model_name_or_path, or a DPOConfig saved as JSON)"
    )


def _stage_of(values: Mapping[str, Any], library: Library, path: Path) -> Literal["train", "sft"]:
    if library == "trl":
        return "sft" if _SFT_ONLY & values.keys() and "beta" not in values else "train"
    key = "rl" if library == "axolotl" else "stage"
    asked = values.get(key) or "sft"
    allowed_here = {"axolotl": ("sft", "dpo", "ipo"), "llama_factory": ("sft", "dpo")}[library]
    if asked not in allowed_here:
        words = ", ".join(name for name in allowed_here if library != "axolotl" or name != "sft")
        without = ", or none (SFT)" if library == "axolotl" else ""
        why = "which has no counterpart"
        if asked == "kto":
            why = "which is not converted: write method: kto and data: {layout: unpaired}, as docs/data.md has it"
        raise ConfigError(f"{path}: {key}: got {asked!r}, {why}; allowed: {words}{without}")
    return "sft" if asked == "sft" else "train"


def convert(values: Mapping[str, Any], path: Path) -> Converted:
    """Return the config of ours that a config of another library stands for; `path` is its file.

    A value that ours does not allow is not carried over. Raises `ConfigError` for a file of no known library, of a kind
    of training that is not here, or with text where a number is needed.
    """
    library = library_of(values, path)
    stage = _stage_of(values, library, path)
    values = {key: _YAML_1_1.get(value, value) if isinstance(value, str) else value for key, value in values.items()}
    source = Source(values, library, stage, path)
    lines = []
    for row in ROWS:
        source.row, source.notes = row, []
        value = row.make(source)
        if value is None:
            continue
        given = [key for key in row.keys(library) if values.get(key) is not None]
        defaults = any(key in source.defaults for key in row.keys(library))
        origin = ", ".join(given) or (f"default of {LIBRARIES[library]}" if defaults else "")
        key = row.sft if row.sft and stage == "sft" else row.ours
        lines.append(Line(key, value, "; ".join(part for part in (origin, *source.notes) if part)))
    sections = {line.key: line.value for line in lines}
    if sections.get("eval_data") == sections["data"]:
        source.to_do.append(f"eval_data: names the rows of data; {HELD_OUT}")
    if "streaming" in sections["data"]:  # a set of files beside it, which is not streamed, is no loss
        source.lost.pop("streaming", None)
    known = {key for row in ROWS for key in row.keys(library)} | _READ
    rest = {key: value for key, value in values.items() if key not in known and value not in (None, "", [], {})}
    rest = {key: value for key, value in rest.items() if NEUTRAL.get(key, _READ) != value}
    why = {key: _WHY[key] for key, value in rest.items() if key in _WHY and value not in NOTHING}
    lost = {**source.lost, **why}
    found = Converted(library, stage, lines, lost, source.to_do, {k: v for k, v in rest.items() if k not in _WHY})
    _keep_valid(found)
    return found


def _keep_valid(found: Converted) -> None:
    """Move lines that our config refuses to `lost`."""
    cls = AlignConfig if found.stage == "train" else SftConfig
    for _ in range(len(found.lines)):
        try:
            cls.model_validate({line.key: line.value for line in found.lines})
            return
        except ValidationError as error:
            for details in error.errors():
                text = str(details["msg"]).removeprefix("Value error, ")
                key = str(details["loc"][0]) if details["loc"] else text.partition(":")[0]
                line = next((one for one in found.lines if one.key == key and key not in ("model", "data")), None)
                if line is None:
                    raise ConfigError(f"{key}: {text}") from error
                info = cls.model_fields.get(key)
                words = f"allowed: {allowed(info)}" if info is not None and details["type"] != "value_error" else text
                found.lost[line.comment.partition(";")[0]] = f"{key}: got {line.value!r}; {words}"
                found.lines.remove(line)


def table_rows() -> list[tuple[str, ...]]:
    """Return the rows of the table of docs/migration.md: our key, and theirs with their defaults."""

    def cell(row: Row, library: Library) -> str:
        given = [f"`{key}`" for key in row.keys(library)]
        defaults = [f"{DEFAULTS[library][key]}".lower() for key in row.keys(library) if key in DEFAULTS[library]]
        return ", ".join(given) + (f" ({', '.join(defaults)})" if defaults and len(given) <= 2 else "")

    ours = [f"`{row.ours}`" + (f", `{row.sft}` (sft)" if row.sft else "") for row in ROWS]
    return [(name, *(cell(row, library) for library in LIBRARIES)) for name, row in zip(ours, ROWS, strict=True)]

"""Configs of TRL, axolotl and LLaMA-Factory as those of `bfpo train` and `bfpo sft`: one table of keys for them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from bfpo.config.describe import allowed
from bfpo.config.train import AlignConfig, SftConfig
from bfpo.core.errors import ConfigError

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

Library = Literal["trl", "axolotl", "llama_factory"]
LIBRARIES: dict[Library, str] = {"trl": "TRL", "axolotl": "axolotl", "llama_factory": "LLaMA-Factory"}
FILL_IN = "FILL-IN"


@dataclass(frozen=True, slots=True)
class Row:
    """One key of ours, and the keys of each library that it is made of.

    `make`: from their values to ours; `None` leaves our key out. `sft`: our key in `bfpo sft`, where it is another.
    """

    ours: str
    trl: tuple[str, ...]
    axolotl: tuple[str, ...]
    llama_factory: tuple[str, ...]
    make: Callable[[Source], Any]
    sft: str = ""

    def keys(self, library: Library) -> tuple[str, ...]:
        """Return the keys of a library."""
        found: tuple[str, ...] = getattr(self, library)
        return found


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


@dataclass(slots=True)
class Source:
    """The values of one file while a row is made from them; `one` falls back to the library's default."""

    values: Mapping[str, Any]
    library: Library
    stage: Literal["train", "sft"]
    path: Path
    row: Row | None = None
    lost: dict[str, str] = field(default_factory=dict)
    to_do: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def keys(self) -> Sequence[str]:
        """Return the library's names of the row's key."""
        assert self.row is not None
        return self.row.keys(self.library)

    def one(self, place: int = 0) -> Any:
        """Return the value of the row's key at a place, or its default."""
        keys = self.keys()
        if place >= len(keys):
            return None
        given = self.values.get(keys[place])
        return self.defaults.get(keys[place]) if given is None else given

    @property
    def defaults(self) -> Mapping[str, Any]:
        """The library's defaults that are not ours."""
        return {**DEFAULTS[self.library], **(_OF_SFT.get(self.library, {}) if self.stage == "sft" else {})}

    def number(self, place: int = 0) -> Any:
        """Return it as a number; YAML 1.1 and 1.2 differ on `5e-6`. Raises `ConfigError`."""
        value = self.one(place)
        if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
            return value
        try:
            return float(value) if isinstance(value, str) else _not_a_number(value)
        except ValueError as error:
            key = self.keys()[place]
            raise ConfigError(f"{self.path}: {key}: got {value!r}; a number is needed to convert it") from error

    def flag(self, name: str, why: str) -> None:
        """Note that a key which the file gives is not carried over."""
        if self.values.get(name) not in _NOTHING:
            self.lost[name] = why


_YAML_1_1 = {"yes": True, "on": True, "no": False, "off": False}  # which the three libraries read their files by
_NOTHING: tuple[Any, ...] = (None, False, "", [], {}, "no", "none", "None")


def changes_nothing(value: Any, default: Any) -> bool:
    """Return whether a value is the default, or both are off."""
    return bool(value == default or (value in _NOTHING and default in _NOTHING))


def default_of(key: str) -> Any:
    """Return the value of a key that is not one of `TrainingArguments` which changes nothing; `None` = off."""
    return _NEUTRAL.get(key)


def _not_a_number(value: object) -> float:
    raise ValueError(value)


def _same(source: Source) -> Any:
    return source.one()


def _number(source: Source) -> Any:
    return source.number()


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
        for key in _RATES:
            source.flag(key, "a constant schedule has no warm-up; lr_scheduler_type: constant_with_warmup has")
        return None
    given = [key for key in _RATES if source.values.get(key) is not None]  # a default holds only if neither is given
    steps, ratio = (None if given and key not in given else source.number(n) for n, key in enumerate(_RATES))
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
    return not source.one() if source.library == "llama_factory" else source.one() not in _NOTHING


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


def _trackers(source: Source) -> Any:
    if source.library == "axolotl":
        return "wandb" if source.one() else None
    names = source.one()
    names = [names] if isinstance(names, str) else names or []
    names = [name for name in names if name not in ("none", "all")]
    return names or None


def _beside_tracker(source: Source) -> Any:
    tracked = source.values.get("wandb_project") or source.values.get("report_to") not in (*_NOTHING, "all", ["none"])
    if tracked:
        return source.one()
    key = source.keys()[0]
    if source.one() != _NEUTRAL.get(key):
        source.flag(key, "read with report_to only; name a tracker there")
    return None


def _eval_steps(source: Source) -> Any:
    held_out = source.values.get("test_datasets") or source.values.get("eval_dataset")
    if not held_out:
        source.flag("eval_steps", "read with eval_data only: name a file of held-out rows")
        return None
    return _steps(source)


def _template(source: Source) -> Any:
    value = source.one()
    if isinstance(value, str) and "{" in value:
        source.lost[source.keys()[0]] = "a template as text; save it as a file and name the file"
        return None
    return value


def _data(source: Source) -> Any:
    found = list(_DATA[source.library](source))
    if not found:
        source.to_do.append("data.files: the file names none; give .jsonl, .csv or .parquet files")
        return {"files": FILL_IN}
    files = [file for one in found for file in one.pop("files")]
    for file in files:
        if not Path(file).exists() and not any(character in file for character in "*?["):
            source.to_do.append(f"data.files: {file} is not here; name its file or folder on this disk")
    same = all(one == found[0] for one in found)
    if not same:
        source.to_do.append("data: the sets have different forms, which one section cannot have; see bfpo prepare")
    return {"files": files[0] if len(files) == 1 else files, **(found[0] if same else {})}


def _eval_data(source: Source) -> Any:
    return _data(source) if source.one() else None


def _files(item: Mapping[str, Any], path_key: str = "path") -> list[str]:
    files = item.get("data_files")
    named = list(files.values()) if isinstance(files, dict) else [files] if isinstance(files, str) else files or []
    named = [file for one in named for file in (one if isinstance(one, list) else [one])]
    return [str(file) for file in named] or [str(item.get(path_key))]


_ELSEWHERE = {
    **{"split": "data.split of a data set of the hub (data.hub)", "name": "data.subset", "subset": "data.subset"},
    **{"revision": "data.revision", "num_samples": "data.limit", "columns": "data.columns"},
}
_USUAL = {"split": "train", "ds_type": "json", "ranking": True, "chat_template": "tokenizer_default"}


def _unread(source: Source, place: str, entry: Mapping[str, Any], read: set[str]) -> None:
    """Note the keys of a data set that are not carried over."""
    for key, value in entry.items():
        if key not in read and value not in _NOTHING and value != _USUAL.get(key):
            here = f"{_ELSEWHERE[key]} says it here" if key in _ELSEWHERE else "see data.layout and data.columns"
            source.lost[f"{place}: {key}"] = f"not read; {here}"


def _trl_data(source: Source) -> Iterator[dict[str, Any]]:
    name, sets = source.one(0), source.one(1)
    for item in sets or []:
        _unread(source, "datasets", item, {"path", "data_files"})
        yield {"files": _files(item)}
    if name and not sets:
        yield {"files": [str(name)]}


def _axolotl_data(source: Source) -> Iterator[dict[str, Any]]:
    for item in source.one() or []:
        found: dict[str, Any] = {"files": _files(item)}
        kind = item.get("type") if isinstance(item.get("type"), str) else ""
        messages = item.get("field_messages", "messages")
        if kind.startswith("chat_template") and source.stage == "train":
            columns = {
                "messages": messages,
                "chosen": item.get("field_chosen", "chosen"),
                "rejected": item.get("field_rejected", "rejected"),
            }
            found["layout"] = "messages"
        elif kind.startswith("chat_template"):
            columns = {"messages": messages}
            found["layout"] = "completions"
        else:
            columns = {}
            if kind:
                source.notes.append(f"type {kind}: the layout is found from the columns")
        found |= _renamed(columns)
        read = {"path", "data_files", "ds_type", *(f"field_{name}" for name in columns), *(["type"] if kind else [])}
        _unread(source, source.keys()[0], item, read)
        yield found


_SHAREGPT = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}
_ALPACA = {
    **{"prompt": "instruction", "query": "input", "response": "output"},
    **{"history": "history", "system": "system", "chosen": "chosen", "rejected": "rejected"},
}


def _llama_factory_data(source: Source) -> Iterator[dict[str, Any]]:
    names = source.one()
    folder = str(source.values.get("dataset_dir") or "data")
    table = next(
        (one for one in (Path(folder), source.path.parent / folder) if (one / "dataset_info.json").is_file()), None
    )
    entries = {} if table is None else _read_table(table / "dataset_info.json")
    for name in [one.strip() for one in names.split(",")] if isinstance(names, str) else names or []:
        entry = entries.get(name)
        if table is None or entry is None:
            source.to_do.append(f"data.files: {name} is an entry of {folder}/dataset_info.json, which is not here")
            yield {"files": [name]}
            continue
        file = entry.get("file_name")
        sharegpt = entry.get("formatting", "alpaca") != "alpaca"
        layouts = ("sharegpt", "conversations") if sharegpt else ("alpaca_pairs", "alpaca")
        known = _SHAREGPT if sharegpt else _ALPACA
        columns = {known[key]: value for key, value in entry.get("columns", {}).items() if key in known}
        _unread(source, name, entry, {"file_name", "hf_hub_url", "script_url", "formatting", "columns"})
        _unread(source, f"{name}: columns", entry.get("columns", {}), set(known))
        where = str(table / file) if file else str(entry.get("hf_hub_url") or entry.get("script_url") or name)
        yield {"files": [where], "layout": layouts[source.stage == "sft"], **_renamed(columns)}


def _read_table(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON ({error}); correct it") from error
    return found if isinstance(found, dict) else {}


def _renamed(columns: Mapping[str, str]) -> dict[str, Any]:
    other = {ours: theirs for ours, theirs in columns.items() if ours != theirs}
    return {"columns": other} if other else {}


_DATA: dict[Library, Callable[[Source], Iterator[dict[str, Any]]]] = {
    "trl": _trl_data,
    "axolotl": _axolotl_data,
    "llama_factory": _llama_factory_data,
}

_BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
_RATES = ("warmup_steps", "warmup_ratio")
DEFAULTS: dict[Library, dict[str, Any]] = {
    "trl": {
        **{"beta": 0.1, "learning_rate": 1e-6, "lr_scheduler_type": "linear", "warmup_steps": 0, "num_train_epochs": 3},
        **{_BATCH[0]: 8, _BATCH[1]: 1, "max_length": 1024, "bf16": True, "gradient_checkpointing": True},
        **{"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05},
    },
    "axolotl": {
        **{"rl_beta": 0.1, "lr_scheduler": "cosine", "warmup_ratio": 0.03, "num_epochs": 1, "micro_batch_size": 1},
        **{_BATCH[1]: 1, "sequence_len": 512, "bf16": "auto", "gradient_checkpointing": False},
    },
    "llama_factory": {
        **{"pref_beta": 0.1, "learning_rate": 5e-5, "lr_scheduler_type": "linear", "warmup_steps": 0},
        **{"num_train_epochs": 3, _BATCH[0]: 8, _BATCH[1]: 1, "cutoff_len": 2048, "bf16": False},
        **{"disable_gradient_checkpointing": False, "finetuning_type": "lora", "lora_rank": 8, "lora_target": "all"},
    },
}
"""Defaults of the libraries, written out where the file is silent, since ours differ."""
_OF_SFT: dict[Library, dict[str, Any]] = {"trl": {"learning_rate": 2e-5}}


def _alike(ours: str, keys: tuple[str, ...], make: Callable[[Source], Any]) -> Row:
    return Row(ours, keys, keys, keys, make)


ROWS: tuple[Row, ...] = (
    Row("model", ("model_name_or_path",), ("base_model",), ("model_name_or_path",), _model),
    Row("revision", ("model_revision",), ("revision_of_model",), ("model_revision",), _revision),
    Row("data", ("dataset_name", "datasets"), ("datasets",), ("dataset",), _data),
    Row("eval_data", (), ("test_datasets",), ("eval_dataset",), _eval_data),
    Row("method", ("loss_type",), ("dpo_loss_type", "rl"), ("pref_loss",), _method),
    Row("beta", ("beta",), ("rl_beta",), ("pref_beta",), _beta),
    Row("pairs_per_step", _BATCH, ("micro_batch_size", _BATCH[1]), _BATCH, _step_size, sft="completions_per_step"),
    Row("max_length", ("max_length",), ("sequence_len",), ("cutoff_len",), _number),
    _alike("learning_rate", ("learning_rate",), _number),
    Row("lr_scheduler_type", ("lr_scheduler_type",), ("lr_scheduler",), ("lr_scheduler_type",), _same),
    _alike("warmup_steps", _RATES, _warmup),
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
    Row("report_to", ("report_to",), ("wandb_project",), ("report_to",), _trackers),
    Row("project", ("project",), ("wandb_project",), ("project",), _beside_tracker),
    Row("run_name", ("run_name",), ("wandb_name",), ("run_name",), _beside_tracker),
)
"""Every key that is taken over; docs/migration.md has it as a table, which a test compares."""

_PACKED = "rows are packed without padding anyway (attention: auto)"
_ATTENTION = "attention: auto takes packed rows where the model can"
_TEMPLATE = "the chat template of the tokenizer is used; chat_template names another file"
_HELD_OUT = "hold prompts out with data.split (held_out), and name part: test in eval_data"
_WHY: dict[str, str] = {
    "output_dir": "the run folder is --out",
    "load_in_8bit": "eight bits are not here; quantize: nf4 holds frozen weights in four",
    "trust_remote_code": "no code of a model is run",
    "chat_template": _TEMPLATE,
    "template": _TEMPLATE,
    "val_set_size": _HELD_OUT,
    "val_size": _HELD_OUT,
    "dataset_test_split": _HELD_OUT,
    "max_samples": "data.limit draws that many rows",
    "streaming": "data.streaming: true reads a data set of the hub, data.hub, without a copy of its files",
    "default_system": "a system message belongs in the rows",
    "evals_per_epoch": "eval_steps counts optimizer steps",
    "saves_per_epoch": "save_steps counts optimizer steps",
    "early_stopping_patience": "best: {metric: loss, patience: N} with eval_data and eval_steps",
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
    **dict.fromkeys(("wandb_entity", "hf_use_auth_token", "hub_token"), "a variable of the environment, not a key"),
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config"), "a config of accelerate launch, see recipes/accelerate"),
}
# Values that change nothing, also of keys that a dump of TRL's DPOConfig or SFTConfig has.
_NEUTRAL: dict[str, Any] = {
    **{"disable_dropout": True, "truncation_mode": "keep_start", "f_divergence_type": "reverse_kl"},
    **{"f_alpha_divergence_coef": 0.5, "label_smoothing": 0.0, "discopop_tau": 0.05, "ref_model_mixup_alpha": 0.6},
    **{"ref_model_sync_steps": 512, "router_aux_loss_coef": 0.001, "dataset_text_field": "text"},
    **{"packing_strategy": "bfd", "dataset_train_split": "train", "dataset_test_split": "test", "do_train": True},
    **{
        "project": "huggingface",
        "shuffle_merged_datasets": True,
        "double_quantization": True,
        "lora_task_type": "CAUSAL_LM",
        "ddp_timeout": 180000000,
    },
    **{"bnb_4bit_quant_type": "nf4", "quantization_type": "nf4", "strict": False, "model_type": "AutoModelForCausalLM"},
    **{"tokenizer_type": "AutoTokenizer", "ignore_pad_token_for_loss": True, "media_dir": None},
}
_READ = {"stage", "dataset_dir", "use_wandb", "rl", "plot_loss", "overwrite_output_dir"}
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
        raise ConfigError(f"{path}: {key}: got {asked!r}, which has no counterpart; allowed: {words}{without}")
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
    known = {key for row in ROWS for key in row.keys(library)} | _READ
    rest = {key: value for key, value in values.items() if key not in known and value not in (None, "", [], {})}
    rest = {key: value for key, value in rest.items() if _NEUTRAL.get(key, _READ) != value}
    why = {key: _WHY[key] for key, value in rest.items() if key in _WHY and value not in _NOTHING}
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

"""Values of a config of TRL, axolotl or LLaMA-Factory, and the defaults of the three libraries."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from bfpo.core.errors import ConfigError

__all__ = ["BATCH", "DEFAULTS", "FILL_IN", "LIBRARIES", "NEUTRAL", "NOTHING", "RATES", "Library", "Row", "Source"]

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

    @property
    def ours(self) -> str:
        """Return our name of the row's key."""
        assert self.row is not None
        return self.row.ours

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
        """Note that a key which the file gives, with a value that changes something, is not carried over."""
        value = self.values.get(name)
        if value not in NOTHING and value != NEUTRAL.get(name):
            self.lost[name] = why


NOTHING: tuple[Any, ...] = (None, False, "", [], {}, "no", "none", "None")


def _not_a_number(value: object) -> float:
    raise ValueError(value)


BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
RATES = ("warmup_steps", "warmup_ratio")
DEFAULTS: dict[Library, dict[str, Any]] = {
    "trl": {
        **{"beta": 0.1, "learning_rate": 1e-6, "lr_scheduler_type": "linear", "warmup_steps": 0, "num_train_epochs": 3},
        **{BATCH[0]: 8, BATCH[1]: 1, "max_length": 1024, "bf16": True, "gradient_checkpointing": True},
        **{"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "dataset_test_split": "test"},
    },
    "axolotl": {
        **{"rl_beta": 0.1, "lr_scheduler": "cosine", "warmup_ratio": 0.03, "num_epochs": 1, "micro_batch_size": 1},
        **{BATCH[1]: 1, "sequence_len": 512, "bf16": "auto", "gradient_checkpointing": False},
    },
    "llama_factory": {
        **{"pref_beta": 0.1, "learning_rate": 5e-5, "lr_scheduler_type": "linear", "warmup_steps": 0},
        **{"num_train_epochs": 3, BATCH[0]: 8, BATCH[1]: 1, "cutoff_len": 2048, "bf16": False},
        **{"disable_gradient_checkpointing": False, "finetuning_type": "lora", "lora_rank": 8, "lora_target": "all"},
    },
}
"""Defaults of the libraries, written out where the file is silent, since ours differ."""
_OF_SFT: dict[Library, dict[str, Any]] = {"trl": {"learning_rate": 2e-5}}


# Values that change nothing, also of keys that a dump of TRL's DPOConfig or SFTConfig has.
NEUTRAL: dict[str, Any] = {
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

"""Load a causal LM and its tokenizer, and choose which parameters train."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from bfpo.core.errors import ModelError
from bfpo.data.template import with_template
from bfpo.policy.devices import to_gpu
from bfpo.policy.precision import hold_masters, prepare_quantised, quantisation
from bfpo.policy.settings import LoraConfig
from bfpo.policy.source import cannot_load, check_code, check_source
from bfpo.policy.trained import (
    CHAT_TEMPLATE,
    check_start,
    holds_only_trained,
    put_trained,
    require_whole,
    start_of,
    start_of_run,
)

__all__ = [
    "DTYPES",
    "Policy",
    "TrainableReport",
    "choose_trainable",
    "disable_dropout",
    "init_policy",
    "initial_config",
    "load_policy",
    "load_to_read",
    "load_tokenizer",
    "pad_token_id",
    "require_no_adapter",
    "set_trainable",
    "trainable_report",
    "with_template_of",
]

LoraSettings = LoraConfig | Mapping[str, Any]
"""Our section of a config, or the keyword arguments of `peft.LoraConfig`."""

DTYPES: dict[str, torch.dtype | str] = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "auto": "auto",
}
# Not PhiMoE's `router_jitter_noise`, which also acts in evaluation.
_OTHER_NOISE = frozenset({"layerdrop", "jitter_noise", "input_jitter_noise"})


@dataclass(frozen=True, slots=True)
class TrainableReport:
    """Which parameters train: how many numbers, of how many, in how many tensors, and a few of their names."""

    num_trainable: int
    num_total: int
    num_tensors: int
    names: tuple[str, ...]

    @property
    def share(self) -> float:
        """Return the trainable share of all parameters, in [0, 1]."""
        return self.num_trainable / self.num_total

    def __str__(self) -> str:
        more = ", ..." if self.num_tensors > len(self.names) else ""
        return (
            f"{self.num_trainable:,} of {self.num_total:,} parameters train ({self.share:.1%}), in "
            f"{self.num_tensors} tensors: {', '.join(self.names)}{more}"
        )


@dataclass(frozen=True, slots=True)
class Policy:
    """A model, its tokenizer, and which parameters train."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    trainable_report: TrainableReport


_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")


def load_policy(
    model: str | Path,
    *,
    trainable: Sequence[str] | Literal["all"] = "all",
    lora: LoraSettings | None = None,
    quantize: Literal["nf4"] | None = None,
    dtype: str = "float32",
    masters: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    dropout: bool = False,
    seed: int = 0,
) -> Policy:
    """Load any causal LM of transformers from a folder or the hub and freeze what does not train.

    `trainable`: "all", or shell patterns over parameter names, such as "*.down_proj.weight". `lora`: keyword arguments
    of `peft.LoraConfig`; then only the adapters train, and patterns have no effect, so `trainable` must stay "all".
    `quantize`: "nf4" holds the base in four bits under the adapters (QLoRA). `masters`: what trains is held in float32
    whatever the dtype (see `hold_masters`). Weights are read from safetensors only. Without `dropout` every dropout of
    the model is off: the reference has none, and the margin of the first step must be zero. The random half of an
    adapter's initial weights depends on `seed` alone. Call this before an optimizer is built. Python code that comes
    with a model runs only with `trust_remote_code`, which no command sets. To a checkpoint that holds only what trains,
    the other weights come from the model that its run started from; they are checked.

    Raises `ModelError` for a model that cannot be loaded or whose files lack weights of a causal LM, a pattern that
    matches no parameter (with the closest names), LoRA settings that peft does not know, and with `masters` for a model
    that comes with an adapter.
    """
    if dtype not in DTYPES:
        raise ModelError(f"dtype: got {dtype!r}; allowed: {', '.join(DTYPES)}")
    if quantize is not None and lora is None:
        raise ModelError(
            f"quantize: got {quantize!r} without lora; four-bit weights cannot train, set lora to train adapters"
        )
    extras = {} if quantize is None else {"quantization_config": quantisation(_compute_dtype(dtype))}
    tokenizer = load_tokenizer(model, revision=revision, trust_remote_code=trust_remote_code)
    if not trust_remote_code:
        check_code(model, revision=revision)
    load = partial(
        AutoModelForCausalLM.from_pretrained,
        use_safetensors=True,
        output_loading_info=True,
        trust_remote_code=trust_remote_code,
    )
    loaded = _load_weights(load, model, dtype, revision, extras)
    if masters:
        require_no_adapter(loaded, model)
    if quantize is not None:
        prepare_quantised(loaded)
    loaded = set_trainable(loaded, trainable, lora, seed=seed)
    if masters and dtype != "float64":
        start, start_revision = start_of(model, revision)
        hold_masters(loaded, start, revision=start_revision)
        if holds_only_trained(model) and lora is None:
            put_trained(loaded, model)  # again, now into float32
    if not dropout:
        disable_dropout(loaded)
    return Policy(loaded, tokenizer, trainable_report(loaded))


def _load_weights(
    load: Callable[..., Any], model: str | Path, dtype: str, revision: str | None, extras: Mapping[str, Any]
) -> Any:
    """Return a causal LM with the weights of a folder or hub id, or of a checkpoint put into those of its start."""
    if holds_only_trained(model):
        return _load_checkpoint(load, Path(model), dtype, extras)
    check_source("model", model, revision=revision)
    # Under ZeRO-3 transformers would partition the weights while it reads them, whatever `zero3_init_flag` says. Here
    # they are read whole; accelerate sets its config again when the trainer is made.
    unset_hf_deepspeed_config()
    try:
        loaded, report = cast(
            "tuple[Any, dict[str, Any]]",
            load(str(model), dtype=DTYPES[dtype], revision=revision or "main", **extras),
        )
    except Exception as error:  # files, hub, config, weights and code of the model have their own classes
        raise cannot_load("model", model, error) from error
    if report["missing_keys"]:  # transformers would fill them with random numbers
        missing = sorted(report["missing_keys"])
        raise ModelError(
            f"model: {str(model)!r} lacks {len(missing)} weights of {type(loaded).__name__}, such as {missing[0]}; "
            "give a causal LM with its head"
        )
    if getattr(loaded, "generation_config", None) is not None:
        loaded.generation_config = _savable(loaded.generation_config)
    return loaded


def require_no_adapter(loaded: Any, model: str | Path) -> None:
    """Raise `ModelError` if transformers has put an adapter onto a model: it would save the adapter alone."""
    if getattr(loaded, "_hf_peft_config_loaded", False):
        raise ModelError(
            f"model: {str(model)!r} comes with an adapter (adapter_config.json), which is put onto its weights and "
            "would be saved without them; merge the two (merge_and_unload of peft), or leave the adapter out"
        )


def _savable(config: Any) -> Any:
    """Return a config of generation with settings of sampling, but without `do_sample: true`, as one that can be saved.

    transformers reads such a config, but does not save it once it was changed, as a trainer does whose tokenizer has
    other special tokens. Settings of sampling ask for it; under `do_sample: false` nothing reads them. A config with
    other faults is returned as it is.
    """
    settled = deepcopy(config)
    if config.do_sample is False:
        for name in filter(partial(hasattr, config), _SAMPLING):
            setattr(settled, name, None)
    else:
        settled.do_sample = True
    for one in (config, settled):
        with suppress(ValueError):
            one.validate(strict=True)
            return one
    return config


def _load_checkpoint(load: Callable[..., Any], checkpoint: Path, dtype: str, extras: Mapping[str, Any]) -> Any:
    """Return the model of a checkpoint of what trains; `dtype`: "auto" is that of its run."""
    if extras:
        require_whole(checkpoint, "quantize")
    start, revision, held = start_of_run(checkpoint)
    loaded = _load_weights(load, start, held, revision, {})
    check_start(loaded, checkpoint)  # before another dtype: the digest is that of the weights as the run held them
    if dtype not in (held, "auto"):
        loaded = _load_weights(load, start, dtype, revision, {})
    put_trained(loaded, checkpoint)
    return loaded


def load_to_read(model: str | Path, *, dtype: str = "float32", revision: str | None = None) -> Any:
    """Return a model of `load_policy` whose log-probs are read, on the GPU if there is one."""
    loaded = load_policy(model, dtype=dtype, revision=revision).model
    to_gpu(loaded)
    return loaded


def _compute_dtype(dtype: str) -> torch.dtype:
    found = DTYPES[dtype]
    return found if isinstance(found, torch.dtype) else torch.bfloat16


def load_tokenizer(
    model: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder or hub id; raises `ModelError` if there is none.

    That of a checkpoint which holds only what trains has the chat template of its training.
    """
    start, revision = start_of(model, revision)
    check_source("model", start, revision=revision)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(start), revision=revision or "main", trust_remote_code=trust_remote_code
        )
    except Exception as error:
        # transformers tries sentencepiece first, and names tiktoken where there is no tokenizer at all, too.
        without = "tiktoken" in str(error) and find_spec("sentencepiece") is None
        if without and (not Path(start).is_dir() or (Path(start) / "tokenizer.model").is_file()):
            raise ModelError(
                f"tokenizer: {start!r} has no tokenizer.json; to read its tokenizer.model, install the package "
                "sentencepiece (Llama 2, Mistral), or tiktoken if the file is of that kind (Llama 3)"
            ) from error
        raise cannot_load("tokenizer", start, error) from error
    return with_template_of(tokenizer, model) if start != str(model) else tokenizer


def with_template_of(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer with the chat template that a folder of trained weights holds, unchanged without one."""
    file = Path(folder) / CHAT_TEMPLATE
    return with_template(tokenizer, file.read_text(encoding="utf-8")) if file.is_file() else tokenizer


def pad_token_id(tokenizer: PreTrainedTokenizerBase, rows: int | None = None) -> int:
    """Return the id to pad with: the pad token, else the end token, else 0.

    Only masks decide what counts, so any id of the vocabulary works, and no embedding is added for it. `rows`: those of
    the model's embedding, if known; an id beyond them is left out.
    """
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token_id, int) and (rows is None or token_id < rows):
            return token_id
    return 0


def init_policy(
    config: Mapping[str, Any], tokenizer: str | Path, *, dtype: str = "float32", seed: int = 0, dropout: bool = True
) -> Policy:
    """Make a Llama with random weights, all of them trainable.

    `config`: keyword arguments of `transformers.LlamaConfig`. The vocabulary size and the special tokens come from the
    tokenizer. The same seed gives the same weights, whatever was drawn before. All of them train, so under bfloat16 too
    they are held in float32.

    Raises `ModelError` for a tokenizer that cannot be loaded or a config that LlamaConfig refuses.
    """
    loaded_tokenizer = load_tokenizer(tokenizer)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model: Any = LlamaForCausalLM(initial_config(config, loaded_tokenizer))
    except ModelError:
        raise
    except Exception as error:  # sizes that do not fit together
        raise _invalid_llama(config, error) from error
    model.to(torch.float64 if dtype == "float64" else torch.float32)
    if not dropout:
        disable_dropout(model)
    return Policy(model, loaded_tokenizer, trainable_report(model))


def initial_config(config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> LlamaConfig:
    """Return the config of `init_policy`'s model; raises `ModelError` for a config that LlamaConfig refuses."""
    known = set(LlamaConfig().to_dict()) | {"rope_parameters", "rope_scaling", "rope_theta"}
    for key in config:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=3)
            raise ModelError(f"init.config: unknown key {key!r}{'; close: ' + ', '.join(close) if close else ''}")
    settings = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": pad_token_id(tokenizer),
        **config,
    }
    try:
        return LlamaConfig(**settings)
    except Exception as error:  # validation has its own classes, by version
        raise _invalid_llama(config, error) from error


def _invalid_llama(config: Mapping[str, Any], error: Exception) -> ModelError:
    return ModelError(f"init.config: {dict(config)!r} is not a valid Llama config: {error.__cause__ or error}")


# What trains


def set_trainable(
    model: Any,
    trainable: Sequence[str] | Literal["all"],
    lora: LoraSettings | None = None,
    *,
    seed: int = 0,
) -> Any:
    """Choose what trains, as in `load_policy`, and return the model, wrapped by peft if `lora` is given."""
    if lora is None:
        choose_trainable(model, trainable)
        return model
    if trainable != "all":
        raise ModelError(f"trainable: got {list(trainable)!r} together with lora; with lora only the adapters train")
    return _add_lora(model, lora, seed=seed)


def choose_trainable(model: nn.Module, patterns: Sequence[str] | Literal["all"]) -> None:
    """Make exactly the parameters whose name matches one of the patterns train, or all of them.

    A parameter shared by two modules is matched by either name. Raises `ModelError` for an empty list and for a pattern
    that matches nothing, with the closest names.
    """
    named = list(model.named_parameters(remove_duplicate=False))
    if patterns == "all":
        chosen = {id(parameter) for _, parameter in named}
    else:
        if not patterns:
            raise ModelError("trainable: got an empty list; allowed: 'all', or patterns such as '*.down_proj.weight'")
        chosen = set()
        for pattern in patterns:
            matched = {id(parameter) for name, parameter in named if fnmatch.fnmatchcase(name, pattern)}
            if not matched:
                raise ModelError(_no_match(pattern, [name for name, _ in named]))
            chosen |= matched
    for _, parameter in named:
        parameter.requires_grad_(id(parameter) in chosen)


def _no_match(pattern: str, names: Sequence[str]) -> str:
    """Return the error text with close names: one for each kind of parameter, with stars as block numbers."""
    kinds: dict[str, None] = {}
    for name in names:
        kinds[".".join("*" if part.isdigit() else part for part in name.split("."))] = None
    bare = pattern.replace("*", "").strip(".")
    by_likeness = sorted(
        kinds,
        key=lambda kind: difflib.SequenceMatcher(None, bare, kind[-len(bare) - 8 :] if bare else kind).ratio(),
        reverse=True,
    )
    return (
        f"trainable: the pattern {pattern!r} matches no parameter of the model; close names: "
        f"{', '.join(by_likeness[:5])}"
    )


def _add_lora(model: Any, lora: LoraSettings, *, seed: int = 0) -> Any:
    """Return the model wrapped by peft with LoRA adapters that `seed` alone decides; `lora`: keywords of `LoraConfig`.

    Raises `ModelError` for settings that peft does not know, and for an adapter on one of two modules that share a
    weight.
    """
    import peft

    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            adapted = peft.get_peft_model(model, peft.LoraConfig(**{"task_type": "CAUSAL_LM", **dict(lora)}))
    except (TypeError, ValueError) as error:
        raise ModelError(f"lora: {dict(lora)!r} cannot be used: {error}") from error
    _check_shared_weight(adapted.get_base_model())
    return adapted


def _check_shared_weight(base: Any) -> None:
    """Refuse an adapter on a weight that embedding and head share: merging it would change the other too."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    ends = [base.get_input_embeddings(), base.get_output_embeddings()]
    weights = [getattr(end, "weight", None) for end in ends]
    if weights[0] is weights[1] and any(isinstance(end, BaseTunerLayer) for end in ends):
        raise ModelError(
            "lora: target_modules names the embedding or the output head, which are one weight in this model; an "
            "adapter on one of them cannot be merged without changing the other: leave both out"
        )


def trainable_report(model: nn.Module, *, num_names: int = 4) -> TrainableReport:
    """Count what trains; raises `ModelError` if nothing does."""
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trainable:
        raise ModelError("trainable: no parameter of the model trains")
    return TrainableReport(
        num_trainable=sum(parameter.numel() for _, parameter in trainable),
        num_total=sum(parameter.numel() for parameter in model.parameters()),
        num_tensors=len(trainable),
        names=tuple(name for name, _ in trainable[:num_names]),
    )


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability of the model to zero, in modules and in the numbers that attention passes on.

    Layers that are left out at random (OPT's `layerdrop`) and noise on the inputs of experts (Mixtral) are off too.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            noisy = "dropout" in name or name in _OTHER_NOISE
            if noisy and isinstance(value, float):
                setattr(module, name, 0.0)

"""`trainer_args` and `optim`: further fields of `TrainingArguments`, those that would break a guarantee refused."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import logging
import os
from collections.abc import Mapping
from typing import Any, TypeVar, get_type_hints

import torch
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.training_args import OptimizerNames

from bfpo.config.describe import allowed
from bfpo.core.errors import BfpoError, ConfigError, MissingExtraError, first_line

__all__ = ["check_launcher", "check_trainer_args", "made_arguments"]

logger = logging.getLogger(__name__)

Arguments = TypeVar("Arguments", bound=TrainingArguments)

_STEP = "pairs_per_step and max_tokens_per_microbatch, or completions_per_step and completions_per_microbatch"
_IN_STEPS = "optimizer steps; --dry-run shows how many are a pass over the data"
# Fields that have a key of the config, or another place, which is named.
OWN: dict[str, str] = {
    **{
        name: name
        for name in (
            *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "seed", "optim"),
            *("num_train_epochs", "max_steps", "eval_steps", "save_steps", "save_total_limit", "logging_steps"),
            *("report_to", "run_name", "project", "gradient_checkpointing", "push_to_hub", "hub_private_repo"),
        )
    },
    "activation_checkpointing": "gradient_checkpointing",
    "warmup_ratio": "warmup_steps",
    "bf16": "dtype",
    "output_dir": "--out",
    "resume_from_checkpoint": "--resume",
    "eval_strategy": f"eval_steps ({_IN_STEPS})",
    "logging_strategy": f"logging_steps ({_IN_STEPS})",
    "save_strategy": f"save_steps ({_IN_STEPS})",
    "data_seed": "seed",
    "per_device_train_batch_size": _STEP,
    "per_device_eval_batch_size": _STEP,
    "gradient_accumulation_steps": _STEP,
    "load_best_model_at_end": "best",
    "metric_for_best_model": "best.metric",
    "greater_is_better": "best.metric",
    "hub_model_id": "push_to_hub",
    "hub_token": "the variable HF_TOKEN, or hf auth login",
    "use_cpu": "the variable CUDA_VISIBLE_DEVICES, empty",
    "deepspeed": "a config of accelerate launch (recipes/accelerate)",
    "fsdp": "a config of accelerate launch (recipes/accelerate)",
    "fsdp_config": "a config of accelerate launch (recipes/accelerate)",
}
_ORDER = "the order of the rows follows from seed alone, so that a resumed run reads what an uninterrupted one reads"
_TABLES = "the metrics by label cell come from all rows of an evaluation together"
_PARALLEL = (
    "context, sequence and tensor parallelism cut rows or layers over processes, which the log-probs of whole "
    "completions do not support; use FSDP or DeepSpeed, or a smaller max_length"
)
# Fields that would break a guarantee of both stages, with the reason.
REFUSED: dict[str, str] = {
    "fp16": "log-probs and their margins overflow or lose their sign in float16; set dtype: bfloat16",
    "fp16_full_eval": "log-probs lose their sign in float16; set dtype: bfloat16",
    "bf16_full_eval": "the weights that train would be rounded to bfloat16 at each evaluation; set dtype: bfloat16",
    "label_smoothing_factor": "the loss is that of the method or of the completions, which has no such term",
    "auto_find_batch_size": "a step would have another number of rows than the config says",
    "average_tokens_across_devices": "a loss is averaged over the rows of the whole step, on all devices",
    "ignore_data_skip": _ORDER,
    "train_sampling_strategy": _ORDER,
    "group_by_length": _ORDER,
    "length_column_name": _ORDER,
    "dataloader_in_order": _ORDER,
    "accelerator_config": "the rows of a step are divided over processes by bfpo",
    "dataloader_persistent_workers": "the workers would not learn that an epoch has begun, and repeat its order",
    "remove_unused_columns": "the batches hold labels and masks that it would remove",
    "label_names": "the batches hold labels that it would rename",
    "include_for_metrics": _TABLES,
    "prediction_loss_only": _TABLES,
    "batch_eval_metrics": _TABLES,
    "eval_do_concat_batches": _TABLES,
    "eval_use_gather_object": _TABLES,
    "include_num_input_tokens_seen": "packed rows share tokens, which it would not see; metrics.jsonl has the tokens",
    "restore_callback_states_from_checkpoint": "it would replace the callback that holds the sums since the last row",
    "logging_nan_inf_filter": "a loss that is not finite stops the run, and would be hidden",
    "disable_tqdm": "progress is shown by bfpo",
    **dict.fromkeys(
        ("log_level", "log_level_replica", "log_on_each_node"),
        "bfpo decides what is logged; the variable TRANSFORMERS_VERBOSITY sets what transformers logs",
    ),
    "save_on_each_node": "the checkpoints of a run are in one folder, which all nodes share",
    **dict.fromkeys(
        ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
        "bfpo sets use_reentrant: false, without which frozen embeddings stop the gradient",
    ),
    **dict.fromkeys(("hub_strategy", "hub_always_push"), "push_to_hub pushes the model, once, at the end"),
    "hub_revision": "push_to_hub pushes to the main branch; for another, upload the folder model/ with hf upload",
    "save_only_model": "a checkpoint without the optimizer cannot be resumed",
    "enable_jit_checkpoint": "bfpo itself saves a checkpoint at Ctrl-C and SIGTERM",
    "overwrite_output_dir": "a run folder is never overwritten",
    "use_cache": "packed rows hold several completions, which a cache of keys would mix",
    "parallelism_config": _PARALLEL,
    "torch_compile": "log-probs are taken by a hook on the head, of which a compiled model skips calls",
    "torch_compile_backend": "it turns torch_compile on, which skips calls of the hook on the head",
    "torch_compile_mode": "it turns torch_compile on, which skips calls of the hook on the head",
    "use_liger_kernel": "it replaces the head and its loss, from which the log-probs are taken",
    "liger_kernel_config": "it is read by use_liger_kernel only, which is refused",
    "ddp_find_unused_parameters": "bfpo sets it",
    "local_rank": "the launcher sets it",
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), "nothing reads it; the command says what is done"),
}
# Of preference training only.
REFUSED_BY_TRAIN: dict[str, str] = {
    "neftune_noise_alpha": "noise on the embeddings moves the first margins away from 0, which the reference has",
    "tf32": "the check of the first loss knows the rounding of float32 and bfloat16 only; set dtype: bfloat16",
}


def check_trainer_args(values: Mapping[str, Any], *, preference: bool) -> None:
    """Raise `ConfigError` for a name that is no field, has a key of its own or breaks a guarantee, and a wrong type."""
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    hints = get_type_hints(TrainingArguments)
    for name, value in values.items():
        place = f"trainer_args.{name}"
        reason = REFUSED.get(name) or (REFUSED_BY_TRAIN.get(name) if preference else None)
        if name in OWN:
            raise ConfigError(f"{place}: use {OWN[name]} in its place")
        if reason is not None:
            raise ConfigError(f"{place}: not allowed, {reason}")
        if name not in names:
            refused = REFUSED.keys() | (REFUSED_BY_TRAIN.keys() if preference else set())
            free = sorted(names - OWN.keys() - refused)
            near = difflib.get_close_matches(name, free, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(free)}"
            raise ConfigError(f"{place}: transformers.TrainingArguments has no such field; {hint}")
        try:
            TypeAdapter(hints[name]).validate_python(value, strict=True)
        except ValidationError:
            words = allowed(FieldInfo(annotation=hints[name]))
            raise ConfigError(f"{place}: got {value!r}; allowed: {words}") from None


def check_launcher(dtype: str) -> None:
    """Let `dtype` decide on mixed precision, also where `accelerate launch` asks for another one, with a warning.

    Raises `ConfigError` if the launcher asks for context, sequence or tensor parallelism, or for a compiled model.
    """
    for kind in ("CP", "SP", "TP"):
        name = f"PARALLELISM_CONFIG_{kind}_SIZE"
        if os.environ.get(name, "1") not in ("", "0", "1"):
            raise ConfigError(f"{name}={os.environ[name]}: not supported: {_PARALLEL}")
    name = "ACCELERATE_DYNAMO_BACKEND"
    if (backend := os.environ.get(name, "no")).lower() not in ("", "no"):
        raise ConfigError(
            f"{name}={backend} (dynamo_backend of accelerate launch): not supported: {REFUSED['torch_compile']}; set "
            "dynamo_backend: 'NO'"
        )
    name, wanted = "ACCELERATE_MIXED_PRECISION", "bf16" if dtype == "bfloat16" else "no"
    asked = os.environ.get(name, "no")
    if asked not in ("no", wanted):
        logger.warning("%s=%s (mixed_precision of accelerate launch): not used, dtype: %s decides", name, asked, dtype)
        os.environ[name] = wanted


def made_arguments(kind: type[Arguments], values: Mapping[str, Any]) -> Arguments:
    """Return the arguments; raises `ConfigError` for what transformers refuses, and as the checks below."""
    optim = str(values.get("optim", ""))
    known = [one.value for one in OptimizerNames]
    if optim and optim not in known:
        near = difflib.get_close_matches(optim, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(known)}"
        raise ConfigError(f"optim: got {optim!r}, which the installed transformers does not have; {hint}")
    try:
        args = kind(**values)
    except BfpoError:
        raise
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"trainer_args: transformers refuses them ({first_line(error)}); correct them") from error
    _check_optim(args)
    _check_schedule(args)
    return args


def _check_schedule(args: TrainingArguments) -> None:
    """Raise `ConfigError` for settings that the schedule of the learning rate does not have, or lacks."""
    kind = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    given: Any = args.lr_scheduler_kwargs
    place = f"trainer_args.lr_scheduler_kwargs: {f'got {given!r}' if given else 'not set'}; lr_scheduler_type: {kind}"
    if given and kind.startswith("constant"):
        raise ConfigError(f"{place} has no settings; leave them out")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.learning_rate)
    try:
        get_scheduler(kind, optimizer, num_warmup_steps=0, num_training_steps=9, scheduler_specific_kwargs=given)
    except (TypeError, ValueError) as error:
        says = "does not take them" if given else "needs them"
        raise ConfigError(f"{place} {says} ({first_line(error)}); {'correct' if given else 'set'} them") from error


def _check_optim(args: TrainingArguments) -> None:
    """Raise `MissingExtraError` for an optimizer whose package is not installed, before data and model are read."""
    name = str(getattr(args.optim, "value", args.optim))
    if _needs_bitsandbytes(name) and importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtraError(f"optim: {name} needs bitsandbytes; install it with: pip install 'bfpo[quant]'")
    if name.endswith(("_layerwise", "lomo")):
        raise ConfigError(
            f"optim: {name} updates weights inside the backward pass, which a step has for each micro-batch; choose "
            "another optimizer"
        )
    if name.startswith(("galore", "apollo")):  # made for a model, which is not there yet
        _check_low_rank(name, args.optim_target_modules)
        return
    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
    except ImportError as error:
        raise MissingExtraError(f"optim: {name} cannot be used ({first_line(error)})") from error
    except ValueError as error:
        raise ConfigError(f"optim: {name} cannot be used ({first_line(error)})") from error


def _check_low_rank(name: str, targets: object) -> None:
    package = f"{name.partition('_')[0]}-torch"
    if importlib.util.find_spec(package.replace("-", "_")) is None:
        raise MissingExtraError(f"optim: {name} needs {package}; install it with: pip install {package}")
    if not targets:
        raise ConfigError(
            f"trainer_args.optim_target_modules: not set, and optim: {name} needs it; name modules whose weights "
            "train, such as [down_proj]"
        )


def _needs_bitsandbytes(name: str) -> bool:
    if name.startswith(("galore", "adamw_torch")):
        return False
    return name.endswith("_8bit") or name.startswith(("paged_", "lion_", "ademamix", "rmsprop_bnb"))

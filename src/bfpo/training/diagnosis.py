"""Whether a training config fits the memory and disk of a machine, and which changes would make it fit."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bfpo.config import AlignConfig, LoraConfig, SftConfig, load_config
from bfpo.core.errors import ConfigError, ModelError, SettingError
from bfpo.core.yaml_text import read_yaml
from bfpo.policy.devices import Device, find_devices, free_disk
from bfpo.policy.load import initial_config, load_tokenizer
from bfpo.policy.memory import Measured, MemoryEstimate, Plan, Sharding, divide, estimate_memory, host_bytes, measure
from bfpo.policy.skeleton import Skeleton
from bfpo.policy.source import read_config
from bfpo.training.inputs import lacking_tokens

__all__ = ["GIB", "KEPT_FREE", "Diagnosis", "examine", "fits", "fits_here", "least_processes", "load_training"]

logger = logging.getLogger(__name__)

GIB = 2**30
KEPT_FREE = 0.1
"""Share of a device's memory that must stay free, for the libraries and for fragmentation."""
MOST_PROCESSES = 4096


@dataclass(frozen=True, slots=True)
class Remedy:
    """A change of the config and the bytes that a process would need with it."""

    change: str
    total: int
    fits: bool


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The bytes that a config needs per process and on disk, and those available."""

    stage: str
    model: str
    trains: str
    plan: Plan
    reference: str
    memory: MemoryEstimate
    margin_bytes: int
    memory_source: str
    available: int | None
    checkpoint: int
    disk: int
    disk_free: int | None
    remedies: tuple[Remedy, ...]
    lacking: tuple[str, ...] = ()
    """Tokens of the tokenizer that the model's embedding lacks."""
    host: int = 0
    """Bytes of the host of the first process that the last save needs, where training runs on GPUs."""

    @property
    def memory_fits(self) -> bool | None:
        """Return whether the memory suffices; `None` if the free memory is unknown."""
        return None if self.available is None else fits(self.memory.total, self.available)

    @property
    def disk_fits(self) -> bool | None:
        """Return whether the free disk space suffices; `None` for another machine (`--memory`)."""
        return None if self.disk_free is None else self.disk <= self.disk_free

    @property
    def fits(self) -> bool:
        """Return whether memory and disk suffice, as far as they are known."""
        return self.memory_fits is not False and self.disk_fits is not False


def fits(needed: int, available: int) -> bool:
    """Return whether the needed bytes leave the share `KEPT_FREE` of the available bytes free."""
    return needed <= available * (1 - KEPT_FREE)


def fits_here(config: AlignConfig | SftConfig) -> bool:
    """Return whether one training process is estimated to fit the free memory; true where that is not known.

    That is so too for a model whose memory cannot be counted, such as one of experts, which is logged.
    """
    device = find_devices()[0]
    available = _available(device, 1)
    if config.quantize is not None or available is None:
        return True
    try:
        plan = dataclasses.replace(_plan(config), on_cpu=device.name == "cpu")
        return fits(estimate_memory(plan).total, available)
    except ModelError as error:
        logger.warning("memory: not estimated; %s", error)
        return True


def examine(
    path: Path | None,
    settings: Sequence[str],
    *,
    processes: int = 1,
    sharding: Sharding = "none",
    memory_gib: float | None = None,
    folder: str | Path = ".",
) -> Diagnosis:
    """Estimate the memory of one training process and whether it fits; loads no weights.

    The config is read as one of `bfpo sft` if it has a key that only `bfpo sft` has, else as one of `bfpo train`.
    `memory_gib`: the memory per process of another machine. `folder`: where the run will write.

    Raises `ConfigError` for an invalid config, `ModelError` for the model, also if it lacks tokens that the data hold,
    `SettingError` for the other arguments.
    """
    if memory_gib is not None and not (memory_gib > 0 and math.isfinite(memory_gib)):
        raise SettingError(f"--memory: got {memory_gib}; allowed: a finite number of GiB above 0")
    config = load_training(path, settings)
    device = find_devices()[0]
    source = device.name if memory_gib is None else "--memory"
    plan = dataclasses.replace(_plan(config), processes=processes, sharding=sharding, on_cpu=source == "cpu")
    measured = measure(plan)
    skeleton, memory = measured.skeleton, divide(measured, plan)
    available = _available(device, processes) if memory_gib is None else int(memory_gib * GIB)
    remedies: tuple[Remedy, ...] = ()
    if available is not None and not fits(memory.total, available):
        remedies = tuple(_remedies(config, plan, available, shards=source != "cpu"))
    return Diagnosis(
        stage="train" if isinstance(config, AlignConfig) else "sft",
        model=f"{config.model or 'random weights'}: {type(skeleton.causal_lm).__name__}",
        trains=str(skeleton.trainable_report),
        plan=plan,
        reference=_reference_text(config, plan),
        memory=memory,
        margin_bytes=measured.margin_bytes,
        memory_source=source,
        available=available,
        checkpoint=_checkpoint_bytes(skeleton, sharding),
        disk=_disk_bytes(config, skeleton, sharding),
        disk_free=free_disk(folder) if memory_gib is None else None,
        remedies=remedies,
        lacking=tuple(lacking_tokens(config)),
        host=host_bytes(measured, plan),
    )


def load_training(path: Path | None, settings: Sequence[str]) -> AlignConfig | SftConfig:
    """Return a config of `bfpo sft` if it has a key that only that has, else one of `bfpo train`."""
    keys = {setting.partition("=")[0].strip() for setting in settings}
    if path is not None:
        values, _ = read_yaml(path)
        keys |= set(_dotted(values)) if isinstance(values, Mapping) else set()
    sft_only = {name for name in SftConfig.model_fields if name not in AlignConfig.model_fields} | {"data.use"}
    if any(key == name or key.startswith(f"{name}.") for key in keys for name in sft_only):
        return load_config(SftConfig, path, settings)
    return load_config(AlignConfig, path, settings)


def _dotted(values: Mapping[Any, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{prefix}{key}.")


def _plan(config: AlignConfig | SftConfig) -> Plan:
    if config.quantize is not None:
        raise ConfigError(
            f"quantize: got {config.quantize}; four-bit base weights are not estimated. Leave it out: the estimate "
            "then holds except for the weights, which need less"
        )
    shared: dict[str, Any] = {
        "trainable": "all" if config.lora is not None else config.trainable,
        "lora": None if config.lora is None else config.lora.model_dump(),
        "dtype": config.dtype,
        "checkpointing": config.gradient_checkpointing,
    }
    if isinstance(config, SftConfig):
        tokens = max(config.max_tokens_per_microbatch, config.max_length)
        own: dict[str, Any] = {"tokens": min(tokens, config.max_length * _most_completions(config))}
        if config.init is not None:
            model = initial_config(config.init.config, load_tokenizer(config.init.tokenizer))
            return Plan(model, **own, **shared)
    else:
        # A pair longer than the token budget gets its own pass: one full text, packed with the other completion.
        longest = config.max_length + min(config.max_length - 1, config.max_completion_length or config.max_length)
        own = {"tokens": max(config.max_tokens_per_microbatch, longest), "swaps": _swaps(config)}
        if config.margin_model is not None:
            own["margin"] = read_config(config.margin_model)
    assert config.model is not None  # checked by the config
    return Plan(read_config(config.model, revision=config.revision), **own, **shared)


def _most_completions(config: SftConfig) -> int:
    """Return the most completions of a forward pass, whatever their tokens."""
    return min(config.completions_per_step, config.completions_per_microbatch or config.completions_per_step)


def _swaps(config: AlignConfig) -> bool:
    """Return whether a copy of the trained weights is kept; `auto` counts as a copy unless it surely precomputes.

    `auto` precomputes if the run sees every pair at least once; with a buffer that depends on the data.
    """
    if config.reference != "auto":
        return config.reference == "swap"
    return config.lora is None and not (
        config.buffer is None and config.max_steps is None and config.num_train_epochs >= 1
    )


def _reference_text(config: AlignConfig | SftConfig, plan: Plan) -> str:
    if isinstance(config, SftConfig):
        return "none"
    if config.reference != "auto":
        return config.reference
    return f"auto, counted as {'swap, which takes more than precompute' if plan.swaps else 'one that keeps no copy'}"


def _available(device: Device, processes: int) -> int | None:
    """Return the bytes available to one process: those of its GPU, or its share of the host's memory."""
    if device.free_bytes is None:
        return None
    return device.free_bytes // processes if device.name == "cpu" else device.free_bytes


def _checkpoint_bytes(skeleton: Skeleton, sharding: Sharding) -> int:
    """Return the bytes of a checkpoint: what trains, and two AdamW moments for each number of it.

    ZeRO-1 and ZeRO-2 hold what trains twice more, as they compute with it: for the engine, and to be loaded as a model.
    """
    sizes = skeleton.sizes
    computed = 2 * sizes.computed_bytes if sharding == "zero2" else 0
    return sizes.num_trainable * (3 * sizes.held_bytes + computed)


def _disk_bytes(config: AlignConfig | SftConfig, skeleton: Skeleton, sharding: Sharding) -> int:
    """Return the bytes of the kept checkpoints, of one more while it is written, and of the final model."""
    sizes = skeleton.sizes
    model = sizes.num_frozen * sizes.computed_bytes + sizes.num_trainable * sizes.held_bytes
    return (1 + (config.save_total_limit or 1)) * _checkpoint_bytes(skeleton, sharding) + model


def least_processes(
    measured: Measured, plan: Plan, available: int, most: int = MOST_PROCESSES
) -> tuple[int, MemoryEstimate] | None:
    """Return the smallest power of two of FSDP processes that fits, with its estimate; `None` if above `most`.

    `measured` must be that of the plan with sharded weights.
    """
    processes = 2
    while processes <= most:
        memory = divide(measured, dataclasses.replace(plan, sharding="fsdp", processes=processes))
        if fits(memory.total, available):
            return processes, memory
        processes *= 2
    return None


def _remedies(config: AlignConfig | SftConfig, plan: Plan, available: int, *, shards: bool) -> Iterator[Remedy]:
    """Yield single changes, then all together, then sharding (on GPUs only), each with its estimate."""
    changes = {}
    together: dict[str, Any] = {}
    for change, values in _changes(config, plan):
        try:
            remedy = _remedy(change, dataclasses.replace(plan, **values), available)
        except SettingError:  # a model that cannot recompute its activations
            continue
        yield remedy
        changes[change] = values
        together |= values
    if len(changes) > 1:
        plan = dataclasses.replace(plan, **together)
        yield _remedy("all of these", plan, available)
    if not shards:
        return
    plan = dataclasses.replace(plan, sharding="fsdp")
    sharded = least_processes(measure(plan), plan, available)
    if sharded is not None:
        processes, memory = sharded
        options = f"--sharding fsdp --processes {processes}"
        yield Remedy(f"{options}, with all of these" if changes else options, memory.total, True)


def _remedy(change: str, plan: Plan, available: int) -> Remedy:
    memory = estimate_memory(plan)
    return Remedy(change, memory.total, fits(memory.total, available))


def _changes(config: AlignConfig | SftConfig, plan: Plan) -> Iterator[tuple[str, dict[str, Any]]]:
    # No row needs more: a pair's prompt is packed once.
    least = config.max_length * (2 if isinstance(config, AlignConfig) else 1)
    if plan.tokens > least:
        yield f"max_tokens_per_microbatch: {least}", {"tokens": least}
    if not plan.checkpointing:
        yield "gradient_checkpointing: selective", {"checkpointing": "selective"}
    if plan.checkpointing is not True:
        yield "gradient_checkpointing: true", {"checkpointing": True}
    if plan.dtype != "bfloat16":
        yield "dtype: bfloat16", {"dtype": "bfloat16"}
    if plan.swaps:
        yield "reference: precompute", {"swaps": False}
    if plan.lora is None and not (isinstance(config, SftConfig) and config.init is not None):
        lora = LoraConfig()
        yield (
            f"lora: {{r: {lora.r}}} in place of trainable",
            {"lora": lora.model_dump(), "trainable": "all", "swaps": False},
        )

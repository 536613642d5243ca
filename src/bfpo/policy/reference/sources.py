"""Log-probs of the frozen reference: weights swapped in place, adapter off, or computed beforehand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from bfpo.core.errors import ModelError, SettingError
from bfpo.policy.logps import evaluating, sequence_logps

__all__ = [
    "AdapterOff",
    "Precomputed",
    "Reference",
    "ReferenceName",
    "SwappedWeights",
    "choose_reference",
    "make_reference",
    "own_logps",
]

ReferenceName = Literal["auto", "precompute", "swap", "adapter_off"]


class Reference(Protocol):
    """Anything that gives the reference's log-probs of a batch.

    `logps(model, batch)` returns (N,) float64 sums over completion tokens in nats, without gradient, and leaves the
    model as it found it. `model` is the policy, perhaps wrapped for data parallelism.
    """

    def logps(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Return the reference's summed log-probs, (N,) float64."""
        ...


class SwappedWeights:
    """The reference is the policy with its trainable weights as they were when this object was made.

    Only trainable parameters are copied, once, so it never takes the memory of a second model. Make it before training
    and before a checkpoint is loaded. Swapping exchanges values in place and restores the same bits, also after an
    exception. Once the model is sharded by FSDP2, each process keeps only its shards of the initial values; they are
    cut from the first process' values, so those of the others may be empty. All processes must then call `logps`
    together.

    Raises `ModelError` if nothing trains, if the model given later has other trainable parameters, and for weights that
    are partitioned in a way that cannot be swapped (DeepSpeed ZeRO-3, FSDP version 1).
    """

    def __init__(self, model: nn.Module) -> None:
        _reshard(model)
        trainable = _trainable(model)
        if not trainable:
            raise ModelError("reference: the model has no trainable parameter, so there is nothing to swap")
        self._shapes = [parameter.shape for parameter in trainable]
        self._initial = [_local(parameter).clone() for parameter in trainable]
        self._whole = not any(_is_sharded(parameter) for parameter in trainable)

    def logps(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Return the summed log-probs, (N,) float64, of the initial weights."""
        _reshard(model)
        trainable = _trainable(model)
        if [parameter.shape for parameter in trainable] != self._shapes:
            raise ModelError(
                f"reference: {len(trainable)} parameters train now, {len(self._shapes)} did when the reference was "
                "made; choose what trains before making the reference"
            )
        with evaluating(model):
            if self._whole and any(_is_sharded(parameter) for parameter in trainable):
                self._shard(trainable)
            exchanged: list[tuple[nn.Parameter, Tensor]] = []
            try:
                for parameter, initial in zip(trainable, self._initial, strict=True):
                    _exchange(parameter, initial)
                    exchanged.append((parameter, initial))
                return sequence_logps(model, batch).logps
            finally:
                for parameter, initial in exchanged:
                    _exchange(parameter, initial)
                _reshard(model)

    def _shard(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace each whole value by the process' own shard, one after the other."""
        from torch.distributed.tensor import distribute_tensor

        for i, parameter in enumerate(parameters):
            if _is_sharded(parameter):
                sharded: Any = parameter
                device = _local(parameter).device
                value = self._initial[i].to(device, parameter.dtype)
                shard: Any = distribute_tensor(value, sharded.device_mesh, sharded.placements)
                # a copy: the shard may be a view of the whole, or on the mesh's device while the weights are not
                self._initial[i] = shard.to_local().to(device, copy=True)
        self._whole = False


def _exchange(parameter: nn.Parameter, held: Tensor) -> None:
    """Exchange the values of a parameter and a tensor in place; a second copy exists of this parameter alone."""
    local = _local(parameter)
    current = local.clone()
    local.copy_(held)
    held.copy_(current)


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if any(hasattr(parameter, "ds_id") for parameter in trainable):
        raise ModelError(
            "reference swap: DeepSpeed ZeRO-3 has partitioned the weights, so they cannot be swapped; train an "
            "adapter (reference adapter_off), fill the cache with bfpo reference first (reference precompute), or "
            "shard with FSDP2"
        )
    return trainable


def _is_sharded(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "placements")


def _local(parameter: nn.Parameter) -> Tensor:
    """Return the process' own part of a parameter, the same memory.

    It is looked up at each use: the first forward pass of FSDP2 may move it.
    """
    value: Any = parameter.data  # not detach(): what autograd saved before a swap is valid after the swap back
    local: Tensor = value.to_local() if _is_sharded(parameter) else value
    return local


def _reshard(model: nn.Module) -> None:
    """Free the weights that FSDP2 has gathered: some stay whole after a forward pass, beside their shards.

    Reads of the model's parameters would return them, and writes to the shards would not change them.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    for module in model.modules():
        if isinstance(module, FullyShardedDataParallel):
            raise ModelError("reference swap: FSDP version 1 cannot swap weights; set fsdp_version: 2")
        if isinstance(module, FSDPModule):
            module.reshard()


class AdapterOff:
    """The reference is the policy with its PEFT adapter switched off.

    Raises `ModelError` for a model without an adapter.
    """

    def __init__(self, model: nn.Module) -> None:
        self._find_adapter(model)

    @staticmethod
    def _find_adapter(model: nn.Module) -> Any:
        inner: Any = model
        while isinstance(getattr(inner, "module", None), nn.Module):
            inner = inner.module
        if not hasattr(inner, "disable_adapter"):
            raise ModelError(
                f"reference adapter_off: {type(inner).__name__} has no adapter; set lora, or use reference swap or "
                "precompute"
            )
        return inner

    def logps(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Return the summed log-probs, (N,) float64, of the base model."""
        peft_model = self._find_adapter(model)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        with evaluating(model), peft_model.disable_adapter():
            # peft freezes an adapter that is off. FSDP2 decides in its first forward pass, by what trains then, in
            # which dtype it reduces gradients; that pass may be this one.
            for parameter in trainable:
                parameter.requires_grad_(True)
            return sequence_logps(model, batch).logps


class Precomputed:
    """The reference is a column of the batch: `ref_logps` (2P,) float64, put there by one pass before training.

    Raises `ModelError` for a batch without it.
    """

    def logps(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Return the batch's own `ref_logps`, (N,) float64."""
        ref_logps: Tensor | None = batch.get("ref_logps")
        if ref_logps is None:
            raise ModelError(
                "reference precompute: the batch has no ref_logps; run the reference pass over the pairs first, or use "
                "reference swap"
            )
        return ref_logps.double()


def own_logps(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Return the model's own summed log-probs, (N,) float64, in evaluation mode and with any adapter off."""
    if hasattr(model, "disable_adapter"):
        return AdapterOff(model).logps(model, batch)
    with evaluating(model):
        return sequence_logps(model, batch).logps


def choose_reference(
    requested: ReferenceName, *, num_to_compute: int, num_pairs_seen: int, has_adapter: bool, sharded: bool = False
) -> ReferenceName:
    """Resolve `auto`: precompute if that costs no more forward passes than the reference inside the steps.

    The pass beforehand visits each of `num_to_compute` once, the distinct pairs that are not in the cache; inside the
    steps the reference runs for each of the `num_pairs_seen` that the whole training visits, repeats counted. So one
    full epoch or more is precomputed, part of one only if the cache has the rest.

    `sharded`: FSDP or DeepSpeed will shard the model when training begins. Until then it is on the CPU, where a pass
    would take days, so it precomputes only if the cache has all rows.

    Raises `SettingError` for an unknown name, for `adapter_off` without an adapter, and for `precompute` of rows that
    the cache lacks if the model will be sharded.
    """
    if requested not in get_args(ReferenceName):
        raise SettingError(f"reference: got {requested!r}; allowed: {', '.join(get_args(ReferenceName))}")
    if requested == "adapter_off" and not has_adapter:
        raise SettingError("reference: adapter_off needs lora; use swap, precompute or auto")
    inside_steps: ReferenceName = "adapter_off" if has_adapter else "swap"
    if requested == "precompute" and sharded and num_to_compute:
        raise SettingError(
            f"reference: precompute lacks {num_to_compute} rows, and until FSDP or DeepSpeed shards the model it is "
            "on the CPU, where they would take too long; fill the cache beforehand with bfpo reference --config FILE "
            f"(with FSDP2, launched as this run is), or use auto or {inside_steps}"
        )
    if requested != "auto":
        return requested
    if num_to_compute <= (0 if sharded else num_pairs_seen):
        return "precompute"
    return inside_steps


def make_reference(name: ReferenceName, model: nn.Module) -> Reference:
    """Return the reference of that name for a policy at its start.

    Swapping the weights of an adapter gives the adapter's start, which changes nothing of the base model, so it is
    right for adapters too. Raises `SettingError` for `auto` (resolve it first) and unknown names.
    """
    if name == "swap":
        return SwappedWeights(model)
    if name == "adapter_off":
        return AdapterOff(model)
    if name == "precompute":
        return Precomputed()
    raise SettingError(f"reference: got {name!r}; allowed here: swap, adapter_off, precompute")

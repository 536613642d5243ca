"""Sharding by FSDP or DeepSpeed, in both stages of training."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import compare_versions, fsdp2_prepare_model, is_torch_version
from torch import Tensor, nn
from transformers import Trainer

from bfpo.core.errors import SettingError

__all__ = ["is_sharded", "prepare_sharding", "shard_now", "whole_state"]


def is_sharded(trainer: Trainer) -> bool:
    """Return whether FSDP or DeepSpeed shards the trainer's model, which is on the CPU until then."""
    return bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)


def prepare_sharding(accelerator: Accelerator, model: nn.Module) -> None:
    """Keep float32 log-probs float32 at the output of an FSDP2 model, and sum gradients in float32; else do nothing.

    For bfloat16, accelerate lets FSDP2 cast the outputs of each sharded module, log-probs included, and sum the
    gradients of float32 masters in bfloat16.
    Raises `SettingError` for FSDP version 1, whose flat parameters the reference cannot swap, for frozen weights of
    another dtype than the trained ones in a torch whose FSDP2 wants one for all, and for versions of accelerate
    and deepspeed that do not add up the gradients of micro-batches.
    """
    _check_deepspeed(getattr(accelerator.state, "deepspeed_plugin", None))
    plugin: Any = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        return
    if plugin.fsdp_version != 2:
        raise SettingError(f"fsdp_version: got {plugin.fsdp_version}; allowed: 2 (see docs/scaling.md)")
    _check_dtypes(model)
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = dataclasses.replace(
            plugin.mixed_precision_policy, output_dtype=None, reduce_dtype=torch.float32
        )


def _check_deepspeed(plugin: Any) -> None:
    """Raise `SettingError` for versions that do not add up the gradients of the micro-batches of a step.

    Source: huggingface/accelerate pull request 3630, deepspeedai/DeepSpeed pull request 7981.
    """
    if plugin is None:
        return
    if compare_versions("accelerate", "<", "1.8.0"):
        raise SettingError(
            "DeepSpeed: an accelerate before 1.8 updates the weights after every micro-batch of a step; update it to "
            "1.8 or newer"
        )
    offloads = plugin.offload_optimizer_device not in (None, "none") and plugin.zero_stage != 3
    if offloads and compare_versions("deepspeed", "<", "0.19.0"):
        raise SettingError(
            f"offload_optimizer_device: got {plugin.offload_optimizer_device} with ZeRO-{plugin.zero_stage} and a "
            "deepspeed before 0.19, which loses the gradients of all micro-batches of a step but the last; update "
            "deepspeed, or set offload_optimizer_device: none"
        )


def _check_dtypes(model: nn.Module) -> None:
    frozen, trained = (
        {
            str(p.dtype).removeprefix("torch.")
            for p in model.parameters()
            if p.requires_grad == trains and p.is_floating_point()
        }
        for trains in (False, True)
    )
    if not frozen or len(frozen | trained) == 1:
        return
    # Before 1.13 accelerate makes all of them float32.
    if is_torch_version("<", "2.8") and compare_versions("accelerate", ">=", "1.13"):
        raise SettingError(
            f"torch {torch.__version__}: its FSDP2 cannot shard frozen weights in {', '.join(sorted(frozen))} together "
            f"with trained ones in {', '.join(sorted(trained))}; update torch to 2.8 or newer, or set dtype: float32"
        )


def shard_now(trainer: Trainer) -> None:
    """Shard the trainer's model by FSDP2, in place, as accelerate does when a training begins.

    Every process must call this. The first process' weights count where the others are loaded empty.
    """
    accelerator = trainer.accelerator
    accelerator.state.fsdp_plugin.set_auto_wrap_policy(trainer.model)
    fsdp2_prepare_model(accelerator, trainer.model)


def whole_state(trainer: Trainer) -> dict[str, Tensor] | None:
    """Return the whole weights of a sharded model on the CPU, under the names of the unwrapped model; else `None`.

    Every process must call this. All but the first may get an empty dict.
    """
    if not is_sharded(trainer):
        return None
    state: dict[str, Tensor] = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return state

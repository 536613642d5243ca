"""Activations that the backward pass computes again instead of keeping them: all within a block, or the cheap ones."""

from __future__ import annotations

from functools import cache, partial
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

__all__ = ["Recompute", "set_recompute"]

Recompute = bool | Literal["selective"]
"""`True`: all within a block, of which its input alone is kept. "selective": all but the results of products with
weights and of attention, which take almost all of the time of a block."""

# A product of two activations, such as the scores of attention written out, is as large as what it saves: not kept.
_KEPT = ("mm", "addmm", "_grouped_mm")
_ATTENTION = (
    *("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu"),
    *("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention"),
    "_scaled_dot_product_fused_attention_overrideable",
)
_COMPILED = ("flex_attention", "inductor_compiled_code")  # operators that hold others


def set_recompute(model: Any, wanted: Recompute, *, preserve_rng_state: bool = True) -> None:
    """Switch the recomputation of a model of transformers, under the name that its version has for it.

    `preserve_rng_state`: whether dropout draws the same numbers again.
    """
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if wanted:
        settings: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": preserve_rng_state}
        if wanted == "selective":
            settings["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
        getattr(model, f"{name}_checkpointing_enable")(settings)
    elif getattr(model, f"is_{name}_checkpointing"):
        getattr(model, f"{name}_checkpointing_disable")()


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = operator in _kept() or getattr(operator, "namespace", "") == "flash_attn"
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


@cache
def _kept() -> frozenset[Any]:
    """Return the operators of this version of torch whose results are kept."""
    found = {getattr(torch.ops.aten, name).default for name in (*_KEPT, *_ATTENTION) if hasattr(torch.ops.aten, name)}
    return frozenset({*found, *(op for name in _COMPILED if (op := getattr(torch.ops.higher_order, name, None)))})

"""LoRA adapters in place of training the weights themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from bfpo.core.errors import ModelError

__all__ = ["add_lora"]


def add_lora(model: Any, lora: Mapping[str, Any], *, seed: int = 0) -> Any:
    """Return the model wrapped by peft with LoRA adapters that `seed` alone decides; `lora`: keywords of `LoraConfig`.

    Raises `ModelError` for settings that peft does not know, and for an adapter on one of two modules that share a
    weight.
    """
    from peft import LoraConfig, get_peft_model

    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora))
    except (TypeError, ValueError) as error:
        raise ModelError(f"lora: {dict(lora)!r} cannot be used: {error}") from error
    _check_shared_weight(adapted.get_base_model())
    return adapted


def _check_shared_weight(base: Any) -> None:
    """Refuse an adapter on a weight that embedding and head share: merged into it, it would change the other too."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    ends = [base.get_input_embeddings(), base.get_output_embeddings()]
    weights = [getattr(end, "weight", None) for end in ends]
    if weights[0] is weights[1] and any(isinstance(end, BaseTunerLayer) for end in ends):
        raise ModelError(
            "lora: target_modules names the embedding or the output head, which are one weight in this model; an "
            "adapter on one of them cannot be merged without changing the other: leave both out"
        )

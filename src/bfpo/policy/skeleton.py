"""A model without its weights: names, shapes and dtypes are there, no memory is taken, only its config is read.

Tensors are fake ones (`torch.compiler` documents them): operations on them give shapes and dtypes as on the CPU,
autocast included, which plain meta tensors leave out.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AutoModelForCausalLM

from bfpo.core.errors import ModelError, first_line
from bfpo.policy.load import (
    DTYPES,
    TrainableReport,
    disable_dropout,
    set_trainable,
    trainable_report,
)
from bfpo.policy.logps import unwrap_causal_lm

__all__ = ["Sizes", "Skeleton", "make_skeleton"]

COUNTED_ATTENTION = "bfpo_counted"


@dataclass(frozen=True, slots=True)
class Sizes:
    """Numbers of parameters, and bytes of one number.

    `num_in_layer` is the largest block's, `num_outside` that outside the blocks (embeddings, head, last norm).
    `computed_bytes` is the size of a number in the computation, also of a frozen weight; `held_bytes` that of a
    trainable weight, its gradient and its optimizer state. `num_adapted`: of the frozen weights with an adapter.
    """

    num_frozen: int
    num_trainable: int
    num_adapted: int
    num_in_layer: int
    num_outside: int
    buffer_bytes: int
    computed_bytes: int
    held_bytes: int


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A model of fake tensors, the mode in which they can be used, and what of it trains."""

    model: Any
    mode: FakeTensorMode
    dtype: torch.dtype
    trainable_report: TrainableReport

    @property
    def causal_lm(self) -> Any:
        """Return the causal LM inside a PEFT wrapper."""
        return unwrap_causal_lm(self.model)

    @property
    def head_trains(self) -> bool:
        """Return whether the output head, or an adapter on it, trains; a tied head trains with the embedding."""
        return any(parameter.requires_grad for parameter in self.causal_lm.get_output_embeddings().parameters())

    @property
    def sizes(self) -> Sizes:
        """Count the parameters."""
        parameters = list(self.model.parameters())
        trainable = [parameter for parameter in parameters if parameter.requires_grad]
        blocks = [m for m in self.model.modules() if type(m).__name__ in _block_names(self.causal_lm)]
        inside = [sum(parameter.numel() for parameter in block.parameters()) for block in blocks] or [0]
        total = sum(parameter.numel() for parameter in parameters)
        num_trainable = sum(parameter.numel() for parameter in trainable)
        return Sizes(
            num_frozen=total - num_trainable,
            num_trainable=num_trainable,
            num_adapted=sum(m.base_layer.weight.numel() for m in self.model.modules() if hasattr(m, "base_layer")),
            num_in_layer=max(inside),
            num_outside=total - sum(inside),
            buffer_bytes=sum(buffer.nbytes for buffer in self.model.buffers()),
            computed_bytes=self.dtype.itemsize,
            held_bytes=_held_dtype(self.dtype).itemsize,
        )


def _block_names(model: Any) -> set[str]:
    """Return the class names of the blocks that sharding wraps one by one."""
    return set(getattr(model, "_no_split_modules", None) or ())


def _held_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.bfloat16 else dtype


def make_skeleton(
    config: Any,
    *,
    trainable: Sequence[str] | Literal["all"] = "all",
    lora: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    masters: bool = True,
) -> Skeleton:
    """Make the causal LM of a transformers config without memory, with what trains chosen as `load_policy` does it.

    `dtype`: "float32" or "float64" for everything, or "bfloat16": frozen weights in bfloat16 and, with `masters`,
    trainable ones in float32 (without, in bfloat16 too, as sharding passes them to the computation).

    Raises `ModelError` for another dtype, a config of no causal LM, and as `load_policy` does for what trains.
    """
    if dtype not in ("float32", "float64", "bfloat16"):
        raise ModelError(f"dtype: got {dtype!r}; memory is counted for float32, float64 and bfloat16")
    computed = DTYPES[dtype]
    assert isinstance(computed, torch.dtype)
    AttentionInterface.register(COUNTED_ATTENTION, _counted_attention)
    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(
                _without_data_dependence(config),
                dtype=_held_dtype(computed),
                attn_implementation=COUNTED_ATTENTION,
                trust_remote_code=False,
            )
            model.tie_weights()  # older versions of transformers leave that to loading
        except Exception as error:  # unknown architectures and odd configs have their own classes
            if isinstance(error, KeyError) and error.args == (COUNTED_ATTENTION,):
                name = type(config).__name__
                raise ModelError(f"model: the memory of {name} cannot be counted: it has its own attention") from error
            raise ModelError(f"model: {type(config).__name__} gives no causal LM ({first_line(error)})") from error
        with warnings.catch_warnings():  # peft reads a name that newer transformers has replaced
            warnings.simplefilter("ignore", FutureWarning)
            model = set_trainable(model, trainable, lora)
    disable_dropout(model)
    for parameter in model.parameters():
        if not (masters and parameter.requires_grad):
            parameter.data = parameter.data.to(computed)
    mode = FakeTensorMode()
    with mode:
        _make_fake(model)
    model.train()
    return Skeleton(model, mode, computed, trainable_report(model))


def _make_fake(model: nn.Module) -> None:
    """Put fake tensors on the CPU in place of meta ones; what was tied stays tied."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in made:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                made[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            setattr(module, name, made[id(parameter)])
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def _without_data_dependence(config: Any) -> Any:
    """Return the config with rotary positions that do not look at the tokens; they take the same memory."""
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict) and rope.get("rope_type") in ("dynamic", "longrope"):
        config = copy.deepcopy(config)
        config.rope_parameters = {"rope_type": "default", "rope_theta": rope.get("rope_theta", 10000.0)}
    return config


class _FusedAttention(torch.autograd.Function):
    """Takes the memory of a fused attention kernel and computes nothing: q, k, v, the output and the log-sum-exp."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, length, _ = query.shape
        output = query.new_empty(batch, length, heads, value.shape[-1])
        ctx.save_for_backward(query, key, value, output, query.new_empty(batch, heads, length, dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _counted_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **settings: Any
) -> tuple[Tensor, None]:
    return _FusedAttention.apply(query, key, value), None  # type: ignore[no-untyped-call]

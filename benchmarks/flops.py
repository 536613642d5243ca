"""Floating-point operations: what a step needs, by formula, and what one did, by torch's counter."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from benchmarks.workload import ModelShape, Trains

__all__ = ["flop_counter", "needed_flops", "useful_tokens"]

Lengths = tuple[int, int, int]


def useful_tokens(lengths: Iterable[Lengths]) -> int:
    """Return the tokens that both trainers are credited with: prompt, chosen and rejected of each pair, once each."""
    return sum(map(sum, lengths))


def needed_flops(
    shape: ModelShape, lengths: Iterable[Lengths], *, causal: bool = True, trains: Trains = "down_proj"
) -> int:
    """Return the operations that a step on pairs of (prompt, chosen, rejected) tokens cannot do without.

    Each token passes the layers once; the head sees completion positions only; activation gradients go down to the
    first layer whose weights train, and only what trains gets a weight gradient; the reference is known. With LoRA the
    adapters, around a hundredth of the rest, are left out. A multiply-add counts as 2; only matrix
    products count. `causal=False` counts attention over all keys, seen or not, as a kernel with a dense mask does.
    A rejected completion of no tokens makes it one sequence, as in `bfpo sft`.
    """
    total = 0
    linear = shape.layer_weights()
    # The first layer's gradient stops at its down_proj; with other weights it passes the layer's attention and MLP.
    backward_layers = shape.layers - 1 if trains == "down_proj" else shape.layers
    trained = {"down_proj": shape.hidden * shape.intermediate, "all": linear, "lora": 0, "qlora": 0}[trains]
    trained_head = 2 * shape.hidden * shape.vocabulary if trains == "all" else 0
    for prompt, chosen, rejected in lengths:
        tokens, predicted = prompt + chosen + rejected, chosen + rejected
        attention = 4 * shape.hidden * _seen_keys(prompt, chosen, rejected, causal=causal)
        forward = shape.layers * (2 * linear * tokens + attention)
        # Attention's gradient takes twice its forward.
        activation_gradients = backward_layers * (2 * linear * tokens + 2 * attention)
        weight_gradients = shape.layers * 2 * trained * tokens
        head = (4 * shape.hidden * shape.vocabulary + trained_head) * predicted
        total += forward + activation_gradients + weight_gradients + head
    return total


def _seen_keys(prompt: int, chosen: int, rejected: int, *, causal: bool) -> int:
    """Return the number of (query, key) places in one layer, the prompt's counted once."""
    if not causal:
        return (prompt + chosen) ** 2 + (rejected * (prompt + rejected) if rejected else 0)
    first = prompt + chosen
    return first * (first + 1) // 2 + rejected * prompt + rejected * (rejected + 1) // 2


def flop_counter() -> Any:
    """Return torch's counter, to be entered as a context, with the CPU's attention kernel added to what it knows.

    A kernel told that attention is causal is counted as skipping what lies above the diagonal.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode, flop_registry, register_flop_formula

    for name, function in (
        ("_scaled_dot_product_flash_attention_for_cpu", _attention_forward),
        ("_scaled_dot_product_flash_attention_for_cpu_backward", _attention_backward),
    ):
        kernel = getattr(torch.ops.aten, name)
        if kernel not in flop_registry:
            register_flop_formula(kernel, get_raw=True)(function)
    return FlopCounterMode(display=False)


def _attention_forward(
    query: Any, key: Any, value: Any, dropout: float = 0.0, is_causal: bool = False, **_kwargs: Any
) -> int:
    return 2 * _product(query, key, is_causal)


def _attention_backward(
    _grad: Any,
    query: Any,
    key: Any,
    _value: Any,
    _out: Any,
    _logsumexp: Any,
    _dropout: float = 0.0,
    is_causal: bool = False,
    **_kwargs: Any,
) -> int:
    return 5 * _product(query, key, is_causal)  # the scores again, then four gradients


def _product(query: Any, key: Any, is_causal: bool) -> int:
    batch, heads, num_queries, width = query.shape
    num_keys = key.shape[-2]
    places = num_queries * (num_queries + 1) // 2 if is_causal else num_queries * num_keys
    return int(2 * math.prod((batch, heads, width)) * places)

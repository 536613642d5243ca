"""Attention over packed rows: a rejected token sees its prompt and the rejected tokens before it, not the chosen ones.

A row `[prompt|chosen|rejected]*` is 2P problems of plain causal attention: the tokens of `[prompt|chosen]` over
themselves, and the rejected ones over `[prompt|rejected]`, aligned at the last query and the last key. Three kernels
solve them: torch's own one problem at a time, a variable-length flash attention in one call, flex attention by a mask.

Axes: T tokens of the row; A heads; B key heads, fewer than A where groups of heads share them; D size of a head;
Q queries and K keys of one problem.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bfpo.core.errors import ModelError
from bfpo.data.pack import CHOSEN, REJECTED, PackedLayout

__all__ = ["LAYOUT", "PREFIX", "UnknownExtraError", "packed_attention", "register_packed", "varlen_attention"]

LAYOUT = "pair_layout"
"""The keyword argument by which a packed row's layout travels through the model to its attention."""

PREFIX = "bfpo_packed_"
# Arguments of transformers' attention functions that have no effect here.
_HARMLESS = {
    *("position_ids", "position_embeddings", "cache_position", "use_cache", "past_key_values"),
    *("output_attentions", "output_hidden_states", "output_router_logits", "return_dict"),
}

Attention = Callable[..., tuple[Tensor, Any]]


class UnknownExtraError(ModelError):
    """An attention with an argument that packed rows do not support, such as a bias or sinks."""


def register_packed(original: str) -> str:
    """Register packed attention on top of the attention named `original`, and return its name.

    With a layout among its keyword arguments it is `packed_attention`; without, the original one, so that a model with
    this name generates and evaluates as before.
    """
    if original.startswith(PREFIX):
        return original
    name = PREFIX + original
    AttentionInterface.register(name, partial(_packed_or, original))
    masks = ALL_MASK_ATTENTION_FUNCTIONS
    if original in masks:
        AttentionMaskInterface.register(name, masks[original])
    return name


def _packed_or(
    original: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Any]:
    layout = kwargs.pop(LAYOUT, None)
    if layout is not None:
        return packed_attention(module, query, key, value, layout, **kwargs)
    if original in ALL_ATTENTION_FUNCTIONS:
        attend: Attention = ALL_ATTENTION_FUNCTIONS[original]
    else:  # "eager": defined in each model's file, in no table
        attend = vars(sys.modules[type(module).__module__])["eager_attention_forward"]
    return attend(module, query, key, value, attention_mask, **kwargs)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PackedLayout,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **extras: Any,
) -> tuple[Tensor, None]:
    """Return the attention output of a packed row, (1, T, heads, d).

    `query` (1, heads, T, d); `key`, `value` (1, key heads, T, d), with fewer heads where groups share them.
    `sliding_window`: a token sees this many, itself included. `softcap`: bound of the scores (Gemma 2). On a GPU it
    runs through a variable-length flash attention if one is installed and supports the dtype, else flex attention.

    Raises `UnknownExtraError` for any other argument.
    """
    if extras.pop("is_causal", True) is False:
        raise UnknownExtraError(f"attention of {type(module).__name__} is not causal")
    unknown = sorted(name for name, extra in extras.items() if extra is not None and name not in _HARMLESS)
    if unknown:
        raise UnknownExtraError(f"attention of {type(module).__name__} is given {', '.join(unknown)}")
    layout.windows.add(sliding_window)  # read by `bfpo.policy.probe`
    window = sliding_window if sliding_window is not None and sliding_window < layout.longest_text else None
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    if query.is_cuda and dropout == 0.0 and not layout.by_segment:
        flash = _flash_varlen()
        if flash is not None and query.dtype in (torch.float16, torch.bfloat16) and softcap is None:
            return varlen_attention(flash, query, key, value, layout, scaling=scaling, window=window), None
        if query.dtype != torch.float64:
            return _flex(query, key, value, layout, scaling=scaling, window=window, softcap=softcap), None
    attend = _sdpa if softcap is None else partial(_explicit, softcap=softcap)
    return _by_segment(attend, query, key, value, layout, scaling=scaling, dropout=dropout, window=window), None


# By segment: two problems per pair, through torch's own attention. Exact in every dtype.


def _by_segment(
    attend: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PackedLayout,
    *,
    scaling: float,
    dropout: float,
    window: int | None,
) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    # One split of each tensor: the gradient of a slice would be a tensor of the whole row, for every segment.
    sizes = [size for segment in layout for size in (segment.num_prompt + segment.num_chosen, segment.num_rejected)]
    queries, keys, values = (torch.split(tensor, sizes, dim=2) for tensor in (query, key, value))
    outputs = []
    for number, segment in enumerate(layout):
        before, after = 2 * number, 2 * number + 1  # the places of [prompt|chosen] and [rejected] among the pieces
        key_1AKD, value_1AKD = (
            torch.cat([pieces[before][:, :, : segment.num_prompt], pieces[after]], dim=2) for pieces in (keys, values)
        )
        for query_1AQD, *seen in (
            (queries[before], keys[before], values[before]),
            (queries[after], key_1AKD, value_1AKD),
        ):
            num_queries, num_keys = query_1AQD.shape[2], seen[0].shape[2]
            if num_queries == 0:  # an unpaired answer has no rejected tokens
                continue
            mask_QK = None  # plain causal attention, for which torch has faster kernels than for a mask
            if num_queries != num_keys or window is not None or attend is not _sdpa:
                make = partial(_mask, num_queries, num_keys, window, query.device)
                mask_QK = layout.keep(f"mask {num_queries} {num_keys} {window}", query.device, make)
            outputs.append(attend(query_1AQD, *seen, mask_QK, scaling=scaling, dropout=dropout))
    return torch.cat(outputs, 2).transpose(1, 2)


def _mask(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor:
    """Return (Q, K) bool, True where seen: causal with the last query at the last key."""
    seen_QK = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(num_keys - num_queries)
    return seen_QK if window is None else seen_QK.triu(num_keys - num_queries - window + 1)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scaling: float, dropout: float) -> Tensor:
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling
    )


def _explicit(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *, scaling: float, dropout: float, softcap: float
) -> Tensor:
    """Attention with soft-capped scores, `softcap * tanh(scores / softcap)`, which torch does not offer."""
    scores_1AQK = softcap * torch.tanh(query @ key.transpose(2, 3) * (scaling / softcap))
    scores_1AQK = scores_1AQK.masked_fill(~mask, float("-inf"))
    accumulate = torch.float64 if query.dtype == torch.float64 else torch.float32
    probabilities_1AQK = torch.softmax(scores_1AQK, -1, dtype=accumulate).to(query.dtype)
    return F.dropout(probabilities_1AQK, dropout) @ value


# On a GPU


def varlen_attention(
    flash: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PackedLayout,
    *,
    scaling: float,
    window: int | None,
) -> Tensor:
    """Return the attention of a packed row, (1, T, heads, d), by one call of a variable-length flash attention.

    `flash` takes what `flash_attn_varlen_func` of the package flash-attn takes.
    """
    index = layout.varlen(query.device)
    query_TAD = query[0].transpose(0, 1)  # already in the order of the 2P problems
    # Each prompt's keys are used twice: in place before the chosen tokens, and before the rejected ones.
    key_KBD, value_KBD = (tensor[0].transpose(0, 1).index_select(0, index.keys) for tensor in (key, value))
    output_TAD: Tensor = flash(
        query_TAD,
        key_KBD,
        value_KBD,
        index.query_starts,
        index.key_starts,
        index.longest_query,
        index.longest_key,
        softmax_scale=scaling,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),  # to the left, to the right; -1: no bound
    )
    return output_TAD[None]


@cache
def _flash_varlen() -> Callable[..., Any] | None:
    if importlib.util.find_spec("flash_attn") is None:
        return None
    from flash_attn import flash_attn_varlen_func

    found: Callable[..., Any] = flash_attn_varlen_func
    return found


@cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=True)
    return compiled


def _flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PackedLayout,
    *,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    attend: Any = _compiled_flex() if query.is_cuda else flex_attention
    num_tokens = layout.num_tokens
    mask = layout.keep(
        f"flex {window}",
        query.device,
        lambda: create_block_mask(
            _seen(layout, window, query.device), None, None, num_tokens, num_tokens, device=query.device
        ),
    )
    output_1ATD: Tensor = attend(
        query,
        key,
        value,
        score_mod=None if softcap is None else partial(_cap, softcap),
        block_mask=mask,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output_1ATD.transpose(1, 2)


def _seen(layout: PackedLayout, window: int | None, device: torch.device) -> Callable[..., Tensor]:
    """Return the mask in the form of flex attention: whether the query at place q of the row sees the key at k."""
    pair_T, part_T, position_T = layout.roles(device)

    def seen(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        visible = (pair_T[q] == pair_T[k]) & (k <= q) & ~((part_T[q] == REJECTED) & (part_T[k] == CHOSEN))
        # By position, not by index: the rejected completion continues from the prompt, past the chosen one.
        return visible if window is None else visible & (position_T[q] - position_T[k] < window)

    return seen


def _cap(softcap: float, score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return softcap * torch.tanh(score / softcap)

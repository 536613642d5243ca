"""Attention over packed rows: a rejected token sees its prompt and the rejected tokens before it, not the chosen ones.

A row `[prompt|chosen|rejected]*` is 2P problems of plain causal attention: the tokens of `[prompt|chosen]` over
themselves, and the rejected ones over `[prompt|rejected]`, aligned at the last query and the last key. Three kernels
solve them: torch's own, one problem at a time or small ones together; a variable-length flash attention in one call;
flex attention by a mask.

Axes: T tokens of the row; A heads; B key heads, fewer than A where groups of heads share them; D size of a head;
Q queries and K keys of one problem; n problems of one call.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

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
    *("position_ids", "position_embeddings", "cache_position", "use_cache", "cache", "past_key_values"),
    *("output_attentions", "output_hidden_states", "output_router_logits", "return_dict"),
}

_NARROWEST = 16  # width of a head, for the products of the compiled flex attention

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
    if query.is_cuda:
        query, key, value = _autocast(query, key, value)
    if query.is_cuda and dropout == 0.0 and not layout.by_segment:
        flash = _flash_varlen()
        if flash is not None and query.dtype in (torch.float16, torch.bfloat16) and softcap is None:
            return varlen_attention(flash, query, key, value, layout, scaling=scaling, window=window), None
        if query.dtype != torch.float64 and min(query.shape[-1], value.shape[-1]) >= _NARROWEST:
            return _flex(query, key, value, layout, scaling=scaling, window=window, softcap=softcap), None
    attend = _sdpa if softcap is None else partial(_explicit, softcap=softcap)
    solve = partial(_by_problem, attend, layout=layout, scaling=scaling, dropout=dropout, window=window)
    if query.device.type != "cpu" or query.dtype == torch.float64:
        return solve(query, key, value), None
    # In float32 on a CPU whatever the dtype: torch's kernel for half precision is far below the rate of its matrix
    # products, and rounds the probabilities.
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    with torch.autocast("cpu", enabled=False):
        return solve(query.float(), key.float(), value.float()).to(dtype), None


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors in the dtype of autocast, as torch's own attention takes them.

    Rotary positions leave queries and keys in float32 where the hidden states are, beside values in bfloat16; other
    kernels want one dtype.
    """
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device) or any(tensor.dtype == torch.float64 for tensor in tensors):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)


# Problem by problem, through torch's own attention. Exact in every dtype.

# What a call costs besides its products, and what moving one number costs, both with the backward pass, in
# multiply-adds of the scores: 0.36 ms and 8.5 ns against 0.4 ns (Zen 3, one thread, float32). Making a plan costs a few
# calls, once for all layers.
_CALL, _MOVE, _FEWEST = 2**20, 20, 8


def _by_problem(
    attend: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    layout: PackedLayout,
    scaling: float,
    dropout: float,
    window: int | None,
) -> Tensor:
    widths = tuple(tensor.shape[1] * tensor.shape[3] for tensor in (query, key, value))
    plan = layout.keep(
        f"batches {widths} {window} {query.dtype}",
        query.device,
        lambda: _plan(layout, widths, window, query.new_zeros(())),
    )
    attend = partial(attend, scaling=scaling, dropout=dropout)
    if plan is None:
        return _one_at_a_time(attend, query, key, value, layout, window)
    return _batched(attend, query, key, value, plan)


def _one_at_a_time(
    attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, window: int | None
) -> Tensor:
    # One split of each tensor: the gradient of a slice would be a tensor of the whole row, for every segment.
    sizes = [size for segment in layout for size in (segment.num_prompt + segment.num_chosen, segment.num_rejected)]
    queries, keys, values = (torch.split(tensor, sizes, dim=2) for tensor in (query, key, value))
    outputs = []
    for number, segment in enumerate(layout):
        before, after = 2 * number, 2 * number + 1  # the places of [prompt|chosen] and [rejected] among the pieces
        problems = [(queries[before], keys[before], values[before])]
        if segment.num_rejected:  # an unpaired answer has no rejected tokens
            key_1BKD, value_1BKD = (
                torch.cat([pieces[before][:, :, : segment.num_prompt], pieces[after]], dim=2)
                for pieces in (keys, values)
            )
            problems.append((queries[after], key_1BKD, value_1BKD))
        for query_1AQD, *seen in problems:
            num_queries, num_keys = query_1AQD.shape[2], seen[0].shape[2]
            mask_QK = None  # plain causal attention, for which torch has faster kernels than for a mask
            if num_queries != num_keys or window is not None:
                make = partial(_mask, num_queries, num_keys, window, query.new_zeros(()))
                mask_QK = layout.keep(f"mask {num_queries} {num_keys} {window} {query.dtype}", query.device, make)
            outputs.append(attend(query_1AQD, *seen, mask_QK))
    return torch.cat(outputs, 2).transpose(1, 2)


class _Batches(NamedTuple):
    """Problems padded to a common size and solved together, in one or more calls.

    `queries`, `keys`: the places in the row of the queries and keys of all calls, one call after the other, each
    (n, Q) and (n, K) flattened; padding is any place. `sizes`: n, Q and K of each call; `masks`: (n, 1, Q, K), added
    to the scores. `outputs` (T,): where the output of each token of the row is among those of all calls.
    """

    queries: Tensor
    keys: Tensor
    sizes: list[tuple[int, int, int]]
    masks: list[Tensor]
    outputs: Tensor


def _plan(layout: PackedLayout, widths: tuple[int, ...], window: int | None, like: Tensor) -> _Batches | None:
    """Return the problems of a row in batches, or `None` if one at a time is cheaper.

    `widths`: how many numbers a token's query, key and value have.
    """
    if len(layout.lengths) < _FEWEST / 2:  # two problems each
        return None
    index = layout.varlen(like.device)
    num_queries, num_keys = (starts.diff() for starts in (index.query_starts, index.key_starts))
    problems = list(zip(num_queries.tolist(), num_keys.tolist(), strict=True))
    batches = _similar(problems, room=_CALL / widths[0])
    sizes = [(len(batch), *(max(problems[i][axis] for i in batch) for axis in (0, 1))) for batch in batches]
    padding = sum(n * q * k for n, q, k in sizes) - sum(q * k for q, k in problems)
    moved = widths[0] * (sum(n * q for n, q, _ in sizes) + layout.num_tokens)
    moved += (widths[1] + widths[2]) * sum(n * k for n, _, k in sizes)
    if _CALL * (len(problems) - len(batches)) <= widths[0] * padding + _MOVE * moved:
        return None
    queries, keys, masks = [], [], []
    outputs_T = index.keys.new_empty(layout.num_tokens)
    start = 0  # of a batch's outputs among all
    for batch, (_, most_queries, most_keys) in zip(batches, sizes, strict=True):
        members = torch.tensor(batch, device=like.device)
        query_Q, key_K = (torch.arange(most, device=like.device) for most in (most_queries, most_keys))
        place_nQ = index.query_starts[members, None] + query_Q
        is_query_nQ = query_Q < num_queries[members, None]
        queries.append(place_nQ.clamp(max=layout.num_tokens - 1).flatten())
        place_nK = (index.key_starts[members, None] + key_K).clamp(max=len(index.keys) - 1)
        keys.append(index.keys[place_nK].flatten())
        # Causal with the last query at the last key, so that no query sees the padding behind its keys.
        last_nQ1 = (query_Q + (num_keys - num_queries)[members, None])[:, :, None]
        seen_nQK = key_K <= last_nQ1
        if window is not None:
            seen_nQK &= key_K > last_nQ1 - window
        seen_nQK |= ~is_query_nQ[:, :, None]  # a softmax needs something to see
        masks.append(_additive(seen_nQK, like)[:, None])
        outputs_T[place_nQ[is_query_nQ]] = start + is_query_nQ.flatten().nonzero().squeeze(1)
        start += is_query_nQ.numel()
    return _Batches(torch.cat(queries), torch.cat(keys), sizes, masks, outputs_T)


def _similar(problems: Sequence[tuple[int, int]], room: float) -> list[list[int]]:
    """Return problems (queries, keys) of similar size together, by their places in the list: the largest first, until
    padding takes more than `room` scores.
    """
    batches: list[list[int]] = []
    most_queries = most_keys = scores = 0  # of the last batch
    for i in sorted(range(len(problems)), key=lambda i: problems[i][::-1], reverse=True):
        queries, keys = problems[i]
        most_queries, most_keys, scores = max(most_queries, queries), max(most_keys, keys), scores + queries * keys
        if not batches or (len(batches[-1]) + 1) * most_queries * most_keys - scores > room:
            batches.append([])
            most_queries, most_keys, scores = queries, keys, queries * keys
        batches[-1].append(i)
    return batches


def _batched(attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, plan: _Batches) -> Tensor:
    sources = (query, key, value)
    # A look-up in the rows of a table; its gradient is faster than that of an index.
    pieces = [
        torch.split(F.embedding(places, tensor[0].transpose(0, 1).flatten(1)), sizes)
        for places, tensor, sizes in zip(
            (plan.queries, plan.keys, plan.keys),
            sources,
            ([n * q for n, q, _ in plan.sizes], *2 * [[n * k for n, _, k in plan.sizes]]),
            strict=True,
        )
    ]
    outputs = []
    for call, ((n, _, _), mask_n1QK) in enumerate(zip(plan.sizes, plan.masks, strict=True)):
        inputs = (
            part[call].view(n, -1, tensor.shape[1], tensor.shape[3]).transpose(1, 2)
            for part, tensor in zip(pieces, sources, strict=True)
        )
        outputs.append(attend(*inputs, mask_n1QK).transpose(1, 2).flatten(0, 1).flatten(1))
    output = F.embedding(plan.outputs, torch.cat(outputs))
    return output.view(1, len(plan.outputs), query.shape[1], value.shape[3])


def _mask(num_queries: int, num_keys: int, window: int | None, like: Tensor) -> Tensor:
    """Return (Q, K), 0 where seen and else minus infinity: causal with the last query at the last key."""
    seen_QK = torch.ones(num_queries, num_keys, dtype=torch.bool, device=like.device).tril(num_keys - num_queries)
    return _additive(seen_QK if window is None else seen_QK.triu(num_keys - num_queries - window + 1), like)


def _additive(seen: Tensor, like: Tensor) -> Tensor:
    """Return a mask that is added to scores; torch would make one of a boolean mask in every layer."""
    return like.new_zeros(seen.shape).masked_fill_(~seen, float("-inf"))


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scaling: float, dropout: float) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    in_kernel = groups > 1 and query.device.type == "cpu" and _kernel_groups_heads()
    if groups > 1 and not in_kernel:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(
        query, key, value, mask, dropout_p=dropout, is_causal=mask is None, scale=scaling, enable_gqa=in_kernel
    )


@cache
def _kernel_groups_heads() -> bool:
    """Whether torch's flash attention for CPUs takes fewer key heads than heads, as it does since version 2.9."""
    return tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 9)


def _explicit(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scaling: float, dropout: float, softcap: float
) -> Tensor:
    """Attention with soft-capped scores, `softcap * tanh(scores / softcap)`, which torch does not offer."""
    n, num_heads, num_queries, _ = query.shape
    num_keys = key.shape[2]
    if mask is None:
        mask = _mask(num_queries, num_keys, None, query.new_zeros(()))
    # The queries of the heads that share a key are the rows of one product.
    query_nBRD = query.reshape(n, key.shape[1], -1, query.shape[3])
    scores_nBRK = softcap * torch.tanh(query_nBRD @ key.transpose(2, 3) * (scaling / softcap))
    scores_nBGQK = scores_nBRK.view(n, key.shape[1], -1, num_queries, num_keys) + mask.unsqueeze(-3)
    accumulate = torch.float64 if query.dtype == torch.float64 else torch.float32
    probabilities_nBRK = torch.softmax(scores_nBGQK, -1, dtype=accumulate).to(query.dtype).view_as(scores_nBRK)
    return (F.dropout(probabilities_nBRK, dropout) @ value).view(n, num_heads, num_queries, -1)


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

"""Log-probs of completions from a right-padded batch."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from bfpo.errors import ModelError, SettingError

__all__ = ["Reduction", "SequenceLogps", "sequence_logps", "unwrap_causal_lm"]

Reduction = Literal["sum", "mean"]


@dataclass(frozen=True, slots=True)
class SequenceLogps:
    """Log-probs of N completions in nats: `logps` (N,) float64, `num_tokens` (N,) int64, the tokens summed over."""

    logps: Tensor
    num_tokens: Tensor


def unwrap_causal_lm(model: nn.Module) -> nn.Module:
    """Return the causal LM inside data-parallel and PEFT wrappers."""
    inner: Any = model
    while isinstance(getattr(inner, "module", None), nn.Module):
        inner = inner.module
    found: nn.Module = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    return found


def _takes_logits_to_keep(model: nn.Module) -> bool:
    return "logits_to_keep" in inspect.signature(unwrap_causal_lm(model).forward).parameters


def sequence_logps(model: nn.Module, batch: Mapping[str, Any], *, reduction: Reduction = "sum") -> SequenceLogps:
    """Return the log-prob of each completion of a right-padded batch.

    `batch` holds `input_ids` (N, T) int64, `attention_mask` (N, T) and `completion_mask` (N, T) bool, True on the
    completion tokens, the end token included. The model's own head runs, so soft-capping and logit scales count, at
    the columns that predict a completion token in some row, where the model takes `logits_to_keep`. The log-softmax
    is float32 at least (float64 if the logits are), the sum over tokens float64: over a long completion the rounding
    of the sum would otherwise outweigh that of the model. `mean` divides by the number of completion tokens.

    The attention mask is checked, not passed on: in a causal model no token sees the padding on its right, and a mask
    costs the fast attention kernels and gives NaN where all that a padded position may see is masked (a sliding window
    in float64).

    Raises `SettingError` for an unknown reduction and `ModelError` for rows that are not padded on the right and for a
    completion that starts in the first column or is empty.
    """
    if reduction not in get_args(Reduction):
        raise SettingError(f"reduction: got {reduction!r}; allowed: {', '.join(get_args(Reduction))}")
    input_ids: Tensor = batch["input_ids"]
    completion_mask: Tensor = batch["completion_mask"].bool()
    num_tokens = completion_mask.sum(dim=1)
    _check_masks(batch["attention_mask"], completion_mask, num_tokens)

    predicts = completion_mask[:, 1:]  # column t predicts the token of column t + 1
    columns = predicts.any(dim=0).nonzero().squeeze(1)
    if _takes_logits_to_keep(model):
        logits = model(input_ids=input_ids, logits_to_keep=columns, use_cache=False).logits
    else:
        logits = model(input_ids=input_ids, use_cache=False).logits[:, columns]
    rows = predicts[:, columns]
    targets = input_ids[:, columns + 1]
    token_logps = -F.cross_entropy(_at_least_float32(logits[rows]), targets[rows], reduction="none").double()
    sequence_of_token = rows.nonzero()[:, 0]
    zeros = torch.zeros(len(input_ids), dtype=torch.float64, device=input_ids.device)
    logps = zeros.index_add(0, sequence_of_token, token_logps)
    return SequenceLogps(logps=logps / num_tokens if reduction == "mean" else logps, num_tokens=num_tokens)


def _check_masks(attention_mask: Tensor, completion_mask: Tensor, num_tokens: Tensor) -> None:
    attended = attention_mask.bool()
    left_padded = ~attended[:, 0] | (attended[:, 1:] & ~attended[:, :-1]).any(dim=1)
    bad = completion_mask[:, 0] | (num_tokens == 0)
    if not bool((bad | left_padded).any()):  # one synchronisation with the device in the valid case
        return
    if bool(left_padded.any()):
        row = int(left_padded.nonzero()[0, 0])
        raise ModelError(f"attention_mask: row {row} has padding before or between tokens; pad on the right")
    row = int(bad.nonzero()[0, 0])
    raise ModelError(
        f"completion_mask: row {row} has {int(num_tokens[row])} completion tokens"
        f"{', the first of them in column 0' if bool(completion_mask[row, 0]) else ''}; every completion needs a "
        "token and something before it to be predicted from (a beginning-of-sequence token will do)"
    )


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()

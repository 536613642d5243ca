"""KL divergence of two models at each token of a given answer, exact over the vocabulary.

Axes: T tokens of the answer, C positions of one chunk, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bfpo.core.errors import ModelError
from bfpo.policy.logps import unwrap_causal_lm

__all__ = ["token_divergence"]

_CHUNK = 32  # positions whose probabilities are in float64 at a time


@torch.no_grad()
def token_divergence(policy: Any, start: Any, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> Tensor:
    """Return KL(policy || start) of the next-token distributions before each answer token, (T,) float64, nats.

    Both models must be in evaluation mode, and the prompt must have a token. Logits of the answer's positions are in
    memory once for each model, in float64 32 positions at a time. Raises `ModelError` for vocabularies of two sizes.
    """
    if not answer_ids:
        return torch.zeros(0, dtype=torch.float64)
    ids = [*prompt_ids, *answer_ids][:-1]  # the last token predicts nothing that is read
    ours_TV, theirs_TV = (_last_logits(model, ids, len(answer_ids)) for model in (policy, start))
    if ours_TV.shape != theirs_TV.shape:
        raise ModelError(
            f"the models have {ours_TV.shape[1]} and {theirs_TV.shape[1]} tokens; KL needs the same vocabulary of both"
        )
    found = []
    for ours_CV, theirs_CV in zip(torch.split(ours_TV, _CHUNK), torch.split(theirs_TV, _CHUNK), strict=True):
        logp_CV, logq_CV = ours_CV.double().log_softmax(-1), theirs_CV.to(ours_CV.device).double().log_softmax(-1)
        p_CV = logp_CV.exp()
        terms_CV = torch.where(p_CV > 0, p_CV * (logp_CV - logq_CV), 0.0)  # 0 log 0 = 0, also where log q is -inf
        found.append(terms_CV.sum(-1).clamp(min=0.0))  # rounding may leave it just below 0
    return torch.cat(found).cpu()


def _last_logits(model: Any, ids: Sequence[int], num: int) -> Tensor:
    """Return the logits of the last `num` positions, (T, V)."""
    causal_lm = unwrap_causal_lm(model)
    keep = {"logits_to_keep": num} if "logits_to_keep" in inspect.signature(type(causal_lm).forward).parameters else {}
    input_ids = torch.tensor([list(ids)], device=causal_lm.device)
    logits: Tensor = causal_lm(input_ids=input_ids, use_cache=False, **keep).logits[0]
    return logits[len(logits) - num :]

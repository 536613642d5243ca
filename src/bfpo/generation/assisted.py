"""Rank-assisted decoding: each token is chosen among the model's own most probable ones (arXiv 2512.05518).

Where harmful tokens stay among the most probable ones, a refusal is only a matter of their order.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from bfpo.core.schema import Completion, Verdict
from bfpo.generation.sampling import Request, answer_batches
from bfpo.policy.batches import batches_by_length

__all__ = ["Choose", "assisted_openings", "by_judge", "by_reference"]

Choose = Callable[[Sequence[str], Sequence[Sequence[int]], Sequence[Sequence[int]]], list[int]]
"""From ids of requests, tokens so far and the most probable next tokens (best first), the next token of each."""

_LABELS = {"unsafe": 0.0, "unscored": 0.5, "safe": 1.0}


def assisted_openings(
    model: Any,
    requests: Sequence[Request],
    choose: Choose,
    *,
    top: int,
    length: int,
    eos_token_ids: Collection[int],
    batch_size: int | None = None,
) -> dict[str, tuple[int, ...]]:
    """Return by id the first `length` tokens of each answer, fewer where an end token was chosen.

    Raises `SettingError` as `answer_batches` does.
    """
    found: dict[str, tuple[int, ...]] = {}
    lengths = [len(request.prompt_ids) for request in requests]
    for places in batches_by_length(lengths, batch_size, more=length):
        batch = [requests[place] for place in places]
        walk = _Walk(batch, choose, top)
        settings: dict[str, Any] = {"max_new_tokens": length, "batch_size": len(batch), "temperature": 0.0}
        for answers in answer_batches(model, batch, eos_token_ids=eos_token_ids, processors=[walk], **settings):
            found.update({answer.id: answer.token_ids for answer in answers})
    return found


class _Walk(LogitsProcessor):
    """Leaves one token per row, the one that `choose` names."""

    def __init__(self, batch: Sequence[Request], choose: Choose, top: int) -> None:
        self._ids = [request.id for request in batch]
        self._width = len(batch[0].prompt_ids)
        self._choose, self._top = choose, top

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return (N, V) scores: 0 for the chosen token of each row, minus infinity elsewhere."""
        best = scores.topk(min(self._top, scores.shape[1]), dim=-1).indices.tolist()
        tokens = self._choose(self._ids, input_ids[:, self._width :].tolist(), best)
        chosen = torch.tensor(tokens, device=scores.device)[:, None]
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)


def by_reference(references: dict[str, Sequence[int]]) -> Choose:
    """Return the choice of the reference answer's next token where it is among the best, else of the best one.

    A token of the reference that is not taken is tried again at the next step.
    """

    def choose(ids: Sequence[str], so_far: Sequence[Sequence[int]], best: Sequence[Sequence[int]]) -> list[int]:
        found = []
        for name, tokens, tops in zip(ids, so_far, best, strict=True):
            reference, place = references[name], 0
            for token in tokens:  # another token was taken only where the reference's was not among the best
                place += place < len(reference) and token == reference[place]
            found.append(reference[place] if place < len(reference) and reference[place] in tops else tops[0])
        return found

    return choose


def by_judge(
    judge: Callable[[Sequence[Completion]], Sequence[Verdict]],
    prompts: dict[str, Completion],
    decode: Callable[[Sequence[int]], str],
    ends: Collection[int],
) -> Choose:
    """Return the choice of the token after which the judge finds the answer least safe; ties go to the more probable.

    `prompts`: id -> a completion whose text is replaced by the answer so far. `ends` are not chosen while there are
    others.
    """

    def choose(ids: Sequence[str], so_far: Sequence[Sequence[int]], best: Sequence[Sequence[int]]) -> list[int]:
        options = [[token for token in tops if token not in ends] or tops[:1] for tops in best]
        asked = [
            replace(prompts[name], text=decode([*tokens, token]))
            for name, tokens, some in zip(ids, so_far, options, strict=True)
            for token in some
        ]
        safe = iter([_LABELS[one.label] if one.p_safe is None else one.p_safe for one in judge(asked)])
        found = []
        for some in options:
            own = [next(safe) for _ in some]
            found.append(some[own.index(min(own))])
        return found

    return choose

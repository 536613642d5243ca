"""Accuracy of the implicit reward on pairs: the share of margins with the sign of the target."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from bfpo.core.errors import ModelError, SettingError
from bfpo.core.schema import Score
from bfpo.data.labels import CELLS, cell_of
from bfpo.data.pack import collate_pairs, longest_text, on_device, split_by_tokens
from bfpo.data.store import text_lengths, token_lengths
from bfpo.data.tokenize import TokenPair
from bfpo.execution.settings import ExecutorConfig
from bfpo.execution.workers import Workers
from bfpo.objective.losses import preference_loss
from bfpo.objective.methods import Method, make_method
from bfpo.policy.batches import BATCH_TOKENS
from bfpo.policy.logps import Reduction, evaluating, sequence_logps
from bfpo.policy.precision import margin_rounding
from bfpo.policy.probe import choose_form
from bfpo.scores.records import AccuracyRow
from bfpo.stats import rate_interval

__all__ = ["PairLogps", "accuracy_rows", "accuracy_scores", "pair_logps", "shared_pair_logps"]

Floats = npt.NDArray[np.float64]

BATCHES_PER_PART = 8  # of pairs, that one worker computes at a time
_PAIRS_OF_BATCH = 16  # where tokens bound a batch


@dataclass(frozen=True, slots=True, eq=False)
class PairLogps:
    """Log-probs of both completions of P pairs under one model, (P,) float64 each, in nats.

    `rounding`: how far rounding moves their difference, (P,) or one number, in nats.
    """

    chosen: Floats
    rejected: Floats
    rounding: Floats | float = 0.0


def pair_logps(
    model: Any,
    pairs: Sequence[TokenPair],
    *,
    pairs_per_batch: int | None = None,
    reduction: Reduction = "sum",
    longest: int | None = None,
) -> PairLogps:
    """Return the log-probs of all pairs under a model, in evaluation mode and without gradient, longest pairs first.

    A forward pass has `pairs_per_batch` pairs; `None`: as many as hold `BATCH_TOKENS` tokens, padding counted. The
    model is left in the mode it was in. `longest`: tokens of the longest text, where the pairs are a part of all.
    """
    if not pairs:
        return PairLogps(np.empty(0), np.empty(0))
    form = choose_form(model, longest_text=longest or longest_text(pairs))
    device = next(model.parameters()).device
    lengths = token_lengths(pairs)
    max_tokens = BATCH_TOKENS if pairs_per_batch is None else None
    texts = list(map(tuple, lengths.tolist()))
    chosen, rejected = np.empty(len(pairs)), np.empty(len(pairs))
    with evaluating(model):
        for indices in split_by_tokens(texts, form=form, max_tokens=max_tokens, max_pairs=pairs_per_batch):
            # Masks decide what counts, so any id that every embedding has will do.
            batch = collate_pairs([pairs[index] for index in indices], pad_token_id=0, form=form)
            logps = sequence_logps(model, on_device(batch, device), reduction=reduction).logps.cpu().numpy()
            chosen[indices], rejected[indices] = logps[: len(indices)], logps[len(indices) :]
    rounding = margin_rounding(
        *torch.from_numpy(lengths[:, 1:]).unbind(1),
        dtype=next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()),
        log_vocabulary=math.log(model.config.get_text_config().vocab_size),
        reduction=reduction,
    )
    return PairLogps(chosen, rejected, rounding.numpy())


def shared_pair_logps(
    make: Callable[[], Any],
    pairs: Sequence[TokenPair],
    executor: ExecutorConfig,
    *,
    name: str,
    pairs_per_batch: int | None = None,
    threads: int | None = None,
    advance: Callable[[int], None] = lambda count: None,
    **settings: Any,
) -> PairLogps:
    """Return `pair_logps` of the model that `make` loads, from the same batches, by the workers of an executor.

    `make` can be sent to another process; `settings` are those of `pair_logps`; `advance` gets the number of pairs that
    are done. Raises `ModelError` for a log-prob that is not finite, with the pair's id and the `name` of the model.
    """
    order: list[int] = np.argsort(-text_lengths(pairs), kind="stable").tolist()
    size = BATCHES_PER_PART * (pairs_per_batch or _PAIRS_OF_BATCH)
    parts = [order[start : start + size] for start in range(0, len(order), size)]
    longest = longest_text(pairs) if pairs else None
    work = partial(_part_logps, pairs_per_batch=pairs_per_batch, longest=longest, **settings)
    found = np.empty((3, len(pairs)))
    given = ([pairs[index] for index in part] for part in parts)
    with Workers(executor, make, most=len(parts), threads=threads, here=True) as workers:
        for number, logps in workers.map(given, work, title=_part_title):
            _check_finite(name, [pairs[index] for index in parts[number]], logps)
            found[:, parts[number]] = logps.chosen, logps.rejected, logps.rounding
            advance(len(parts[number]))
    return PairLogps(*found)


def _part_logps(model: Any, pairs: Sequence[TokenPair], **settings: Any) -> PairLogps:
    return pair_logps(model, pairs, **settings)


def _check_finite(name: str, pairs: Sequence[TokenPair], logps: PairLogps) -> None:
    for pair, *values in zip(pairs, logps.chosen, logps.rejected, strict=True):
        for side, value in zip(("chosen", "rejected"), values, strict=True):
            if not math.isfinite(value):
                raise ModelError(
                    f"pair {pair.pair_id}: the log-prob of its {side} completion under {name} is {value}; check the "
                    "model's weights, or compute in float32"
                )


def _part_title(pairs: Sequence[TokenPair]) -> str:
    return f"the {len(pairs)} pairs from {pairs[0].pair_id} on"


def accuracy_rows(
    pairs: Sequence[TokenPair],
    prompts: Sequence[str],
    policy: PairLogps,
    reference: PairLogps,
    *,
    method: str | Method = "bfpo",
    **settings: float | str,
) -> list[AccuracyRow]:
    """Return one row per pair: margin = (log pi - log pi_ref)(chosen) - (log pi - log pi_ref)(rejected).

    `prompts` groups pairs of one prompt. `method`, an object or a name with its `settings` (see `preference_loss`),
    decides which side is favoured: for BFPO the sign of the target, so that the safe side of a conflict is right. A
    margin no larger than the rounding of both models is a tie. Raises `SettingError` if lengths differ.
    """
    method = make_method(method, **settings)
    sizes = {
        len(pairs),
        len(prompts),
        *(len(side) for each in (policy, reference) for side in (each.chosen, each.rejected)),
    }
    if len(sizes) > 1:
        raise SettingError(
            f"pairs, prompts, policy, reference: got lengths {sorted(sizes)}; one entry per pair is needed"
        )
    if not pairs:
        return []
    margin = (policy.chosen - reference.chosen) - (policy.rejected - reference.rejected)
    is_tied = np.abs(margin) <= np.maximum(policy.rounding, reference.rounding)
    margin_P = torch.from_numpy(margin)
    outcome = preference_loss(
        margin_P,
        torch.tensor([pair.chosen_is_safe for pair in pairs], dtype=torch.float64),
        torch.tensor([pair.rejected_is_safe for pair in pairs], dtype=torch.float64),
        method=method,
        beside=method.at_rest(margin_P),  # who is favoured depends on the labels alone
    )
    return [
        AccuracyRow(
            pair_id=pair.pair_id,
            prompt=prompt,
            cell=cell_of(pair.chosen_is_safe, pair.rejected_is_safe),
            favoured=int(favoured),
            target=None if np.isnan(target) else float(target),
            margin=float(value),
            beta_margin=float(method.beta * value),
            tie=True if favoured and tied else None,
        )
        for pair, prompt, favoured, target, value, tied in zip(
            pairs, prompts, outcome.favoured.tolist(), outcome.target.tolist(), margin, is_tied.tolist(), strict=True
        )
    ]


def accuracy_scores(
    rows: Sequence[AccuracyRow],
    *,
    seeds: Sequence[int] | None = None,
    confidence: float = 0.95,
) -> list[Score]:
    """Return the accuracy over all pairs (`accuracy`) and by cell (`accuracy_safe_unsafe`, chosen first).

    `seeds`: the training of each row, if there are several; the intervals then include the variation between trainings.
    A pair without a favoured side counts as unscored and is in no mean. `extra`: number of prompts and of ties (neither
    right nor wrong, 1/2 in the mean, as by chance), mean of `beta * margin`. A cell without pairs has `None`. Raises
    `SettingError` if `seeds` and `rows` differ in length.
    """
    of_seed = [0] * len(rows) if seeds is None else list(seeds)
    if len(of_seed) != len(rows):
        raise SettingError(f"seeds: got {len(of_seed)} for {len(rows)} rows; one per row is needed")
    scores = []
    for cell in (None, *CELLS):
        chosen = [(row, seed) for row, seed in zip(rows, of_seed, strict=True) if cell is None or row.cell == cell]
        asked = [(row, seed) for row, seed in chosen if row.favoured]
        interval = rate_interval(
            [row.credit for row, _ in asked if row.credit is not None],
            [row.prompt for row, _ in asked],
            seeds=[seed for _, seed in asked],
            confidence=confidence,
        )
        extra: dict[str, int | float] = {
            "num_prompts": len({row.prompt for row, _ in asked}),
            "num_ties": sum(bool(row.tie) for row, _ in asked),
        }
        if chosen:
            extra["mean_beta_margin"] = float(np.mean([row.beta_margin for row, _ in chosen]))
        scores.append(
            Score(
                metric="accuracy" if cell is None else f"accuracy_{cell.replace('-', '_')}",
                **asdict(interval),
                unscored=len(chosen) - len(asked),
                extra=extra,
            )
        )
    return scores

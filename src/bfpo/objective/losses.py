"""One call for every method: margins and labels -> a loss per pair; the anchor, and what step 0 must show."""

from __future__ import annotations

import difflib

import torch
from torch import Tensor

from bfpo.core.errors import SettingError
from bfpo.objective.methods import METHODS, LossSettings, Method, PairLoss
from bfpo.objective.targets import check_labels, require_finite

__all__ = ["METHODS", "Method", "PairLoss", "add_anchor", "anchor", "get_method", "loss_at_start", "preference_loss"]


def get_method(name: str) -> Method:
    """Return the row of `METHODS` of this name; raise `SettingError` with the nearest names if there is none."""
    if name in METHODS:
        return METHODS[name]
    close = difflib.get_close_matches(str(name), METHODS, n=2, cutoff=0.5)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    raise SettingError(f"method: got {name!r}; allowed: {', '.join(METHODS)}{hint}")


def preference_loss(
    margin: Tensor,
    chosen_is_safe: Tensor,
    rejected_is_safe: Tensor,
    *,
    method: str = "bfpo",
    beta: float,
    alpha: float = 0.5,
    safety_weight: float = 3.0,
    safedpo_delta: float = 10.0,
    bso_shift: float = 30.0,
    sba_lambda: float = 0.2,
    sba_scale: float = 4.0,
    sba_clamp: float = 30.0,
    safety_share: float = 0.5,
    other_margin: Tensor | None = None,
) -> PairLoss:
    """Return the loss of P pairs by one of `METHODS`, with what the method did to each pair.

    `margin`: (P,) floating point, `[log pi(y_c) - log pi_ref(y_c)] - [log pi(y_r) - log pi_ref(y_r)]` in nats, of
    summed log-probs as published (of means if the caller reduces so). `chosen_is_safe`, `rejected_is_safe`: (P,) bits
    or probabilities. `method`: a name of `METHODS`, whose `reads` says which of the settings (see `LossSettings`)
    it depends on. `other_margin`: (P,) the margin of another model against the same reference, read by methods that are
    `shifted` and no other; None = 0 everywhere. Computed in the margin's dtype, half precision in float32.

    Take the mean over all P pairs, dropped ones included, for the loss of a step.

    Raises `SettingError` for an unknown method, a setting outside its range, or a margin that is not a (P,) tensor of
    floating point; `LabelError` for labels that `check_labels` does not take.
    """
    row = get_method(method)
    settings = LossSettings(
        beta=beta,
        alpha=alpha,
        safety_weight=safety_weight,
        safedpo_delta=safedpo_delta,
        bso_shift=bso_shift,
        sba_lambda=sba_lambda,
        sba_scale=sba_scale,
        sba_clamp=sba_clamp,
        safety_share=safety_share,
    )
    chosen_is_safe, rejected_is_safe = check_labels(chosen_is_safe, rejected_is_safe)
    if not isinstance(margin, Tensor) or not margin.is_floating_point():
        kind = margin.dtype if isinstance(margin, Tensor) else type(margin).__name__
        raise SettingError(f"margin: got {kind}; allowed: a tensor of floating point, (P,)")
    if margin.shape != chosen_is_safe.shape:
        raise SettingError(
            f"margin: got shape {tuple(margin.shape)} with labels of shape {tuple(chosen_is_safe.shape)}; "
            "allowed: the same (P,) for all three"
        )
    if margin.dtype in (torch.float16, torch.bfloat16):
        margin = margin.float()
    if other_margin is not None:
        margin = _shifted(margin, other_margin, row, safety_share)
    return row.function(margin, chosen_is_safe, rejected_is_safe, settings)


def _shifted(margin: Tensor, other_margin: Tensor, row: Method, share: float) -> Tensor:
    if not row.shifted:
        raise SettingError(f"other_margin: the method {row.name!r} does not read it; leave it out")
    if other_margin.shape != margin.shape:
        raise SettingError(
            f"other_margin: got shape {tuple(other_margin.shape)} with a margin of shape {tuple(margin.shape)}; "
            "allowed: the same (P,) for both"
        )
    return margin - share * other_margin.to(dtype=margin.dtype, device=margin.device)


def loss_at_start(
    chosen_is_safe: Tensor,
    rejected_is_safe: Tensor,
    *,
    method: str = "bfpo",
    beta: float,
    alpha: float = 0.5,
    safety_weight: float = 3.0,
    safedpo_delta: float = 10.0,
    bso_shift: float = 30.0,
    sba_lambda: float = 0.2,
    sba_scale: float = 4.0,
    sba_clamp: float = 30.0,
    safety_share: float = 0.5,
    other_margin: Tensor | None = None,
) -> Tensor:
    """Return the (P,) float64 loss before the first step, where policy = reference and every margin is 0.

    For BFPO that is `target^2 / beta^2`. A trainer whose first loss is anything else is wired wrongly. Arguments and
    errors as in `preference_loss`.
    """
    chosen_is_safe, rejected_is_safe = check_labels(chosen_is_safe, rejected_is_safe)
    return preference_loss(
        torch.zeros(chosen_is_safe.shape, dtype=torch.float64, device=chosen_is_safe.device),
        chosen_is_safe,
        rejected_is_safe,
        method=method,
        beta=beta,
        alpha=alpha,
        safety_weight=safety_weight,
        safedpo_delta=safedpo_delta,
        bso_shift=bso_shift,
        sba_lambda=sba_lambda,
        sba_scale=sba_scale,
        sba_clamp=sba_clamp,
        safety_share=safety_share,
        other_margin=other_margin,
    ).loss


def anchor(
    favoured: Tensor,
    mean_nll_chosen: Tensor,
    mean_nll_rejected: Tensor,
    chosen_is_safe: Tensor,
    rejected_is_safe: Tensor,
) -> Tensor:
    """Return the anchor of P pairs: p(safe) x mean token NLL of the favoured completion, only where p(safe) > 0.5.

    `favoured`: (P,) of -1, 0, +1 as in `PairLoss`. `mean_nll_*`: (P,) nats per token, carrying the gradient.
    `*_is_safe`: (P,) bits or probabilities. Returns (P,), 0 where no completion is favoured or the favoured one is not
    safe: of two harmful answers the target favours the duller, and imitating that would teach compliance.

    Raises `LabelError` for labels that `check_labels` does not take and `SettingError` for shapes that differ.
    """
    chosen_is_safe, rejected_is_safe = check_labels(chosen_is_safe, rejected_is_safe)
    for name, value in (
        ("favoured", favoured),
        ("mean_nll_chosen", mean_nll_chosen),
        ("mean_nll_rejected", mean_nll_rejected),
    ):
        if value.shape != chosen_is_safe.shape:
            raise SettingError(
                f"{name}: got shape {tuple(value.shape)} with labels of shape {tuple(chosen_is_safe.shape)}; "
                "allowed: the same (P,) for all"
            )
    total = torch.zeros_like(mean_nll_chosen)
    for sign, nll, is_safe in ((1, mean_nll_chosen, chosen_is_safe), (-1, mean_nll_rejected, rejected_is_safe)):
        imitated = (favoured == sign) & (is_safe > 0.5)
        # The value is replaced before the product, so that an unused NLL that is not finite gives no gradient.
        total = total + torch.where(imitated, nll, torch.zeros_like(nll)) * is_safe.to(nll.dtype)
    return total


def add_anchor(loss: Tensor, anchor: Tensor, *, anchor_weight: float, method: str = "bfpo", beta: float) -> Tensor:
    """Return `loss + anchor_weight * anchor / normaliser(beta)`, (P,): the total that is averaged and minimised.

    Times the normaliser (beta^2 for a squared loss) that is `normalised loss + anchor_weight * anchor`, a function of
    `beta * margin` and the anchor alone, so that one `anchor_weight` means the same at every beta.

    Raises `SettingError` for an `anchor_weight` below 0 or not finite, an unknown method, or `beta <= 0`.
    """
    if require_finite("anchor_weight", anchor_weight) < 0:
        raise SettingError(f"anchor_weight: got {anchor_weight!r}; allowed: a finite number of at least 0")
    return loss + (anchor_weight / get_method(method).normaliser(beta)) * anchor

"""One call for every method: margins and labels -> a loss per pair; the anchor, and what step 0 must show."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bfpo.core.errors import LabelError, SettingError
from bfpo.objective.methods import BFPO, Beside, Method, PairLoss, ReadsBeside, check_number, make_method

__all__ = [
    "add_anchor",
    "anchor",
    "anchor_factor",
    "bfpo_target",
    "check_labels",
    "loss_at_start",
    "preference_loss",
    "pull_at_start",
]


def preference_loss(
    margin: Tensor,
    chosen_is_safe: Tensor,
    rejected_is_safe: Tensor,
    *,
    method: str | Method = "bfpo",
    other_margin: Tensor | None = None,
    beside: Beside | None = None,
    **settings: float | str,
) -> PairLoss:
    """Return the loss of P pairs by one method, with what the method did to each pair.

    `margin`: (P,) floating point, `[log pi(y_c) - log pi_ref(y_c)] - [log pi(y_r) - log pi_ref(y_r)]` in nats, of
    summed log-probs as published (of means if the caller reduces so). `chosen_is_safe`, `rejected_is_safe`: (P,) bits
    or probabilities. `method`: a name of `METHODS` with its `settings` (`beta` and its own), or an object, as
    `BFPO(beta=0.1)`. `other_margin`: (P,) the margin of another model against the same reference, read by methods that
    are `shifted` and no other; None = 0 everywhere. `beside`: what methods with `reads` need besides, no others.
    Computed in the margin's dtype, half precision in float32.

    Take the mean over all P pairs, dropped ones included, for the loss of a step.

    Raises `SettingError` as `make_method` does and for a margin that is not a (P,) tensor of floating point;
    `LabelError` for labels that `check_labels` refuses.
    """
    method = make_method(method, **settings)
    chosen_is_safe, rejected_is_safe = check_labels(chosen_is_safe, rejected_is_safe)
    if not isinstance(margin, Tensor) or not margin.is_floating_point():
        kind = margin.dtype if isinstance(margin, Tensor) else type(margin).__name__
        raise SettingError(f"margin: got {kind}; allowed: a tensor of floating point, (P,)")
    if margin.shape != chosen_is_safe.shape:
        raise SettingError(
            f"margin: got shape {tuple(margin.shape)} with labels of shape {tuple(chosen_is_safe.shape)}; "
            "allowed: the same (P,) for all three"
        )
    # At the published beta = 0.01 the targets are at 50 and 100 nats. float16 overflows where a distance above 255 is
    # squared, and bfloat16 holds 100 only to within 0.25.
    if margin.dtype in (torch.float16, torch.bfloat16):
        margin = margin.float()
    if other_margin is not None:
        margin = _shifted(margin, other_margin, method)
    if beside is None:
        return method.loss(margin, chosen_is_safe, rejected_is_safe)
    if not isinstance(method, ReadsBeside):
        raise SettingError(f"beside: the method {method.name!r} does not read it; leave it out")
    for name in method.reads:
        shape = tuple(getattr(beside, name).shape)
        wanted = {"group": tuple(margin.shape), "state": shape[:1]}.get(name, (2, *margin.shape))
        if shape != wanted:
            raise SettingError(f"beside.{name}: got shape {shape} with {len(margin)} pairs; allowed: {wanted}")
    return method.loss_beside(margin, chosen_is_safe, rejected_is_safe, beside.to(margin))


def _shifted(margin: Tensor, other_margin: Tensor, method: Method) -> Tensor:
    if not method.shifted:
        raise SettingError(f"other_margin: the method {method.name!r} does not read it; leave it out")
    if other_margin.shape != margin.shape:
        raise SettingError(
            f"other_margin: got shape {tuple(other_margin.shape)} with a margin of shape {tuple(margin.shape)}; "
            "allowed: the same (P,) for both"
        )
    return margin - method.other_share * other_margin.to(dtype=margin.dtype, device=margin.device)


def loss_at_start(
    chosen_is_safe: Tensor,
    rejected_is_safe: Tensor,
    *,
    method: str | Method = "bfpo",
    other_margin: Tensor | None = None,
    beside: Beside | None = None,
    drift: float | Tensor = 0.0,
    **settings: float | str,
) -> Tensor:
    """Return the (P,) float64 loss before the first step, where policy = reference and every margin is 0.

    For BFPO that is `target^2 / beta^2`. A trainer with any other first loss is set up wrongly. `beside`: of what was
    read, its drift aside, and the state of a pointwise method, which is 0 then; without it a method that reads it is
    taken to know nothing. `drift`: a number or (P,), in place of 0: the margin, the drift of the chosen answers, and
    minus that of the rejected ones. Other arguments and errors as in `preference_loss`.
    """
    chosen_is_safe, rejected_is_safe = check_labels(chosen_is_safe, rejected_is_safe)
    margin = torch.zeros(chosen_is_safe.shape, dtype=torch.float64, device=chosen_is_safe.device) + drift
    method = make_method(method, **settings)
    if isinstance(method, ReadsBeside):
        found = Beside.at_rest(margin) if beside is None else beside
        beside = found.to(margin).at(torch.stack([margin, -margin]), reset=method.pointwise)
    return preference_loss(
        margin, chosen_is_safe, rejected_is_safe, method=method, other_margin=other_margin, beside=beside
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
    safe: of two harmful answers the target favours the less helpful one, and imitating that would teach compliance.

    Raises `LabelError` for labels that `check_labels` refuses and `SettingError` for shapes that differ.
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


def add_anchor(
    loss: Tensor,
    anchor: Tensor,
    *,
    anchor_weight: float,
    anchor_scale: str = "loss",
    method: str | Method = "bfpo",
    **settings: float | str,
) -> Tensor:
    """Return `loss + anchor_weight * anchor / normaliser`, (P,): the total that is averaged and minimised.

    Times the normaliser (beta^2 for a squared loss) that is `normalised loss + anchor_weight * anchor`, a function of
    `beta * margin` and the anchor alone, so that one `anchor_weight` means the same at every beta. `anchor_scale`: see
    `anchor_factor`.

    Raises `SettingError` as `make_method` does, for an `anchor_weight` below 0 or not finite, and another scale.
    """
    check_number("anchor_weight", anchor_weight, ge=0)
    return loss + anchor_factor(anchor_weight, anchor_scale, make_method(method, **settings)) * anchor


def anchor_factor(anchor_weight: float, anchor_scale: str, method: Method) -> float:
    """Return what the anchor is multiplied by beside a method's loss.

    With the scale "loss" that is `anchor_weight / normaliser`: one weight beside every normalised loss, whose gradients
    differ between methods. With "gradient" it is that times `pull_at_start`, so that at the start one weight has the
    same share in the gradient of every method. Raises `SettingError` for another scale.
    """
    if anchor_scale not in ("loss", "gradient"):
        raise SettingError(f"anchor_scale: got {anchor_scale!r}; allowed: 'loss', 'gradient'")
    scale = pull_at_start(method) if anchor_scale == "gradient" and anchor_weight else 1.0
    return anchor_weight / method.normaliser * scale


def pull_at_start(method: Method) -> float:
    """Return the least gradient of the normalised loss at the start, per nat of beta x an answer's log-ratio.

    Of its absolute value, the mean over the two answers of a pair, least among the label cells that the method pulls at
    all: 1 for BFPO (two safe answers, or two unsafe ones), 1/2 for DPO, 1/4 for KTO. The least, because an offset such
    as SafeDPO's makes others large only until it is reached. A number of the method and its settings alone.
    """
    bits = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0]], dtype=torch.float64)
    drift = torch.zeros_like(bits, requires_grad=True)
    margin = drift[0] - drift[1]
    rest = method.at_rest(margin)
    beside = None if rest is None else rest.at(drift)
    loss = preference_loss(margin, *bits, method=method, beside=beside).loss
    (slope,) = torch.autograd.grad(loss.sum(), drift)
    by_cell = slope.abs().mean(0)
    return float(by_cell[by_cell > 0].min()) * method.normaliser / method.beta


def bfpo_target(
    chosen_is_safe: Tensor, rejected_is_safe: Tensor, *, alpha: float = 0.5, safety_weight: float = 3.0
) -> Tensor:
    """Return what `beta * margin` of each pair is pulled to: `B3 (B1 s_c - s_r) - alpha`, with `B3 = 1/(B1-1)`.

    `chosen_is_safe`, `rejected_is_safe`: (P,) bits or probabilities, s_c and s_r. `safety_weight` is the paper's B1.
    Returns (P,), without unit; the margin's own target is this over `beta`, in nats. Linear in the labels, so a
    probability gives the expectation over the two bits. At alpha = 0.5 the mixed targets are +-(1/2 + B3): a *smaller*
    `safety_weight` lets safety weigh more. At the published B1 = 3, alpha = 0.5:

        chosen safe, rejected unsafe    +1.0
        both safe                       +0.5 (IPO's)
        both unsafe                     -0.5 (the less helpful of two harmful answers wins)
        chosen unsafe, rejected safe    -1.0

    Raises `LabelError` (see `check_labels`), and `SettingError` for `safety_weight <= 1` or a setting not finite.
    Source: arXiv 2408.15313.
    """
    method = BFPO(alpha=alpha, safety_weight=safety_weight)
    return method.target(*check_labels(chosen_is_safe, rejected_is_safe))


def check_labels(chosen_is_safe: Tensor, rejected_is_safe: Tensor) -> tuple[Tensor, Tensor]:
    """Check the two safety labels of P pairs and return them as floating-point tensors.

    Both are (P,): bits (bool, or 0 and 1) or probabilities in [0, 1] that the completion is safe. Bits become float64:
    as integers they would *index* rows where a mask was meant.

    Raises `LabelError` for a shape that is not (P,) or differs between the two, for a label outside [0, 1], and for an
    unknown one (NaN), with the value and its pair.
    """
    labels = []
    for name, label in (("chosen_is_safe", chosen_is_safe), ("rejected_is_safe", rejected_is_safe)):
        if not isinstance(label, Tensor):
            raise LabelError(f"{name}: got {type(label).__name__}; allowed: a tensor of shape (P,)")
        if label.ndim != 1:
            raise LabelError(f"{name}: got shape {tuple(label.shape)}; allowed: (P,), one label a pair")
        if label.is_complex():
            raise LabelError(f"{name}: got {label.dtype}; allowed: bool, integer or floating point")
        labels.append(label if label.is_floating_point() else label.to(torch.float64))
    if labels[0].shape != labels[1].shape:
        raise LabelError(
            f"chosen_is_safe has shape {tuple(labels[0].shape)} and rejected_is_safe {tuple(labels[1].shape)}; "
            "allowed: the same (P,) for both"
        )
    # One synchronisation with the device in the valid case; NaN fails both comparisons.
    both = torch.stack((labels[0].detach(), labels[1].detach()))
    valid = (both >= 0) & (both <= 1)
    if not bool(valid.all()):
        _raise_bad_label(both, valid)
    return labels[0], labels[1]


def _raise_bad_label(both: Tensor, valid: Tensor) -> None:
    which, pair = (int(index) for index in (~valid).nonzero()[0])
    value = float(both[which, pair])
    name = ("chosen_is_safe", "rejected_is_safe")[which]
    if math.isnan(value):
        raise LabelError(
            f"{name}[{pair}]: got NaN (unknown); allowed: a bit or a probability in [0, 1]; "
            "resolve unknown labels before training"
        )
    raise LabelError(f"{name}[{pair}]: got {value:g}; allowed: a bit or a probability in [0, 1]")

"""Safety labels of a pair -> the target of its margin, and the checks that labels and settings pass first."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bfpo.core.errors import LabelError, SettingError

__all__ = ["bfpo_target", "check_labels", "check_safety_weight", "require_finite", "require_positive"]


def require_finite(name: str, value: float) -> float:
    """Return `value` as a float; raise `SettingError` if it is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise SettingError(f"{name}: got {value!r}; allowed: a finite number")
    return float(value)


def require_positive(name: str, value: float) -> float:
    """Return `value` as a float; raise `SettingError` if it is not a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        raise SettingError(f"{name}: got {value!r}; allowed: a finite number above 0")
    return float(value)


def check_safety_weight(safety_weight: float) -> float:
    """Return `safety_weight` (the paper's B1); raise `SettingError` unless it is above 1, as B3 = 1/(B1-1) needs."""
    if require_finite("safety_weight", safety_weight) <= 1:
        raise SettingError(
            f"safety_weight: got {safety_weight!r}; allowed: a finite number above 1 (the published value is 3)"
        )
    return float(safety_weight)


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
    alpha = require_finite("alpha", alpha)
    safety_weight = check_safety_weight(safety_weight)
    chosen_is_safe, rejected_is_safe = check_labels(chosen_is_safe, rejected_is_safe)
    # B3 (B1 s_c - s_r) - alpha. The labels have weights of their own, so it is no function of s_c - s_r: the target of
    # two safe answers is above that of two unsafe ones, by B3 (B1 - 1) = 1.
    return (safety_weight * chosen_is_safe - rejected_is_safe) / (safety_weight - 1) - alpha

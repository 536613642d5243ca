"""A loss of any method: what a method reads beside the margin is taken from nothing known, with the margin as drift."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bfpo.objective.losses import preference_loss
from bfpo.objective.methods import METHODS, Beside, PairLoss

PLAIN = [name for name, method in METHODS.items() if not method.reads]


def loss_of(margin: Tensor, chosen_is_safe: Tensor, rejected_is_safe: Tensor, **settings: Any) -> PairLoss:
    """Return the loss where the two answers of a pair have moved by the same, in opposite directions."""
    beside = None
    if METHODS[settings.get("method", "bfpo")].reads:
        beside = Beside.at_rest(margin).at(torch.stack([margin / 2, -margin / 2]))
    return preference_loss(margin, chosen_is_safe, rejected_is_safe, beside=beside, **settings)

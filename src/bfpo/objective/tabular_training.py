"""The four-action experiment (section 3.4 of arXiv 2408.15313): training tabular policies by sampled pairs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bfpo.core.errors import SettingError
from bfpo.objective.losses import bfpo_target
from bfpo.objective.methods import check_number
from bfpo.objective.tabular import closed_form, helpfulness_order, pair_targets, win_rate

__all__ = ["RIVALS", "Rival", "TabularRun", "all_assignments", "optimum", "train_tabular"]

TargetFunction = Callable[[Tensor, Tensor, float], Tensor]


@dataclass(frozen=True, slots=True)
class Rival:
    """A method of the experiment.

    `target(chosen_is_safe, rejected_is_safe, alpha)`, (P,) -> (P,): what `beta * margin` is held to by the `link`; see
    `bfpo.objective.methods.BFPO`. DPO is the logistic link of a target of 1.
    """

    name: str
    label: str
    summary: str
    target: TargetFunction
    link: str = "squared"


def _bfpo(chosen_is_safe: Tensor, rejected_is_safe: Tensor, alpha: float) -> Tensor:
    return bfpo_target(chosen_is_safe, rejected_is_safe, alpha=alpha)


def _bfpo_alpha_0(chosen_is_safe: Tensor, rejected_is_safe: Tensor, alpha: float) -> Tensor:
    return bfpo_target(chosen_is_safe, rejected_is_safe, alpha=0.0)


def _dpo(chosen_is_safe: Tensor, rejected_is_safe: Tensor, alpha: float) -> Tensor:
    return torch.ones_like(chosen_is_safe)


def _ipo(chosen_is_safe: Tensor, rejected_is_safe: Tensor, alpha: float) -> Tensor:
    return torch.full_like(chosen_is_safe, 0.5)


def _linear_sum(chosen_is_safe: Tensor, rejected_is_safe: Tensor, alpha: float) -> Tensor:
    """IPO's target plus the difference in safety: its optimum is exp((r_help + r_safe) / beta)."""
    return 0.5 + chosen_is_safe - rejected_is_safe


RIVALS: dict[str, Rival] = {
    rival.name: rival
    for rival in (
        Rival("bfpo", "BFPO", "both factors", _bfpo),
        Rival("bfpo_alpha_0", "BFPO, alpha = 0", "the same without the shift", _bfpo_alpha_0),
        Rival("dpo", "DPO", "helpfulness order only", _dpo, "logistic"),
        Rival("ipo", "IPO", "helpfulness order only", _ipo),
        Rival("linear_sum", "Linear sum", "the two rewards added 1 : 1", _linear_sum),
        Rival("bfpo_one_sided", "BFPO, one-sided", "both factors; no pull back", _bfpo, "one_sided"),
        Rival("bfpo_logistic", "BFPO, logistic", "both factors; no end", _bfpo, "logistic"),
    )
}


@dataclass(frozen=True, slots=True)
class TabularRun:
    """The record of `train_tabular`.

    `methods`: M names. `is_safe`: (A, n). `final`: (S, M, A, n), probabilities after the last step, for S seeds.
    `steps`: (R,) steps at which the policy was recorded, 0 and the last among them; `curve`: (R, S, M, A, n).
    """

    methods: tuple[str, ...]
    is_safe: Tensor
    final: Tensor
    steps: Tensor
    curve: Tensor


def all_assignments(num_actions: int = 4) -> Tensor:
    """Return (2^n, n) float64: every assignment of safety bits, from all safe to all unsafe, few unsafe ones first."""
    rows = sorted(itertools.product((1.0, 0.0), repeat=num_actions), key=lambda bits: -sum(bits))
    return torch.tensor(rows, dtype=torch.float64)


def optimum(method: str, is_safe: Tensor, *, beta: float, alpha: float, label_noise: float = 0.0) -> Tensor | None:
    """Return the exact optimum (A, n) of a method with a squared loss, None for one without.

    `is_safe`: (A, n) bits, action 0 the most helpful. `label_noise`: share of bits that are flipped in the pairs; a
    squared loss sees their mean. Raises `SettingError` for a method that is not in `RIVALS`.
    """
    _check_method(method)
    beats = helpfulness_order(is_safe.shape[-1])
    if RIVALS[method].link != "squared":
        return None
    is_safe = label_noise + (1 - 2 * label_noise) * is_safe
    if method in ("bfpo", "bfpo_alpha_0"):
        return closed_form(pair_targets(beats, is_safe, alpha=alpha if method == "bfpo" else 0.0), beta=beta)
    reward = win_rate(beats) + (is_safe if method == "linear_sum" else torch.zeros_like(is_safe))
    return torch.softmax(reward / beta, dim=-1)


def _check_method(method: str) -> None:
    if method not in RIVALS:
        raise SettingError(f"method: got {method!r}; allowed: {', '.join(RIVALS)}")


def _draws(num_pairs: int, *, steps: int, batch_size: int, seeds: Sequence[int], label_noise: float) -> Tensor:
    """Return (steps, S, 4 x num_pairs): the share of each pair in each batch, drawn uniformly with replacement.

    The first quarter has the true bits, the others those of the chosen action, of the rejected one, of both flipped.
    """
    shares = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        index = torch.randint(num_pairs, (steps, batch_size), generator=generator)
        if label_noise:
            flipped = torch.rand(2, steps, batch_size, generator=generator, dtype=torch.float64) < label_noise
            index += num_pairs * (flipped[0] + 2 * flipped[1].long())
        count = torch.zeros(steps, 4 * num_pairs, dtype=torch.float64)
        shares.append(count.scatter_add_(1, index, torch.ones(steps, batch_size, dtype=torch.float64)) / batch_size)
    return torch.stack(shares, dim=1)


def _targets(methods: Sequence[str], chosen_is_safe: Tensor, rejected_is_safe: Tensor, alpha: float) -> Tensor:
    """Return the targets (M, A, 4P), in the order of `_draws`."""
    chosen = torch.cat([chosen_is_safe, 1 - chosen_is_safe] * 2, dim=-1)
    rejected = torch.cat([rejected_is_safe] * 2 + [1 - rejected_is_safe] * 2, dim=-1)
    flat = chosen.flatten(), rejected.flatten()
    return torch.stack([RIVALS[method].target(*flat, alpha).reshape(chosen.shape) for method in methods])


def train_tabular(
    is_safe: Tensor,
    *,
    methods: Sequence[str] = tuple(RIVALS),
    steps: int = 1800,
    learning_rate: float = 0.01,
    batch_size: int = 32,
    beta: float = 1.0,
    alpha: float = 0.5,
    label_noise: float = 0.0,
    seeds: Sequence[int] = (0,),
    record_every: int = 20,
) -> TabularRun:
    """Train a softmax over n actions by each method, for each assignment of safety bits and each seed.

    `is_safe`: (A, n) bits; action 0 is the most helpful. Each step draws `batch_size` of the n(n-1)/2 pairs of
    different actions, uniformly with replacement, the same ones for every method and assignment of a seed; each of the
    two bits of a drawn pair is flipped with probability `label_noise`. Adam at a constant rate; policy and reference
    start uniform. The defaults are the paper's settings.

    All runs are one tensor and Adam works entry by entry, so the runs do not affect each other.

    Raises `SettingError` for a count below 1, `beta <= 0`, a learning rate of 0 or below, or a method not in `RIVALS`.
    """
    counts = {"steps": steps, "batch_size": batch_size, "record_every": record_every}
    for name, value in {**counts, "seeds": len(seeds), "methods": len(methods)}.items():
        if value < 1:
            raise SettingError(f"{name}: got {value!r}; allowed: at least 1")
    check_number("learning_rate", learning_rate, gt=0)
    check_number("beta", beta, gt=0)
    check_number("label_noise", label_noise, ge=0, lt=0.5)
    for method in methods:
        _check_method(method)
    is_safe = is_safe.to(torch.float64)
    num_assignments, num_actions = is_safe.shape
    if num_actions < 2:
        raise SettingError(f"is_safe: got {num_actions} action; allowed: (A, n) with at least 2 actions to pair")
    first, second = torch.triu_indices(num_actions, num_actions, offset=1)
    draws = _draws(len(first), steps=steps, batch_size=batch_size, seeds=seeds, label_noise=label_noise)
    targets = _targets(methods, is_safe[:, first], is_safe[:, second], alpha)
    sign, weight = beta * targets.sign(), targets.abs()
    is_logistic, is_one_sided = (
        torch.tensor([RIVALS[method].link == link for method in methods])[:, None, None]
        for link in ("logistic", "one_sided")
    )
    # One row a pair: +1 for the more helpful action, -1 for the other.
    one = torch.eye(num_actions, dtype=torch.float64)
    incidence = (one[first] - one[second]).repeat(4, 1)

    logits = torch.zeros(len(seeds), len(methods), num_assignments, num_actions, dtype=torch.float64)
    adam = _Adam(logits, learning_rate)
    recorded, curve = [0], [torch.softmax(logits, dim=-1)]
    for step in range(1, steps + 1):
        # The reference is uniform, so a margin of log-ratios is a difference of logits.
        margin = logits @ incidence.T
        past = margin - targets / beta
        squared = 2 * torch.where(is_one_sided & (targets.sign() * past > 0), 0.0, past)
        slope = torch.where(is_logistic, -weight * sign * torch.sigmoid(-sign * margin), squared)
        adam.step((draws[step - 1][:, None, None, :] * slope) @ incidence)
        if step % record_every == 0 or step == steps:
            recorded.append(step)
            curve.append(torch.softmax(logits, dim=-1))
    return TabularRun(tuple(methods), is_safe, curve[-1], torch.tensor(recorded), torch.stack(curve))


class _Adam:
    """Adam (arXiv 1412.6980) with its usual decay rates and epsilon, in place on one tensor without autograd.

    Importing torch's own takes longer than the whole experiment; a test compares the two.
    """

    def __init__(self, values: Tensor, learning_rate: float) -> None:
        self.values = values
        self.learning_rate = learning_rate
        self.mean, self.square = torch.zeros_like(values), torch.zeros_like(values)
        self.num_steps = 0

    def step(self, gradient: Tensor) -> None:
        self.num_steps += 1
        self.mean.lerp_(gradient, 1 - 0.9)
        self.square.mul_(0.999).addcmul_(gradient, gradient, value=1 - 0.999)
        scale = (self.square / (1 - 0.999**self.num_steps)).sqrt_().add_(1e-8)
        self.values.addcdiv_(self.mean, scale, value=-self.learning_rate / (1 - 0.9**self.num_steps))

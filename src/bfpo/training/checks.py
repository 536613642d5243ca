"""Two checks: the loss of the first step against what the labels imply, and a warning when a run diverges.

Axes: P pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bfpo.core.errors import TrainingError
from bfpo.data.store import safety_labels, token_lengths
from bfpo.data.tokenize import TokenPair
from bfpo.objective.losses import loss_at_start
from bfpo.objective.methods import Beside, Method
from bfpo.policy.precision import margin_rounding

__all__ = ["DivergenceWatch", "StartCheck", "check_finite", "check_form", "check_rows", "implied_losses"]

_SEEN = ("message", "_observed", "_implied", "_last_step", "_above_since")


def implied_losses(pairs: Sequence[TokenPair], method: Method) -> Tensor:
    """Return the loss of each pair at margin 0, (P,) float64, from the data set's own labels."""
    return loss_at_start(*_labels(pairs), method=method)


def _labels(pairs: Sequence[TokenPair]) -> tuple[Tensor, Tensor]:
    chosen, rejected = safety_labels(pairs)
    return torch.tensor(chosen), torch.tensor(rejected)


@dataclass(frozen=True, slots=True)
class StartCheck:
    """The check of a first step, where policy = reference: the loss is what the labels imply at margin 0.

    `dtype`: of the computation. `log_vocabulary`: an upper bound of a trained model's loss per token, in nats, from
    which the size of log-probs is judged.
    """

    method: Method
    dtype: torch.dtype
    log_vocabulary: float
    reduction: str = "sum"

    def margin_tolerance(self, pairs: Sequence[TokenPair]) -> Tensor:
        """Return by how much each margin may differ from 0 through rounding alone, (P,) float64, in nats."""
        chosen_P, rejected_P = torch.tensor(token_lengths(pairs)[:, 1:]).unbind(1)
        scale: dict[str, Any] = {"dtype": self.dtype, "log_vocabulary": self.log_vocabulary}
        return margin_rounding(chosen_P, rejected_P, **scale, reduction=self.reduction, largest=True)

    def __call__(
        self,
        observed: float,
        pairs: Sequence[TokenPair],
        weights: Tensor,
        *,
        largest_margin: float | None = None,
        other_margin: Tensor | None = None,
        beside: Beside | None = None,
    ) -> None:
        """Compare the `observed` loss with the sum of `weights` (P,) x what each pair's labels imply.

        `other_margin` (P,), `beside`: see `preference_loss`. Raises `TrainingError` with both numbers where they differ
        by more than rounding of the margins explains.
        """
        chosen, rejected = _labels(pairs)

        def losses(drift: Tensor) -> Tensor:
            more: dict[str, Any] = {"other_margin": other_margin, "beside": beside}
            return loss_at_start(chosen, rejected, method=self.method, drift=drift, **more)

        # The tolerance comes from the loss itself, evaluated at both ends of the rounding of each margin. Its slope at
        # 0 is 2 target / beta if it is squared, 200 a nat as published, and about beta / 2 if logistic.
        error_P = self.margin_tolerance(pairs)
        implied_P = losses(torch.zeros_like(error_P))
        bounds = [(losses(sign * error_P) - implied_P).abs() for sign in (1, -1)]
        expected = float((weights * implied_P).sum())
        tolerance = float((weights * torch.maximum(*bounds)).sum()) + 1e-6 * abs(expected)
        if self.method.pointwise:  # there both answers of a pair can be off in the same direction; slopes are near beta
            tolerance += self.method.beta * float((weights.abs() * error_P).sum())
        if abs(observed - expected) <= tolerance:  # false for NaN
            return
        seen = "" if largest_margin is None else f"; the largest |margin| is {largest_margin:.4g} nats, 0 is right"
        raise TrainingError(
            f"first step: the loss is {observed:.6g}, the labels of its {len(pairs)} pairs imply {expected:.6g} "
            f"(within {tolerance:.2g}){seen}. Before the first update the policy is the reference and every margin is "
            "0, so the trainer is set up wrongly: check that dropout is off, that the reference has the weights the "
            "policy starts from, and that loss, labels and rows belong together (check_start=False if the policy "
            "starts elsewhere on purpose)"
        )


def check_rows(batch: Mapping[str, Any], pairs: Sequence[TokenPair]) -> None:
    """Compare a micro-batch with the P pairs it must hold: p the chosen, P + p the rejected completion of pair p.

    At margin 0 a swap of chosen and rejected leaves the squared loss as it is, so the loss alone cannot show it.
    Raises `TrainingError` naming the first pair that differs, and in what.
    """
    read = batch["input_ids"].flatten().cpu()[batch["source"].cpu()]
    targets, sequence = batch["targets"].cpu(), batch["sequence"].cpu()
    for p, pair in enumerate(pairs):
        for side, row, ids in (("chosen", p, pair.chosen_ids), ("rejected", len(pairs) + p, pair.rejected_ids)):
            mine = sequence == row
            side_words = "it" if pair.is_alone else f"its {side} completion"
            before = [pair.prompt_ids[-1], *ids[:-1]][: len(ids)]
            if targets[mine].tolist() != list(ids) or read[mine].tolist() != before:
                raise TrainingError(
                    f"first step: {pair.title}: place {row} of the batch must hold {side_words} and does not; the "
                    "batch was collated or reordered wrongly"
                )
            labels = batch[f"{side}_is_safe"]
            label = float(getattr(pair, f"{side}_is_safe"))
            if float(labels[p]) != label:
                raise TrainingError(
                    f"first step: {pair.title}: {side}_is_safe is {float(labels[p]):g} in the batch and "
                    f"{label:g} in the data; the batch was collated or reordered wrongly"
                )


def check_form(found: Tensor, alone: Tensor, tolerance: float, pair: TokenPair) -> None:
    """Compare the log-probs (2,) of a pair in a micro-batch with those of padded rows of its own, chosen one first.

    A reference that runs inside the step sees the same rows as the policy: rows in which pairs disturb each other give
    margin 0 as well, and the loss cannot show it. Raises `TrainingError` if they differ by more than `tolerance` nats.
    """
    difference = (found - alone).abs()
    if bool((difference <= tolerance).all()):  # false for NaN
        return
    side = int(difference.nan_to_num(torch.inf).argmax())
    raise TrainingError(
        f"first step: {pair.title}: the log-prob{_of_side(side, pair.is_alone)} is "
        f"{float(found[side]):.6g} in a packed row and {float(alone[side]):.6g} in a row of its own (rounding explains "
        f"{tolerance:.2g}): this model mixes the texts of a row. Set attention: padded"
    )


def _of_side(side: int, alone: bool) -> str:
    """Return whose log-prob it is: of the chosen (0) or the rejected (1) completion, or of one that stands alone."""
    return "" if alone else f" of its {('chosen', 'rejected')[side]} completion"


def check_finite(logps: Tensor, title: Callable[[int], str], *, alone: bool = False) -> None:
    """Raise `TrainingError` naming the first pair with a log-prob that is not finite.

    `logps` (2P,), chosen rows first; `title` gives that of pair p. `alone`: the pairs are single completions.
    """
    finite = torch.isfinite(logps)
    if bool(finite.all()):
        return
    row = int((~finite).nonzero()[0, 0])
    num_pairs = len(logps) // 2
    raise TrainingError(
        f"{title(row % num_pairs)}: the log-prob{_of_side(row // num_pairs, alone)} is "
        f"{float(logps[row])}; the weights have left the range of their dtype: lower learning_rate, or "
        "compute in float32"
    )


@dataclass(slots=True)
class DivergenceWatch:
    """Watches the smoothed normalised loss against what the labels of the same pairs imply at margin 0.

    Both are smoothed over about `window` optimizer steps. From the end of warm-up on, a smoothed loss above its initial
    value for `patience` steps in a row, or at the end of the run, is divergence: the targets are further away than
    before training. `slack` is the relative tolerance for noise.
    """

    learning_rate: float
    warmup_steps: int
    window: int = 20
    patience: int = 20
    slack: float = 0.02
    message: str | None = None
    _observed: float = field(default=0.0, init=False)
    _implied: float = field(default=0.0, init=False)
    _last_step: int = field(default=0, init=False)
    _above_since: int | None = field(default=None, init=False)

    @property
    def ratio(self) -> float:
        """Return smoothed loss / smoothed loss at the start; NaN before the first update."""
        return self._observed / self._implied if self._implied > 0 else math.nan

    def update(self, step: int, observed: float, implied: float, *, last: bool = False) -> str | None:
        """Add the mean losses since the last update, up to `step`; return the warning if it is due now.

        The warning is due once in a run. `last`: no update follows.
        """
        keep = math.exp(-(step - self._last_step) / self.window)
        self._observed = keep * self._observed + (1 - keep) * observed
        self._implied = keep * self._implied + (1 - keep) * implied
        started, self._last_step = self._last_step, step
        if step <= self.warmup_steps or not self.ratio > 1 + self.slack:
            self._above_since = None
            return None
        if self._above_since is None:
            self._above_since = max(started, self.warmup_steps)
        if self.message is not None or not (last or step - self._above_since >= self.patience):
            return None
        self.message = (
            f"diverging: at step {step} the smoothed normalised loss is {self.ratio:.2f} times its value at the start "
            f"(and above it since step {self._above_since}). Lower learning_rate: it is {self.learning_rate:g}, try "
            f"{self.learning_rate / 10:g}"
        )
        return self.message

    def state(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        return {name: getattr(self, name) for name in _SEEN}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        for name in _SEEN:
            setattr(self, name, state[name])

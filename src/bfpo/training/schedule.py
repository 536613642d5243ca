"""The learning rate of the first steps: a warm-up whose first step already learns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import Trainer

__all__ = ["FromFirstStep", "WarmTrainer"]

Factor = Callable[[int], float]


class FromFirstStep(LambdaLR):
    """A schedule whose warm-up is one step ahead: step k of W has (k + 1) / W of the peak, where it was k / W.

    At k / W the first optimizer step has learning rate 0. From step W on nothing differs. A checkpoint that was written
    without this class goes on with the warm-up that it had.
    """

    def __init__(self, optimizer: Optimizer, factors: list[Factor], warmup_steps: int) -> None:
        self.starts_at_zero = False  # saved with the state, as every attribute is
        self._warmup_steps = warmup_steps
        super().__init__(optimizer, [self._ahead(factor) for factor in factors])

    def _ahead(self, factor: Factor) -> Factor:
        def ahead(step: int) -> float:  # a plain function: torch saves the attributes of other callables
            is_ahead = step < self._warmup_steps and not self.starts_at_zero
            return factor(step + 1 if is_ahead else step)

        return ahead

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint; one of a plain `LambdaLR` keeps its warm-up from 0."""
        super().load_state_dict({"starts_at_zero": True, **state_dict})


class WarmTrainer(Trainer):
    """`transformers.Trainer` whose first optimizer step is not lost to a warm-up from 0."""

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """Return the schedule of the arguments, with `FromFirstStep` where its first step would have rate 0."""
        if self.lr_scheduler is not None:
            return self.lr_scheduler
        made: Any = super().create_scheduler(num_training_steps, optimizer)
        warmup_steps = int(self.args.get_warmup_steps(num_training_steps))
        if type(made) is LambdaLR and warmup_steps and not any(factor(0) for factor in made.lr_lambdas):
            made = FromFirstStep(made.optimizer, made.lr_lambdas, warmup_steps)
        self.lr_scheduler = made
        return self.lr_scheduler

"""Learning rate and steps: a warm-up whose first step already learns, and what so many steps can change."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import Trainer, TrainingArguments

from bfpo.core.errors import SettingError

__all__ = ["FromFirstStep", "WarmTrainer", "no_change", "steps_of"]

# With 1e-5 on each of 26.5 million weights (`down_proj` of SmolLM2-135M), in the direction that gains most, the margin
# of 8 pairs of 24 tokens grew by .9 nats; beta .1 asks for 10. Of more weights the same step moves more, about as the
# root of their number. A recipe for 7B models, 1,000 steps at 5e-7, is far above it.
_LEAST, _MEASURED = 1e-5, 26.5e6
_BOUNDED = ("adamw", "paged_adamw", "lion", "paged_lion")  # optimizers that move a weight by about the rate a step

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


def steps_of(args: TrainingArguments, num_rows: int, per_step: int) -> int:
    """Return the optimizer steps of a training on so many rows, `per_step` a step.

    Raises `SettingError` if none of them is full and `dataloader_drop_last` leaves the last one out.
    """
    per_epoch = (math.floor if args.dataloader_drop_last else math.ceil)(num_rows / per_step)
    if not per_epoch and args.dataloader_drop_last:
        raise SettingError(
            f"trainer_args.dataloader_drop_last: got true with {num_rows} rows, and a step takes {per_step}, so that "
            "nothing would be trained on; lower the rows of a step, or leave it out"
        )
    return args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)


def no_change(args: TrainingArguments, steps: int, num_weights: int) -> str:
    """Return the sentence on steps too few and too small to change behaviour, or nothing.

    It is about the optimizers that move a weight by about the learning rate a step, and about `num_weights` that train.
    """
    moves = steps * args.learning_rate
    optimizer = str(getattr(args.optim, "value", args.optim))
    if not optimizer.startswith(_BOUNDED) or moves >= _LEAST * min(1.0, math.sqrt(_MEASURED / max(num_weights, 1))):
        return ""
    return (
        f"expect no change of behaviour: {steps:,} step{'s' * (steps != 1)} at learning rate {args.learning_rate:g} "
        f"move{'s' * (steps == 1)} a weight by about {moves:.1g} at most; raise learning_rate or the number of steps"
    )

"""Imitation of completions: the token-level cross-entropy, on the rows and steps of `PackedTrainer`.

Axes: P completions; N = 2P places of the log-probs, of which the second half is empty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import (
    EvalPrediction,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from bfpo.data.pack import MicroBatch, on_device
from bfpo.data.store import token_lengths
from bfpo.data.tokenize import TokenPair
from bfpo.policy.logps import evaluating, sequence_logps
from bfpo.training.checks import check_finite
from bfpo.training.metrics import RunningLoss
from bfpo.training.packed import PackedTrainer

__all__ = ["SampleLoss", "SftTrainer"]


class SftTrainer(PackedTrainer):
    """Train a causal LM to imitate completions: `TokenPair`s without a rejected completion, in a list or on disk.

    The loss of an optimizer step is the sum of -log p over the completion tokens of all its rows, over all processes,
    divided by their number: every token weighs the same, however the step is cut. The held-out loss is the same mean
    over all held-out tokens. `loss` and `train_loss` in the log are means over the optimizer steps since the last row
    and of the whole run.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        *,
        train_dataset: Sequence[TokenPair],
        eval_dataset: Sequence[TokenPair] | None = None,
        processing_class: PreTrainedTokenizerBase,
        attention: str = "auto",
        max_tokens_per_microbatch: int | None = 8192,
        completions_per_microbatch: int | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            evals={} if eval_dataset is None else {"": eval_dataset},
            processing_class=processing_class,
            attention=attention,
            max_tokens=max_tokens_per_microbatch,
            max_pairs=completions_per_microbatch,
            callbacks=callbacks,
        )
        self._running = RunningLoss(self._end_step)
        self.add_callback(self._running)
        self._sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)  # nats and tokens of the step so far

    def _num_items(self, main: npt.NDArray[np.int64]) -> int:
        """Return the number of completion tokens of a step."""
        return int(self._num_tokens[main].sum())

    @cached_property
    def _num_tokens(self) -> npt.NDArray[np.int64]:
        return token_lengths(self.streams[0])[:, 1].astype(np.int64)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return this micro-batch's share of the step's loss, and the (P, 2) table of nats and tokens if asked.

        `num_items_in_batch` counts the completion tokens of the whole optimizer step, over all processes; without it
        the micro-batch is the step.
        """
        table_P2 = self._nats_and_tokens(model, inputs)
        nats = table_P2[:, 0].sum()
        if "is_filler" in inputs:
            return nats * 0.0  # with a graph: every process must run backward, as sharded weights are gathered there
        sums = table_P2.detach().sum(0)
        if self.model.training:
            self._sums += sums
        # Gradients are averaged over processes, and this is a share of a sum.
        loss = nats / sums[1] if num_items_in_batch is None else nats * (self.args.world_size / num_items_in_batch)
        return (loss, {"table": table_P2.detach()}) if return_outputs else loss

    def _nats_and_tokens(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        found = sequence_logps(model, inputs)
        check_finite(found.logps.detach(), lambda place: self._title(inputs, place), alone=True)
        num = len(inputs["pair_index"])
        return torch.stack([-found.logps[:num], found.num_tokens[:num].double()], dim=1)

    def _end_step(self) -> Tensor:
        sums = self._sum_over_processes(self._sums.clone())
        self._sums.zero_()
        loss: Tensor = sums[0] / sums[1].clamp(min=1)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the running losses of a run that may have been resumed."""
        self._running.fill(logs, self.state.global_step)
        super().log(logs, start_time)

    def _eval_table(self, model: nn.Module, inputs: MicroBatch) -> tuple[Tensor, Tensor]:
        table_P2 = self._nats_and_tokens(model, inputs)
        return table_P2, torch.zeros(len(table_P2), dtype=torch.int64, device=table_P2.device)

    def _eval_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        nats, tokens = np.asarray(prediction.predictions, np.float64).sum(axis=0)
        return {"loss": float(nats / tokens)}


class SampleLoss(TrainerCallback):
    """Logs `sample_loss` of the same rows of the training data before the first step, and at the end by `score`.

    Nats per completion token, without dropout. A row of the log is a mean over other completions than the next one, so
    that two of them do not tell whether the loss fell. At most `num` rows, drawn with the seed of the arguments; no
    random number of the training is drawn.
    """

    def __init__(self, trainer: SftTrainer, num: int = 64) -> None:
        rows = trainer.streams[0]
        drawn = np.random.default_rng(trainer.args.seed).choice(len(rows), min(num, len(rows)), replace=False)
        self._trainer, self._places = trainer, sorted(drawn.tolist())

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Score the start; the log of a run that is resumed has it."""
        if state.global_step == 0:
            self.score()

    def score(self) -> None:
        """Score and log the model as it is now; every process scores all rows, as sharded weights are gathered."""
        trainer = self._trainer
        rows = [trainer.streams[0][place] for place in self._places]
        sums = torch.zeros(2, dtype=torch.float64)
        with evaluating(trainer.model_wrapped), trainer.compute_loss_context_manager():
            for cut in trainer.data_collator.microbatches(rows, self._places, len(rows)):
                found = sequence_logps(trainer.model_wrapped, on_device(cut, trainer.args.device))
                num = len(cut["pair_index"])
                sums += torch.stack([-found.logps[:num].sum(), found.num_tokens[:num].sum()]).double().cpu()
        trainer.log({"sample_loss": float(sums[0] / sums[1])})

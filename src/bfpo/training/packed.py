"""The step that both trainers share: rows packed into micro-batches, and dealt among processes by their tokens.

`PackedTrainer` is a `transformers.Trainer` through its public hooks only. A subclass says what the loss of a
micro-batch is and what is reported of held-out rows.

Axes: P pairs (of `bfpo sft`: completions, each a pair without a rejected one); K columns of metrics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from bfpo.core.errors import SettingError
from bfpo.data.pack import MicroBatch, PairCollator, collate_pairs, deal, longest_text, on_device, pair_sizes
from bfpo.data.store import token_lengths
from bfpo.data.streams import TwoStreamDataset
from bfpo.data.tokenize import TokenPair
from bfpo.policy.load import pad_token_id
from bfpo.policy.logps import evaluating, sequence_logps
from bfpo.policy.precision import margin_rounding
from bfpo.policy.probe import choose_form
from bfpo.policy.source import num_embeddings
from bfpo.training.callbacks import EpochCallback, PaddingCallback
from bfpo.training.checkpoint import TrainedSaver
from bfpo.training.checks import check_form, check_rows
from bfpo.training.schedule import WarmTrainer
from bfpo.training.sharding import prepare_sharding

__all__ = ["PackedTrainer", "exact", "on_first_gpu"]

_first_gpu_only: ContextVar[bool] = ContextVar("_first_gpu_only", default=False)


@contextmanager
def on_first_gpu() -> Iterator[None]:
    """Let trainers in this process use the first of several GPUs: for work too short to be launched on all of them."""
    before = _first_gpu_only.set(True)
    try:
        yield
    finally:
        _first_gpu_only.reset(before)


class PackedTrainer(TrainedSaver, WarmTrainer):
    """Train a causal LM on micro-batches of packed or padded rows.

    Batches of the loader are cut into micro-batches of at most `max_tokens` tokens and `max_pairs` pairs. Several
    processes deal the pairs of a step among themselves by length, so that none waits for the longest texts of another,
    and leave out what the loader repeats at the end of an epoch. A subclass weights its loss so that a step does not
    depend on the cut. `attention` as in `choose_form`; `model` and `processing_class` (the tokenizer) as in `Trainer`.

    Raises `SettingError` for several GPUs in one process outside `on_first_gpu`, and what `choose_form` raises.
    """

    model: Any
    data_collator: Any
    checks_start = True
    """Whether the first step of a run compares its rows with the data, and packed rows with padded ones."""
    _evaluation_starts = True

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        *,
        train_dataset: Sequence[TokenPair],
        buffer_dataset: Sequence[TokenPair] | None = None,
        evals: Mapping[str, Sequence[TokenPair]],
        processing_class: PreTrainedTokenizerBase,
        attention: str,
        max_tokens: int | None,
        max_pairs: int | None = None,
        callbacks: Sequence[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
    ) -> None:
        if args.n_gpu > 1 and _first_gpu_only.get():
            args._n_gpu = 1  # as `Trainer` itself does for a model that it must not copy to all GPUs
        if args.n_gpu > 1:
            raise SettingError(
                f"{args.n_gpu} GPUs in one process are not supported; start one process per GPU (torchrun or "
                "accelerate launch), or make only one GPU visible"
            )
        pad = pad_token_id(processing_class, num_embeddings(model.config))
        super().__init__(
            model=model,
            args=args,
            data_collator=PairCollator(pad),
            train_dataset=TwoStreamDataset(train_dataset, buffer_dataset, seed=args.data_seed or 0),
            eval_dataset={name: TwoStreamDataset(pairs) for name, pairs in evals.items()} or None,
            processing_class=processing_class,
            compute_metrics=self._eval_metrics,
            callbacks=[EpochCallback(), PaddingCallback(), *(callbacks or [])],
            optimizers=optimizers,
        )
        prepare_sharding(self.accelerator, self.model)
        self.streams = [train_dataset, *([buffer_dataset] if buffer_dataset is not None else [])]
        with _autocast(self.model, str(self.accelerator.mixed_precision)):
            self.form = choose_form(
                self.model,
                attention,
                longest_text=max(map(longest_text, [*self.streams, *evals.values()])),
                process_index=args.process_index,
                num_processes=args.world_size,
            )
        self.data_collator = PairCollator(pad, self.form, max_tokens, max_pairs)
        # Both say that compute_loss divides by what the whole optimizer step holds; the first is the newer name.
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True
        self._use(self.streams, evals)

    def _use(self, streams: Sequence[Sequence[TokenPair]], evals: Mapping[str, Sequence[TokenPair]]) -> None:
        """Train on these streams, the main one and perhaps a buffer, and evaluate on these lists."""
        self.streams = list(streams)
        self.train_dataset = TwoStreamDataset(*streams, seed=self.args.data_seed or 0)
        sets = {name: TwoStreamDataset(pairs) for name, pairs in evals.items()}
        self.eval_dataset = sets[""] if set(sets) == {""} else (sets or None)

    # The batches of an optimizer step, and the step

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Return the batches of one optimizer step and `_num_items` of it, over all processes.

        With several processes the batches hold this process' share of the step, see `_share_of_step`.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        loaded = [index_P[: len(index_P) // len(self.streams)] for index_P in (b["pair_index"] for b in batches)]
        if self.args.world_size == 1 or not batches:
            whole = [one for batch in batches for one in batch["microbatches"]]
            self._start_step(self.model_wrapped, whole)
            return batches, self._num_items(torch.cat(loaded).numpy()) if loaded else 0
        microbatches, main = self._share_of_step(loaded)
        self._start_step(self.model_wrapped, microbatches)
        # The last batch ends the step, and is the only one that is sure to get a micro-batch.
        cuts = [len(microbatches) * k // len(batches) for k in range(len(batches) + 1)]
        return [{"microbatches": microbatches[start:stop]} for start, stop in pairwise(cuts)], self._num_items(main)

    def _num_items(self, main: npt.NDArray[np.int64]) -> int:
        """Return what the loss of a step is a mean over, given the places of its main pairs: their number."""
        return len(main)

    def _start_step(self, model: nn.Module, microbatches: list[MicroBatch]) -> None:
        """Look at all pairs of a step before its first micro-batch."""

    def _start_evaluation(self, model: nn.Module) -> None:
        """Look at all held-out pairs before the first of their micro-batches."""

    def _share_of_step(self, loaded: Sequence[Tensor]) -> tuple[list[MicroBatch], npt.NDArray[np.int64]]:
        """Return this process' micro-batches of a step, and the places of all main pairs of the step.

        `loaded`: the places of the main pairs of each batch of this process. All processes learn each other's, leave
        out what accelerate has repeated to fill up the last batch of an epoch, and deal the pairs of both streams by
        their tokens. The loss is the same however a step is divided.
        """
        mine = [index_P.to(self.args.device) for index_P in loaded]
        main = torch.cat([self.accelerator.gather(index_P) for index_P in mine]).cpu().numpy()
        # `gather_for_metrics` leaves it out too, but not in an epoch that a resumed run has entered midway.
        data = cast(TwoStreamDataset, self.train_dataset)
        ragged = len(data) % (self.args.train_batch_size * self.args.world_size)
        if self.accelerator.gradient_state.end_of_dataloader and ragged and not self.args.dataloader_drop_last:
            main = main[: len(main) - len(mine[-1]) * self.args.world_size + ragged]
        main.sort()
        places = [main, *([data.buffer_index()[main]] if data.has_buffer else [])]
        sizes = np.concatenate([sizes[index] for sizes, index in zip(self._sizes, places, strict=True)])
        indices = np.concatenate(places)
        share = deal(sizes.tolist(), self.args.world_size)[self.args.process_index]

        def microbatches(of: Sequence[int]) -> list[MicroBatch]:
            pairs = [self.streams[int(place >= len(main))][int(indices[place])] for place in of]
            num_main = sum(place < len(main) for place in of)
            cut: list[MicroBatch] = self.data_collator.microbatches(pairs, indices[of].tolist(), num_main)
            return cut

        found = microbatches(share) if share else []
        return self._in_step(found, lambda: microbatches([int(sizes.argmin())])[0]), main

    def _in_step(self, microbatches: list[MicroBatch], cheapest: Callable[[], MicroBatch]) -> list[MicroBatch]:
        """Return the same number of micro-batches in every process, filled up with `cheapest()` at weight 0.

        Sharded weights are gathered once for each micro-batch, by all processes together; DDP sends buffers in some.
        """
        if self.args.world_size == 1:
            return microbatches
        counts = self.accelerator.gather(torch.tensor([len(microbatches)], device=self.args.device))
        missing = int(counts.max()) - len(microbatches)
        return ([{**cheapest(), "is_filler": True}] * missing if missing else []) + microbatches

    @cached_property
    def _sizes(self) -> list[Any]:
        return [pair_sizes(token_lengths(pairs), form=self.form) for pairs in self.streams]

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run the micro-batches of one batch; in the first optimizer step of a run, check each against the data."""
        losses = []
        microbatches = inputs["microbatches"]
        check = self.checks_start and self.state.global_step == 0
        for number, microbatch in enumerate(microbatches, start=1):
            with nullcontext() if number == len(microbatches) else self._accumulating(model):
                losses.append(self._microbatch_step(model, microbatch, num_items_in_batch, check=check))
            if check and number == 1:
                self._check_form(model, microbatch)
        return torch.stack(losses).sum() if losses else torch.zeros((), device=self.args.device)

    def _microbatch_step(
        self, model: nn.Module, microbatch: MicroBatch, num_items: Tensor | int | None, *, check: bool
    ) -> Tensor:
        """Run forward and backward pass of one micro-batch and return its loss."""
        loss = super().training_step(model, {**microbatch, "exact": _Exact(_floats(microbatch))}, num_items)
        if check and "is_filler" not in microbatch:
            check_rows(microbatch, self._pairs_of(microbatch))
        return loss

    @contextmanager
    def _accumulating(self, model: nn.Module) -> Iterator[None]:
        """Do not synchronise gradients: another micro-batch of the same step follows.

        FSDP2 does all the same: it would keep the whole gradients in every process until the last micro-batch.
        """
        ends_step = self.accelerator.sync_gradients
        self.accelerator.sync_gradients = False
        try:
            with nullcontext() if self.is_fsdp_enabled else self.accelerator.no_sync(model):
                yield
        finally:
            self.accelerator.sync_gradients = ends_step

    def _sum_over_processes(self, sums: Tensor) -> Tensor:
        if self.args.world_size == 1:
            return sums
        total: Tensor = self.accelerator.reduce(sums, reduction="sum")
        return total

    # The check of the rows in the first step

    def _check_form(self, model: nn.Module, inputs: MicroBatch) -> None:
        """Compare the last pair of a packed micro-batch, behind all others in its row, with padded rows of its own.

        Every process takes two forward passes here, also with a filler, since sharded weights are gathered together.
        """
        if inputs.get("layout") is None:
            return
        inputs = on_device(inputs, self.args.device)
        pair = self._pairs_of(inputs)[-1]
        batch = collate_pairs([pair], pad_token_id=self.data_collator.pad_token_id, form="padded")
        with evaluating(model), self.compute_loss_context_manager():  # without dropout
            found = sequence_logps(model, inputs).logps.cpu()
            alone = sequence_logps(model, on_device(batch, self.args.device)).logps.cpu()
        lengths = torch.tensor(token_lengths([pair])[:, 1:]).unbind(1)
        tolerance = float(margin_rounding(*lengths, **self._scale, largest=True))
        check_form(found.view(2, -1)[:, -1], alone, tolerance, pair)

    @property
    def _scale(self) -> dict[str, Any]:
        """The size of rounding: keyword arguments of `margin_rounding`."""
        log_vocabulary = math.log(self.model.config.get_text_config().vocab_size)
        return {"dtype": _computed_in(self.args, self.model), "log_vocabulary": log_vocabulary}

    def _pairs_of(self, inputs: Mapping[str, Any]) -> list[TokenPair]:
        places = zip(inputs["is_buffer"].tolist(), inputs["pair_index"].tolist(), strict=True)
        return [self.streams[int(is_buffer)][index] for is_buffer, index in places]

    def _title(self, inputs: Mapping[str, Any], place: int) -> str:
        if self.model.training:
            return self._pairs_of(inputs)[place].title
        return f"position {int(inputs['pair_index'][place])} of the evaluation data"

    # Evaluation

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Return the batches of all held-out rows: `dataloader_drop_last` is about the steps of training."""
        drops, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = drops

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate; the first batch, which comes with the model as it is then wrapped, starts with all pairs."""
        self._evaluation_starts = True
        return super().evaluation_loop(*args, **kwargs)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the (P, K) table of metrics as predictions and the groups of the pairs (P,) as labels."""
        tables, groups, places = [], [], []
        cut: list[MicroBatch] = inputs["microbatches"]
        if self._evaluation_starts:
            self._evaluation_starts = False
            self._start_evaluation(model)
        for microbatch in self._in_step(cut, lambda: min(cut, key=lambda one: one["input_ids"].numel())):
            on_it = on_device(microbatch, self.args.device)
            with torch.no_grad(), self.compute_loss_context_manager():
                table_PK, group_P = self._eval_table(model, on_it)
            if "is_filler" in on_it:
                continue
            tables.append(table_PK)
            groups.append(group_P)
            places.append(on_it["place"])
        order = torch.cat(places).argsort()  # in the loader's order: the end of a ragged batch is cut off later
        return None, torch.cat(tables)[order], torch.cat(groups)[order]

    def _eval_table(self, model: nn.Module, inputs: MicroBatch) -> tuple[Tensor, Tensor]:
        """Return what is summed over held-out pairs, (P, K), and the group of each, (P,)."""
        raise NotImplementedError

    def _eval_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Return the metrics of held-out pairs from their tables and groups."""
        raise NotImplementedError

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return 6 x tokens x parameters; the parameters are counted once, not in every step."""
        num_tokens = sum(microbatch["input_ids"].numel() for microbatch in inputs["microbatches"])
        return 6 * int(num_tokens) * self._num_parameters

    @cached_property
    def _num_parameters(self) -> int:
        return int(sum(parameter.numel() for parameter in self.model.parameters()))


@dataclass(frozen=True, slots=True)
class _Exact:
    """Tensors that `Trainer` does not see: under DeepSpeed it casts those of its inputs to the dtype of the weights."""

    tensors: Mapping[str, Tensor]


def _floats(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in inputs.items() if isinstance(value, Tensor) and value.is_floating_point()}


def exact(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a micro-batch as it was collated, its float64 tensors in float64, on the device where it is now."""
    if "exact" not in inputs:
        return inputs
    return {**inputs, **on_device(inputs["exact"].tensors, inputs["input_ids"].device)}


def _autocast(model: nn.Module, mixed_precision: str) -> AbstractContextManager[Any]:
    """Return the autocast of the device where the model is now: before it is sharded this is not that of training.

    That of accelerate is of the GPU, and none under DeepSpeed.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision)
    device = next(model.parameters()).device.type
    return nullcontext() if dtype is None or device == "meta" else torch.autocast(device, dtype)


def _computed_in(args: TrainingArguments, model: nn.Module) -> torch.dtype:
    """Return the least precise dtype that the log-probs go through."""
    if args.bf16:
        return torch.bfloat16
    if args.fp16:
        return torch.float16
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())

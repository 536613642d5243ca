"""Preference training on two streams: a `transformers.Trainer` through its public hooks only."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments

from bfpo.data.columns import reference_logps
from bfpo.data.pack import MicroBatch, PairCollator, collate_pairs, longest_text, on_device
from bfpo.data.streams import TwoStreamDataset
from bfpo.data.tokenize import TokenPair
from bfpo.errors import SettingError
from bfpo.objective.losses import add_anchor, anchor, get_method, preference_loss
from bfpo.policy.load import pad_token_id
from bfpo.policy.logps import sequence_logps
from bfpo.policy.probe import choose_form
from bfpo.policy.reference import Reference, choose_reference, make_reference
from bfpo.policy.reference_pass import MAX_TOKENS, ReferencePass, ReferenceReport
from bfpo.training.arguments import BFPOConfig
from bfpo.training.callbacks import EpochCallback
from bfpo.training.checks import DivergenceWatch, StartCheck, check_finite, check_rows, implied_losses
from bfpo.training.metrics import COLUMNS, STREAMS, CellMetrics, PairFigures, group_index, step_loss, summarise
from bfpo.training.running import RunningLoss
from bfpo.training.sharding import is_sharded, prepare_sharding

__all__ = ["BFPOConfig", "BFPOTrainer"]

logger = logging.getLogger(__name__)


class BFPOTrainer(Trainer):
    """Train a causal LM on preference pairs with safety labels, with an optional second stream.

    `train_dataset` is the main stream and sets the epoch; each of its pairs comes with one of `buffer_dataset`, which
    is drawn in shuffled cycles. The loss of an optimizer step is the mean over its main pairs + `buffer_weight` x the
    mean over its buffer pairs, dropped pairs counted as 0, however the step is cut into micro-batches and processes:
    every micro-batch is weighed by its pairs, so that a last, shorter one changes nothing. Batches of the loader are
    cut into micro-batches of at most `max_tokens_per_microbatch` tokens. (With several processes and a ragged last
    step, accelerate repeats a few pairs to fill it up; `dataloader_drop_last` avoids that.)

    `model` must have dropout off and trainable parameters chosen (`bfpo.policy.load.load_policy` does both); as it is
    now, with its adapter off, it is the reference, unless `reference` is an object of that protocol.
    `processing_class` is the tokenizer, needed for the padding id and saved with the model.

    Raises `SettingError` for settings that do not fit, `TrainingError` for a first step that is not what the labels
    imply and for log-probs that are not finite.
    """

    model: Any
    args: BFPOConfig
    data_collator: Any

    def __init__(
        self,
        model: Any,
        args: BFPOConfig,
        *,
        train_dataset: Sequence[TokenPair],
        buffer_dataset: Sequence[TokenPair] | None = None,
        eval_dataset: Sequence[TokenPair] | Mapping[str, Sequence[TokenPair]] | None = None,
        processing_class: PreTrainedTokenizerBase,
        reference: Reference | Literal["auto", "precompute", "swap", "adapter_off"] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
    ) -> None:
        if args.n_gpu > 1:
            raise SettingError(
                f"{args.n_gpu} GPUs in one process are not supported; start one process per GPU (torchrun or "
                "accelerate launch), or show it one GPU"
            )
        evals = eval_dataset if isinstance(eval_dataset, Mapping) else {"": eval_dataset} if eval_dataset else {}
        super().__init__(
            model=model,
            args=args,
            data_collator=PairCollator(pad_token_id(processing_class)),
            train_dataset=TwoStreamDataset(train_dataset, buffer_dataset, seed=args.data_seed or 0),
            eval_dataset={name: TwoStreamDataset(pairs) for name, pairs in evals.items()} or None,
            processing_class=processing_class,
            compute_metrics=self._eval_metrics,
            callbacks=[EpochCallback(), *(callbacks or [])],
            optimizers=optimizers,
        )
        prepare_sharding(self.accelerator)
        self._method = get_method(args.method)
        pair_lists = [train_dataset, *([buffer_dataset] if buffer_dataset is not None else []), *evals.values()]
        with self.accelerator.autocast():
            self.form = choose_form(
                self.model,
                args.attention,
                longest_text=max(map(longest_text, pair_lists)),
                process_index=args.process_index,
                num_processes=args.world_size,
            )
        self.data_collator = PairCollator(pad_token_id(processing_class), self.form, args.max_tokens_per_microbatch)
        # Both say that compute_loss divides by the pairs of the whole optimizer step; the first is the newer name.
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True
        self._streams = [train_dataset, *([buffer_dataset] if buffer_dataset is not None else [])]
        self._set_reference(reference or args.reference, evals)
        self.train_dataset = TwoStreamDataset(*self._streams, seed=args.data_seed or 0)
        self._implied = [implied_losses(pairs, args.loss_settings()).to(args.device) for pairs in self._streams]
        self._metrics = CellMetrics(args.device)
        self._running = RunningLoss(self._end_step, save=self._running_state, load=self._load_running_state)
        self._num_parameters: int | None = None
        self._largest_margin: Tensor | None = None
        self._anchor_share: Tensor | float = 0.0
        self.watch: DivergenceWatch | None = None
        self.add_callback(self._running)

    # Reference

    def _set_reference(self, reference: Any, evals: Mapping[str, Sequence[TokenPair]]) -> None:
        pair_lists: list[Sequence[TokenPair]] = [*self._streams, *evals.values()]
        num_streams = len(self._streams)
        self.reference_report: ReferenceReport | None = None
        if isinstance(reference, str):
            known = all(reference_logps(pairs) is not None for pairs in pair_lists)
            if reference == "auto" and known:
                reference = "precompute"
            looked_up = self._look_up(pair_lists) if reference in ("auto", "precompute") and not known else None
            sharded = is_sharded(self)  # then held-out rows count too: no row is computed here
            reference = choose_reference(
                reference,
                num_to_compute=looked_up.num_missing(None if sharded else range(num_streams)) if looked_up else 0,
                num_pairs_seen=num_streams * self._num_main_pairs_seen(),
                has_adapter=hasattr(self.model, "disable_adapter"),
                sharded=sharded,
            )
            if reference == "precompute" and looked_up is not None:
                pair_lists = [*self._with_reference(looked_up)]
            self.reference_name: str = reference
            reference = make_reference(reference, self.model)
        else:
            self.reference_name = type(reference).__name__
        self.reference: Reference = reference
        self._streams = pair_lists[:num_streams]
        sets = {name: TwoStreamDataset(pairs) for name, pairs in zip(evals, pair_lists[num_streams:], strict=True)}
        self.eval_dataset = sets[""] if set(sets) == {""} else (sets or None)

    def _num_main_pairs_seen(self) -> int:
        args = self.args
        per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        if args.max_steps > 0:
            return int(args.max_steps * per_step)
        return math.ceil(args.num_train_epochs * len(self._streams[0]))

    def _look_up(self, pair_lists: Sequence[Sequence[TokenPair]]) -> ReferencePass:
        return ReferencePass(
            self.model,
            pair_lists,
            cache=self.args.reference_cache,
            mixed_precision=str(self.accelerator.mixed_precision),
            process_index=self.args.process_index,
            num_processes=self.args.world_size,
        )

    def _with_reference(self, looked_up: ReferencePass) -> list[Sequence[TokenPair]]:
        def collate(some: Sequence[TokenPair]) -> dict[str, Tensor]:
            batch = collate_pairs(some, pad_token_id=self.data_collator.pad_token_id, form=self.form)
            return on_device(batch, self.args.device)

        with self.accelerator.autocast():
            pair_lists, self.reference_report = looked_up.run(
                collate=collate, max_tokens=self.args.max_tokens_per_microbatch or MAX_TOKENS
            )
        return pair_lists

    # Loss

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Return the batches of one optimizer step and the number of its pairs of each stream, over all processes.

        Every process gets as many micro-batches as the one with most (see `_in_step`).
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        num_pairs = sum(len(batch["pair_index"]) for batch in batches) // len(self._streams)
        if self.args.world_size > 1:
            num_pairs = int(self.accelerator.gather(torch.tensor([num_pairs], device=device)).sum())
            for batch in batches:
                batch["microbatches"] = self._in_step(batch["microbatches"])
        return batches, num_pairs

    def _in_step(self, microbatches: list[MicroBatch]) -> list[MicroBatch]:
        """Return as many micro-batches in every process, filled up with copies that count for nothing.

        Sharded weights are gathered once for each micro-batch, by all processes together.
        """
        if self.args.world_size == 1:
            return microbatches
        counts = self.accelerator.gather(torch.tensor([len(microbatches)], device=self.args.device))
        filler = {**microbatches[0], "is_filler": True}
        return [filler] * (int(counts.max()) - len(microbatches)) + microbatches

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return this micro-batch's share of the step's loss, and the (P, K) table of metrics as output if asked.

        `inputs` is one micro-batch. `num_items_in_batch` counts the pairs of each stream in the whole optimizer step,
        over all processes; without it the micro-batch is the step.
        """
        figures, total = self.pair_losses(model, inputs)
        if "is_filler" in inputs:
            return total.sum() * 0.0
        weights = self._weights(inputs["is_buffer"], num_items_in_batch)
        table = figures.table()
        if self.model.training:
            self._metrics.add(table, _groups(inputs))
            self._largest_margin = figures.margin.abs().max()
            self._anchor_share = (weights * (total.detach() - figures.pair_loss.loss.detach())).sum()
        loss = (weights * total).sum()
        return (loss, {"table": table}) if return_outputs else loss

    def pair_losses(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[PairFigures, Tensor]:
        """Return what is known of the P pairs of a micro-batch and their (P,) losses with the anchor and the gradient.

        One forward pass holds chosen and rejected rows of both streams.
        """
        args = self.args
        ref_logps = self.reference.logps(model, inputs)
        found = sequence_logps(model, inputs)
        check_finite(found.logps.detach(), lambda place: self._pair_name(inputs, place))
        num_pairs = len(inputs["pair_index"])
        drift = found.logps - ref_logps
        tokens = found.num_tokens.double()
        log_ratio = drift / tokens if args.reduction == "mean" else drift
        margin = log_ratio[:num_pairs] - log_ratio[num_pairs:]
        labels = (inputs["chosen_is_safe"], inputs["rejected_is_safe"])
        pair_loss = preference_loss(margin, *labels, **args.loss_settings())
        total, anchors = pair_loss.loss, torch.zeros_like(margin)
        if args.anchor_weight > 0:
            mean_nll = -found.logps / tokens
            anchors = anchor(pair_loss.favoured, mean_nll[:num_pairs], mean_nll[num_pairs:], *labels)
            total = add_anchor(total, anchors, anchor_weight=args.anchor_weight, method=args.method, beta=args.beta)
        figures = PairFigures(
            pair_loss=pair_loss,
            margin=margin.detach(),
            beta=args.beta,
            chosen_drift=drift.detach()[:num_pairs],
            rejected_drift=drift.detach()[num_pairs:],
            chosen_tokens=found.num_tokens[:num_pairs],
            rejected_tokens=found.num_tokens[num_pairs:],
            loss_at_start=self._loss_at_start(inputs),
            anchor=anchors.detach(),
        )
        return figures, total

    def _weights(self, is_buffer: Tensor, num_pairs: Tensor | int | None) -> Tensor:
        """Return (P,) weights that sum to 1 over the main pairs of a step, and to `buffer_weight` over the buffer's."""
        ones = torch.ones_like(is_buffer, dtype=torch.float64)
        if num_pairs is None:
            main, buffer = (ones / max(1, int(mask.sum())) for mask in (~is_buffer, is_buffer))
        else:  # gradients are averaged over processes
            main = buffer = ones * (self.accelerator.num_processes / num_pairs)
        return torch.where(is_buffer, self.args.buffer_weight * buffer, main)

    def _loss_at_start(self, inputs: Mapping[str, Any]) -> Tensor:
        index, is_buffer = inputs["pair_index"], inputs["is_buffer"]
        if not self.model.training:
            return torch.zeros(len(index), dtype=torch.float64, device=index.device)
        main = self._implied[0][index[~is_buffer]]
        return torch.cat([main, self._implied[1][index[is_buffer]]]) if len(self._streams) > 1 else main

    def _pairs_of(self, inputs: Mapping[str, Any]) -> list[TokenPair]:
        places = zip(inputs["is_buffer"].tolist(), inputs["pair_index"].tolist(), strict=True)
        return [self._streams[int(is_buffer)][index] for is_buffer, index in places]

    def _pair_name(self, inputs: Mapping[str, Any], place: int) -> str:
        if self.model.training:
            return self._pairs_of(inputs)[place].pair_id
        return f"at position {int(inputs['pair_index'][place])} of the evaluation data"

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run the micro-batches of one batch; in the first optimizer step of a run, check each against the labels."""
        losses = []
        microbatches = inputs["microbatches"]
        for number, microbatch in enumerate(microbatches, start=1):
            with nullcontext() if number == len(microbatches) else self._accumulating(model):
                losses.append(super().training_step(model, microbatch, num_items_in_batch))
            if self.args.check_start and self.state.global_step == 0 and "is_filler" not in microbatch:
                self._check_first_step(float(losses[-1]), microbatch, num_items_in_batch)
        return torch.stack(losses).sum()

    @contextmanager
    def _accumulating(self, model: nn.Module) -> Iterator[None]:
        """Leave gradients where they are: another micro-batch of the same step follows."""
        ends_step = self.accelerator.sync_gradients
        self.accelerator.sync_gradients = False
        try:
            with self.accelerator.no_sync(model):
                yield
        finally:
            self.accelerator.sync_gradients = ends_step

    def _check_first_step(self, loss: float, inputs: Mapping[str, Any], num_pairs: Tensor | int | None) -> None:
        pairs = self._pairs_of(inputs)
        check_rows(inputs, pairs)
        check = StartCheck(
            self.args.loss_settings(),
            dtype=_computed_in(self.args, self.model),
            log_vocabulary=math.log(self.model.config.vocab_size),
            reduction=self.args.reduction,
        )
        check(
            loss - float(self._anchor_share),
            pairs,
            self._weights(inputs["is_buffer"], num_pairs).cpu(),
            largest_margin=None if self._largest_margin is None else float(self._largest_margin),
        )

    # Logs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the metrics by stream and label cell since the last log of training.

        `loss` is the mean over the optimizer steps since then, `train_loss` over those of the run, resumed or not, of
        what their gradients are of: mean(main) + `buffer_weight` x mean(buffer), the anchor included.
        """
        ends = "train_runtime" in logs
        if ends or "learning_rate" in logs:
            self._running.fill(logs, self.state.global_step)
            if not self._metrics.empty:
                sums = self._metrics.read()
                logs.update(self._named(sums))
                self._watch(sums, logs, last=ends or self.state.global_step >= self.state.max_steps)
        super().log(logs, start_time)

    def _end_step(self) -> Tensor:
        anchor_factor = self.args.anchor_weight / self._method.normaliser(self.args.beta)
        sums = self._metrics.end_step(self._sum_over_processes)
        return step_loss(sums, buffer_weight=self.args.buffer_weight, anchor_factor=anchor_factor)

    def _running_state(self) -> dict[str, Any]:
        return {"sums": self._metrics.state(), "watch": None if self.watch is None else self.watch.state()}

    def _load_running_state(self, state: Mapping[str, Any] | None) -> None:
        self._metrics.load(state["sums"] if state else None)
        self.watch = None
        if state and state["watch"]:
            self.watch = self._new_watch()
            self.watch.load(state["watch"])

    def _sum_over_processes(self, sums: Tensor) -> Tensor:
        if self.args.world_size == 1:
            return sums
        total: Tensor = self.accelerator.reduce(sums, reduction="sum")
        return total

    def _named(self, sums: Sequence[Sequence[float]]) -> dict[str, float]:
        return summarise(
            sums,
            normaliser=self._method.normaliser(self.args.beta),
            has_target=self._method.has_target,
            anchored=self.args.anchor_weight > 0,
        )

    def _new_watch(self) -> DivergenceWatch:
        return DivergenceWatch(self.args.learning_rate, self.args.get_warmup_steps(self.state.max_steps))

    def _watch(self, sums: Sequence[Sequence[float]], logs: dict[str, float], *, last: bool) -> None:
        if self.watch is None:
            self.watch = self._new_watch()
        total = dict(zip(COLUMNS, (sum(column) for column in zip(*sums, strict=True)), strict=True))
        warning = self.watch.update(
            self.state.global_step,
            total["loss"] / total["num_pairs"],
            total["loss_at_start"] / total["num_pairs"],
            last=last,
        )
        logs["loss_over_start"] = self.watch.ratio
        if warning is not None:
            logs["diverging"] = 1.0
            logger.warning(warning)

    # Evaluation

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the (P, K) table of metrics as predictions and the label cells (P,) as labels."""
        tables, groups, places = [], [], []
        for microbatch in self._in_step(inputs["microbatches"]):
            on_it = on_device(microbatch, self.args.device)
            with torch.no_grad(), self.compute_loss_context_manager():
                figures, _ = self.pair_losses(model, on_it)
            if "is_filler" in on_it:
                continue
            tables.append(figures.table())
            groups.append(_groups(on_it))
            places.append(on_it["place"])
        order = torch.cat(places).argsort()  # as the loader gave them: the end of a ragged batch is cut off later
        return None, torch.cat(tables)[order], torch.cat(groups)[order]

    def _eval_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        metrics = CellMetrics(torch.device("cpu"))
        metrics.add(torch.as_tensor(prediction.predictions), torch.as_tensor(prediction.label_ids))
        named = self._named(metrics.read())
        kept = {name: value for name, value in named.items() if not name.endswith("/loss_at_start")}
        return {name.removeprefix(f"{STREAMS[0]}/"): value for name, value in kept.items()}

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return 6 x tokens x parameters; the parameters are counted once, not in every step."""
        if self._num_parameters is None:
            self._num_parameters = int(sum(parameter.numel() for parameter in self.model.parameters()))
        num_tokens = sum(microbatch["input_ids"].numel() for microbatch in inputs["microbatches"])
        return 6 * int(num_tokens) * self._num_parameters


def _groups(inputs: Mapping[str, Any]) -> Tensor:
    return group_index(inputs["chosen_is_safe"], inputs["rejected_is_safe"], inputs["is_buffer"])


def _computed_in(args: TrainingArguments, model: nn.Module) -> torch.dtype:
    """Return the least precise dtype that the log-probs go through."""
    if args.bf16:
        return torch.bfloat16
    if args.fp16:
        return torch.float16
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())

"""Preference training on two streams, on the rows and steps of `PackedTrainer`.

Read `BFPOTrainer` from top to bottom: the step, its loss, the check of the first loss, the reference, logs,
evaluation. Log-probs come from `bfpo.policy.logps`, the loss of a pair from `bfpo.objective`, what is logged from
`bfpo.training.metrics`.

Axes: P pairs, N = 2P completions (the P chosen ones first), K columns of metrics.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedTokenizerBase, TrainerCallback

from bfpo.core.errors import SettingError
from bfpo.data.pack import MicroBatch, collate_pairs, on_device
from bfpo.data.store import reference_logps
from bfpo.data.tokenize import TokenPair
from bfpo.objective.losses import anchor, anchor_factor, loss_at_start, preference_loss
from bfpo.objective.methods import Beside, ReadsBeside
from bfpo.policy.logps import sequence_logps
from bfpo.policy.precision import margin_rounding
from bfpo.policy.reference.forward_pass import MAX_TOKENS, ReferencePass, ReferenceReport
from bfpo.policy.reference.sources import Reference, choose_reference, make_reference
from bfpo.training.arguments import BFPOConfig
from bfpo.training.beside import MethodInputs, check_paired, looked_up
from bfpo.training.checks import (
    DivergenceWatch,
    StartCheck,
    check_finite,
    implied_losses,
)
from bfpo.training.margin import check_margin_logps
from bfpo.training.metrics import PairFigures, TrainingRecord, group_index
from bfpo.training.packed import PackedTrainer, exact
from bfpo.training.sharding import is_sharded, shard_now

__all__ = ["BFPOConfig", "BFPOTrainer"]


class BFPOTrainer(PackedTrainer):
    """Train a causal LM on preference pairs with safety labels, with an optional second stream.

    `train_dataset` is the main stream and sets the epoch; each of its pairs comes with one of `buffer_dataset`, which
    is drawn in shuffled cycles. The loss of an optimizer step is the mean over its main pairs + `buffer_weight` x the
    mean over its buffer pairs, dropped pairs counted as 0, however the step is cut into micro-batches and processes:
    every micro-batch is weighted by its pairs, so that a shorter last one changes nothing. Micro-batches have at most
    `max_tokens_per_microbatch` tokens.

    `model` must have dropout off and trainable parameters chosen (`bfpo.policy.load.load_policy` does both); as it is
    now, with its adapter off, it is the reference, unless `reference` is an object of that protocol. `margin_logps`,
    which modpo needs: the log-probs of the safety model as `bfpo.training.margin` gives them, (P, 2) for the main
    stream, the buffer if there is one, and one held-out list. `categories`: of the same lists, the category of harm of
    each pair, "" for none; cat_dpo reads them. `processing_class` is the tokenizer, needed for the
    padding id and saved with the model. `streams`: the main stream and the buffer, with what was precomputed.

    Raises `SettingError` for settings that do not fit, `TrainingError` for a first step that is not what the labels
    imply and for log-probs that are not finite.
    """

    model: Any
    args: BFPOConfig
    data_collator: Any

    only_reads: ClassVar[bool] = False
    """Whether it makes the reference pass and never trains: under FSDP2 it then shards the model for the pass."""

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
        margin_logps: Sequence[Tensor] | None = None,
        categories: Sequence[Sequence[str]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
    ) -> None:
        evals = eval_dataset if isinstance(eval_dataset, Mapping) else {"": eval_dataset} if eval_dataset else {}
        streams = [train_dataset, *([buffer_dataset] if buffer_dataset is not None else [])]
        lists = [*streams, *evals.values()]
        self.method = args.method_object()
        check_paired(self.method, lists)
        if len(evals) > 1 and (self.method.shifted or isinstance(self.method, ReadsBeside)):
            raise SettingError(
                f"eval_dataset: got {len(evals)} lists ({', '.join(evals)}) with the method {self.method.name!r}, "
                "which looks held-out pairs up by their place in one list; give one list"
            )
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            buffer_dataset=buffer_dataset,
            evals=evals,
            processing_class=processing_class,
            attention=args.attention,
            max_tokens=args.max_tokens_per_microbatch,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.checks_start = args.check_start
        self.reference, self.reference_name, lists, self.reference_report = self._start_reference(
            reference or args.reference, lists, len(streams)
        )
        self._use(lists[: len(streams)], dict(zip(evals, lists[len(streams) :], strict=True)))
        self._implied = [implied_losses(pairs, self.method).to(args.device) for pairs in self.streams]
        self._margin_logps = check_margin_logps(self.method, margin_logps, lists)
        self._inputs = self._method_inputs(lists, categories)
        self._record = TrainingRecord(args, reduce=self._sum_over_processes, inputs=self._inputs)
        self.add_callback(self._record.callback)

    @property
    def watch(self) -> DivergenceWatch | None:
        """The watch for divergence, `None` until a row was logged."""
        return self._record.watch

    # The step

    def _start_step(self, model: nn.Module, microbatches: list[MicroBatch]) -> None:
        """Let the method look at all pairs of a step before its first micro-batch, if it must."""
        if self._inputs is not None:
            with torch.no_grad(), self.compute_loss_context_manager():
                self._inputs.start_step(model, microbatches, even=self._in_step, reduce=self._sum_over_processes)

    def _start_evaluation(self, model: nn.Module) -> None:
        """Let the method look at all held-out pairs, if it must."""
        if self._inputs is not None:
            with torch.no_grad(), self.compute_loss_context_manager():
                self._inputs.start_evaluation(model, even=self._in_step, reduce=self._sum_over_processes)

    def _microbatch_step(
        self, model: nn.Module, microbatch: MicroBatch, num_items: Tensor | int | None, *, check: bool
    ) -> Tensor:
        """Run one micro-batch and, if asked, check its loss against its labels."""
        # `Trainer.training_step` returns only the loss; this list holds what the check needs besides.
        seen: list[tuple[PairFigures, Tensor]] = []
        carrying = {**microbatch, "hand_on": seen.append} if check else microbatch
        loss = super()._microbatch_step(model, carrying, num_items, check=check)
        if check and "is_filler" not in microbatch:
            # Empty where a subclass computes the loss without ours: its loss is checked all the same.
            self._check_first_step(float(loss), seen, microbatch, num_items)
        return loss

    # Loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return this micro-batch's share of the step's loss, and the (P, K) table of metrics as output if asked.

        `inputs` is one micro-batch. `num_items_in_batch` counts the pairs of each stream in the whole optimizer step,
        over all processes; without it the micro-batch is the step.
        """
        inputs = exact(inputs)
        figures, total_P = self.pair_losses(model, inputs)
        if "is_filler" in inputs:
            # Zero, but with a graph: every process must run backward, as sharded weights are gathered there again.
            return total_P.sum() * 0.0
        # Shares of micro-batches and processes add up to mean(main) + buffer_weight x mean(buffer).
        loss = (self._weights(inputs["is_buffer"], num_items_in_batch) * total_P).sum()
        table_PK = figures.table()
        if self.model.training:
            self._record.add(table_PK, _groups(inputs))
            if self._inputs is not None and figures.beside is not None:
                self._inputs.add(inputs, figures.beside)
        if "hand_on" in inputs:
            inputs["hand_on"]((figures, total_P.detach()))
        return (loss, {"table": table_PK}) if return_outputs else loss

    def pair_losses(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[PairFigures, Tensor]:
        """Return the figures of the P pairs of a micro-batch and their (P,) losses with the anchor and the gradient.

        One forward pass holds chosen and rejected rows of both streams.
        """
        args, inputs = self.args, exact(inputs)
        # Without gradient, and before the policy's own pass: the reference may swap weights in place.
        ref_logps_N = self.reference.logps(model, inputs)
        found = sequence_logps(model, inputs)
        check_finite(found.logps.detach(), lambda place: self._title(inputs, place))
        num_pairs = len(inputs["pair_index"])
        # Sums of log-probs are hundreds to thousands of nats and the margin is a small difference of four of them, so
        # all of this is float64. `drift` is log(pi / pi_ref) of a completion: the margin is its chosen minus rejected.
        drift_N = found.logps - ref_logps_N
        tokens_N = found.num_tokens.double().clamp(min=1)  # an unpaired answer has no other one: its sums are 0
        per_N = tokens_N if args.reduction == "mean" else torch.ones_like(tokens_N)
        margin_P = _chosen_minus_rejected(drift_N / per_N)
        # MODPO: the margin of the safety model against the same reference; it has no gradient.
        other_P = None
        if self._margin_logps is not None:
            logps_P2 = looked_up(self._margin_logps, inputs, training=self.model.training)
            other_P = _chosen_minus_rejected((logps_P2.T.flatten() - ref_logps_N) / per_N)
        beside = None
        if self._inputs is not None:
            values = {"drift": drift_N, "reference": ref_logps_N, "logps": found.logps, "tokens": found.num_tokens}
            beside = self._inputs.of(inputs, **values, per=per_N, training=self.model.training)
        labels = (inputs["chosen_is_safe"], inputs["rejected_is_safe"])
        pair_loss = preference_loss(margin_P, *labels, method=self.method, other_margin=other_P, beside=beside)
        total_P, anchor_P = pair_loss.loss, torch.zeros_like(margin_P)
        if args.anchor_weight > 0:
            nll_N = -found.logps / tokens_N  # per token, whatever the reduction
            anchor_P = anchor(pair_loss.favoured, nll_N[:num_pairs], nll_N[num_pairs:], *labels)
            total_P = total_P + self._anchor_factor * anchor_P
        check = self._start_check
        figures = PairFigures(
            pair_loss=pair_loss,
            margin=margin_P.detach(),
            rounding=margin_rounding(
                *found.num_tokens.chunk(2),
                dtype=check.dtype,
                log_vocabulary=check.log_vocabulary,
                reduction=args.reduction,
            ),
            beta=self.method.beta,
            chosen_drift=drift_N.detach()[:num_pairs],
            rejected_drift=drift_N.detach()[num_pairs:],
            chosen_tokens=found.num_tokens[:num_pairs],
            rejected_tokens=found.num_tokens[num_pairs:],
            loss_at_start=self._loss_at_start(inputs, other_P, beside),
            anchor=anchor_P.detach(),
            other_margin=other_P,
            beside=beside,
        )
        return figures, total_P

    @cached_property
    def _anchor_factor(self) -> float:
        return anchor_factor(self.args.anchor_weight, self.args.anchor_scale, self.method)

    def _weights(self, is_buffer: Tensor, num_pairs: Tensor | int | None) -> Tensor:
        """Return (P,) weights that sum to 1 over the main pairs of a step, and to `buffer_weight` over the buffer's."""
        ones_P = torch.ones_like(is_buffer, dtype=torch.float64)
        if num_pairs is None:
            main_P, buffer_P = (ones_P / max(1, int(mask.sum())) for mask in (~is_buffer, is_buffer))
        else:  # times the processes: gradients are averaged over them, and this weight scales a sum
            main_P = buffer_P = ones_P * (self.accelerator.num_processes / num_pairs)
        return torch.where(is_buffer, self.args.buffer_weight * buffer_P, main_P)

    def _loss_at_start(self, inputs: Mapping[str, Any], other_margin: Tensor | None, beside: Beside | None) -> Tensor:
        """Return the loss of each pair at margin 0, (P,); zeros in evaluation, which does not report it."""
        index, is_buffer = inputs["pair_index"], inputs["is_buffer"]
        if not self.model.training:
            return torch.zeros(len(index), dtype=torch.float64, device=index.device)
        if other_margin is not None or beside is not None:
            labels = (inputs["chosen_is_safe"], inputs["rejected_is_safe"])
            return loss_at_start(*labels, method=self.method, other_margin=other_margin, beside=beside)
        main = self._implied[0][index[~is_buffer]]  # main pairs come first in every micro-batch
        return torch.cat([main, self._implied[1][index[is_buffer]]]) if len(self.streams) > 1 else main

    # The check of the first loss

    def _check_first_step(
        self,
        loss: float,
        seen: Sequence[tuple[PairFigures, Tensor]],
        inputs: Mapping[str, Any],
        num_pairs: Tensor | int | None,
    ) -> None:
        """Compare the loss of a micro-batch of the first step with the one that the data set's own labels imply.

        `seen`: the figures and the (P,) losses with the anchor from `compute_loss`; empty if it gave none.
        """
        pairs = self._pairs_of(inputs)
        check = self._start_check
        weights_P = self._weights(inputs["is_buffer"], num_pairs).cpu()
        facts: dict[str, Any] = {}
        for figures, total_P in seen:
            # The labels imply nothing about the anchor, which is a log-prob of the model: its share is subtracted.
            loss -= float((weights_P * (total_P - figures.pair_loss.loss.detach()).cpu()).sum())
            other_P = None if figures.other_margin is None else figures.other_margin.cpu()
            beside = None if figures.beside is None else figures.beside.to(torch.zeros((), dtype=torch.float64))
            facts = {"largest_margin": float(figures.margin.abs().max()), "other_margin": other_P, "beside": beside}
        check(loss, pairs, weights_P, **facts)

    @property
    def _start_check(self) -> StartCheck:
        return StartCheck(self.method, **self._scale, reduction=self.args.reduction)

    # The reference, chosen and computed before training

    def _start_reference(
        self, requested: Reference | str, lists: list[Sequence[TokenPair]], num_streams: int
    ) -> tuple[Reference, str, list[Sequence[TokenPair]], ReferenceReport | None]:
        """Return the reference, its name, `lists` with its log-probs if they are precomputed, and the pass' report.

        Called while the model is still what training starts from. `requested`: a name, of which "auto" is resolved
        here, or an object of the protocol. `lists`: the `num_streams` streams, then the held-out lists. Raises as
        `choose_reference`, `make_reference` and the pass do.
        """
        args, model = self.args, self.model
        if not isinstance(requested, str):
            return requested, type(requested).__name__, lists, None
        known = all(reference_logps(pairs) is not None for pairs in lists)
        if requested == "auto" and known:
            requested = "precompute"
        looked_up, num_missing = None, 0
        shards_now = self.only_reads and self.is_fsdp_enabled
        sharded = is_sharded(self) and not shards_now
        if requested in ("auto", "precompute") and not known:
            looked_up = ReferencePass(
                model,
                lists,
                cache=args.reference_cache,
                mixed_precision=str(self.accelerator.mixed_precision),
                process_index=args.process_index,
                num_processes=args.world_size,
            )
            # Only the streams decide, unless the model will be sharded: then no row can be computed here.
            num_missing = looked_up.num_missing(None if sharded else range(num_streams))
        per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        num_in_epochs = math.ceil(args.num_train_epochs * len(lists[0]))
        num_main_seen = int(args.max_steps * per_step) if args.max_steps > 0 else num_in_epochs
        name = choose_reference(
            requested,  # type: ignore[arg-type]  # other names are refused there
            num_to_compute=num_missing,
            num_pairs_seen=num_streams * num_main_seen,
            has_adapter=hasattr(model, "disable_adapter"),
            sharded=sharded,
        )
        report = None
        if name == "precompute" and looked_up is not None:
            if shards_now:  # after the look-up, whose key is of whole weights
                shard_now(self)
            with self.accelerator.autocast():
                lists, report = looked_up.run(
                    collate=self._collate,
                    max_tokens=args.max_tokens_per_microbatch or MAX_TOKENS,
                    together=shards_now,
                )
        return make_reference(name, model), name, lists, report

    def _collate(self, pairs: Sequence[TokenPair]) -> MicroBatch:
        batch = collate_pairs(pairs, pad_token_id=self.data_collator.pad_token_id, form=self.form)
        return on_device(batch, self.args.device)

    def _method_inputs(
        self, lists: Sequence[Sequence[TokenPair]], categories: Sequence[Sequence[str]] | None
    ) -> MethodInputs | None:
        """Return what the method reads beside the margin, `None` for nothing. Called while the model is the start."""
        if not isinstance(self.method, ReadsBeside):
            return None
        with self.accelerator.autocast():
            return MethodInputs(
                self.method,
                self.model,
                lists,
                self.args,
                tokenizer=self.processing_class,
                collate=self._collate,
                form=self.form,
                mixed_precision=str(self.accelerator.mixed_precision),
                sharded=is_sharded(self),
                num_streams=len(self.streams),
                categories=categories,
            )

    # Logs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the metrics by stream and label cell since the last log of training.

        `loss` is the mean over the optimizer steps since then, `train_loss` over those of the run, resumed or not, of
        the differentiated quantity: mean(main) + `buffer_weight` x mean(buffer), the anchor included.
        """
        self._record.fill(logs, self.state)
        super().log(logs, start_time)

    # Evaluation

    def _eval_table(self, model: nn.Module, inputs: MicroBatch) -> tuple[Tensor, Tensor]:
        """Return the (P, K) table of metrics and the label cells (P,)."""
        figures, _ = self.pair_losses(model, inputs)
        return figures.table(), _groups(inputs)

    def _eval_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        return self._record.of_evaluation(prediction.predictions, prediction.label_ids)


def _chosen_minus_rejected(values_N: Tensor) -> Tensor:
    """Return (P,): the first half of N values minus the second."""
    chosen_P, rejected_P = values_N.chunk(2)
    return chosen_P - rejected_P


def _groups(inputs: Mapping[str, Any]) -> Tensor:
    return group_index(inputs["chosen_is_safe"], inputs["rejected_is_safe"], inputs["is_buffer"])

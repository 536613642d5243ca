"""Preference training on two streams: a `transformers.Trainer` through its public hooks only."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments

from bfpo.core.errors import SettingError
from bfpo.data.pack import Form, MicroBatch, PairCollator, collate_pairs, longest_text, on_device
from bfpo.data.store import reference_logps
from bfpo.data.streams import TwoStreamDataset
from bfpo.data.tokenize import TokenPair
from bfpo.objective.losses import add_anchor, anchor, loss_at_start, preference_loss
from bfpo.policy.load import pad_token_id
from bfpo.policy.logps import sequence_logps
from bfpo.policy.probe import choose_form
from bfpo.policy.reference.forward_pass import MAX_TOKENS, ReferencePass, ReferenceReport
from bfpo.policy.reference.sources import Reference, choose_reference, make_reference
from bfpo.training.arguments import BFPOConfig
from bfpo.training.callbacks import EpochCallback
from bfpo.training.checks import DivergenceWatch, StartCheck, check_finite, check_rows, implied_losses
from bfpo.training.margin import check_margin_logps
from bfpo.training.metrics import PairFigures, TrainingRecord, group_index

__all__ = [
    "BFPOConfig",
    "BFPOTrainer",
    "Start",
    "is_sharded",
    "prepare_sharding",
    "start_reference",
    "whole_state",
]


@dataclass(frozen=True, slots=True)
class Start:
    """The reference with its name, the streams and the held-out lists as they are to be trained and evaluated on, and
    what the pass did, if there was one.
    """

    reference: Reference
    name: str
    streams: list[Sequence[TokenPair]]
    held_out: dict[str, Sequence[TokenPair]]
    report: ReferenceReport | None = None


def start_reference(
    trainer: Trainer,
    requested: Reference | str,
    *,
    streams: Sequence[Sequence[TokenPair]],
    held_out: Mapping[str, Sequence[TokenPair]],
    pad_token_id: int,
    form: Form,
) -> Start:
    """Return the reference of a trainer whose model is still what it starts from, and run its pass where it has one.

    `requested`: a name, of which "auto" is resolved here, or an object of the protocol. Raises as `choose_reference`,
    `make_reference` and the pass do.
    """
    if not isinstance(requested, str):
        return Start(requested, type(requested).__name__, list(streams), dict(held_out))
    lists = [*streams, *held_out.values()]
    known = all(reference_logps(pairs) is not None for pairs in lists)
    if requested == "auto" and known:
        requested = "precompute"
    looked_up = _look_up(trainer, lists) if requested in ("auto", "precompute") and not known else None
    sharded = is_sharded(trainer)  # then held-out rows count too: no row is computed here
    name = choose_reference(
        requested,  # type: ignore[arg-type]  # it refuses other names
        num_to_compute=looked_up.num_missing(None if sharded else range(len(streams))) if looked_up else 0,
        num_pairs_seen=len(streams) * _num_main_pairs_seen(trainer, len(streams[0])),
        has_adapter=hasattr(trainer.model, "disable_adapter"),
        sharded=sharded,
    )
    report = None
    if name == "precompute" and looked_up is not None:
        lists, report = _run(trainer, looked_up, pad_token_id=pad_token_id, form=form)
    model: Any = trainer.model
    evals = dict(zip(held_out, lists[len(streams) :], strict=True))
    return Start(make_reference(name, model), name, lists[: len(streams)], evals, report)


def _num_main_pairs_seen(trainer: Trainer, num_main: int) -> int:
    args = trainer.args
    per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return int(args.max_steps * per_step) if args.max_steps > 0 else math.ceil(args.num_train_epochs * num_main)


def _look_up(trainer: Any, lists: Sequence[Sequence[TokenPair]]) -> ReferencePass:
    return ReferencePass(
        trainer.model,
        lists,
        cache=trainer.args.reference_cache,
        mixed_precision=str(trainer.accelerator.mixed_precision),
        process_index=trainer.args.process_index,
        num_processes=trainer.args.world_size,
    )


def _run(
    trainer: Any, looked_up: ReferencePass, *, pad_token_id: int, form: Form
) -> tuple[list[Sequence[TokenPair]], ReferenceReport]:
    def collate(some: Sequence[TokenPair]) -> dict[str, Any]:
        return on_device(collate_pairs(some, pad_token_id=pad_token_id, form=form), trainer.args.device)

    with trainer.accelerator.autocast():
        return looked_up.run(collate=collate, max_tokens=trainer.args.max_tokens_per_microbatch or MAX_TOKENS)


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
    `margin_logps`, which modpo needs: the log-probs of the model of safety as `bfpo.training.margin` gives them, (P, 2)
    for the main stream, the buffer where there is one, and one held-out list. `processing_class` is the tokenizer,
    needed for the padding id and saved with the model.

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
        margin_logps: Sequence[Tensor] | None = None,
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
        streams = [train_dataset, *([buffer_dataset] if buffer_dataset is not None else [])]
        pad = pad_token_id(processing_class)
        with self.accelerator.autocast():
            self.form = choose_form(
                self.model,
                args.attention,
                longest_text=max(map(longest_text, [*streams, *evals.values()])),
                process_index=args.process_index,
                num_processes=args.world_size,
            )
        self.data_collator = PairCollator(pad, self.form, args.max_tokens_per_microbatch)
        # Both say that compute_loss divides by the pairs of the whole optimizer step; the first is the newer name.
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True
        start = start_reference(
            self, reference or args.reference, streams=streams, held_out=evals, pad_token_id=pad, form=self.form
        )
        self.reference, self.reference_name, self.reference_report = start.reference, start.name, start.report
        self._streams = start.streams
        self.train_dataset = TwoStreamDataset(*start.streams, seed=args.data_seed or 0)
        sets = {name: TwoStreamDataset(pairs) for name, pairs in start.held_out.items()}
        self.eval_dataset = sets[""] if set(sets) == {""} else (sets or None)
        self._implied = [implied_losses(pairs, args.loss_settings()).to(args.device) for pairs in self._streams]
        self._margin_logps = check_margin_logps(args.method, margin_logps, [*streams, *evals.values()])
        self._record = TrainingRecord(args, reduce=self._sum_over_processes)
        self.add_callback(self._record.callback)
        self._num_parameters: int | None = None
        self._largest_margin: Tensor | None = None
        self._anchor_share: Tensor | float = 0.0
        self._other_margin: Tensor | None = None

    @property
    def watch(self) -> DivergenceWatch | None:
        """The watch for divergence, once a row was logged."""
        return self._record.watch

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
            self._record.add(table, _groups(inputs))
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
        per = tokens if args.reduction == "mean" else torch.ones_like(tokens)
        margin = _difference(drift / per)
        other = None if self._margin_logps is None else _difference((self._others(inputs) - ref_logps) / per)
        labels = (inputs["chosen_is_safe"], inputs["rejected_is_safe"])
        pair_loss = preference_loss(margin, *labels, **args.loss_settings(), other_margin=other)
        self._other_margin = other
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
            loss_at_start=self._loss_at_start(inputs, other),
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

    def _others(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return the log-probs of the other model of a micro-batch, (2P,)."""
        assert self._margin_logps is not None
        index = inputs["pair_index"].cpu()
        if not self.model.training:
            rows = self._margin_logps[-1][index]
        else:
            rows = torch.stack(
                [self._margin_logps[s][i] for s, i in zip(inputs["is_buffer"].long().tolist(), index, strict=True)]
            )
        return rows.T.flatten().to(inputs["pair_index"].device)

    def _loss_at_start(self, inputs: Mapping[str, Any], other_margin: Tensor | None) -> Tensor:
        index, is_buffer = inputs["pair_index"], inputs["is_buffer"]
        if not self.model.training:
            return torch.zeros(len(index), dtype=torch.float64, device=index.device)
        if other_margin is not None:
            labels = (inputs["chosen_is_safe"], inputs["rejected_is_safe"])
            return loss_at_start(*labels, **self.args.loss_settings(), other_margin=other_margin)
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
            log_vocabulary=math.log(self.model.config.get_text_config().vocab_size),
            reduction=self.args.reduction,
        )
        check(
            loss - float(self._anchor_share),
            pairs,
            self._weights(inputs["is_buffer"], num_pairs).cpu(),
            largest_margin=None if self._largest_margin is None else float(self._largest_margin),
            other_margin=None if self._other_margin is None else self._other_margin.cpu(),
        )

    # Logs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the metrics by stream and label cell since the last log of training.

        `loss` is the mean over the optimizer steps since then, `train_loss` over those of the run, resumed or not, of
        what their gradients are of: mean(main) + `buffer_weight` x mean(buffer), the anchor included.
        """
        self._record.fill(logs, self.state)
        super().log(logs, start_time)

    def _sum_over_processes(self, sums: Tensor) -> Tensor:
        if self.args.world_size == 1:
            return sums
        total: Tensor = self.accelerator.reduce(sums, reduction="sum")
        return total

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
        return self._record.of_evaluation(prediction.predictions, prediction.label_ids)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return 6 x tokens x parameters; the parameters are counted once, not in every step."""
        if self._num_parameters is None:
            self._num_parameters = int(sum(parameter.numel() for parameter in self.model.parameters()))
        num_tokens = sum(microbatch["input_ids"].numel() for microbatch in inputs["microbatches"])
        return 6 * int(num_tokens) * self._num_parameters


def _difference(values: Tensor) -> Tensor:
    """Return chosen minus rejected, (P,), of (2P,) values."""
    chosen, rejected = values.chunk(2)
    return chosen - rejected


def _groups(inputs: Mapping[str, Any]) -> Tensor:
    return group_index(inputs["chosen_is_safe"], inputs["rejected_is_safe"], inputs["is_buffer"])


def _computed_in(args: TrainingArguments, model: nn.Module) -> torch.dtype:
    """Return the least precise dtype that the log-probs go through."""
    if args.bf16:
        return torch.bfloat16
    if args.fp16:
        return torch.float16
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())


def is_sharded(trainer: Trainer) -> bool:
    """Return whether FSDP or DeepSpeed divides what this trainer trains; its model is on the CPU until it does."""
    return bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)


def prepare_sharding(accelerator: Accelerator) -> None:
    """Let float32 log-probs leave a model under FSDP2 as they are, and sum gradients in float32; nothing without FSDP.

    For bfloat16 accelerate has FSDP2 cast the outputs of each sharded module, and log-probs leave the model as such;
    and it sums the gradients of float32 masters in bfloat16.
    Raises `SettingError` for FSDP version 1, whose flat parameters the reference cannot swap.
    """
    plugin: Any = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        return
    if plugin.fsdp_version != 2:
        raise SettingError(f"fsdp_version: got {plugin.fsdp_version}; allowed: 2 (see docs/scaling.md)")
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = dataclasses.replace(
            plugin.mixed_precision_policy, output_dtype=None, reduce_dtype=torch.float32
        )


def whole_state(trainer: Trainer) -> dict[str, Tensor] | None:
    """Return the whole weights of a sharded model, on the CPU, by the names of the model inside; else `None`.

    Every process must call this. What all but the first get may be empty.
    """
    if not is_sharded(trainer):
        return None
    state: dict[str, Tensor] = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return state

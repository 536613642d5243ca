"""What a dry-run says of a training: steps, warm-up, tokens, the first loss, the time of a step from measured ones."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from bfpo.config.train import AlignConfig, TrainingKeys
from bfpo.core.console import Plan
from bfpo.core.errors import SettingError
from bfpo.data.load import RowStream
from bfpo.data.pair_layouts import UNPAIRED
from bfpo.data.tokenize import TokenPair
from bfpo.objective.losses import loss_at_start
from bfpo.objective.methods import ReadsBeside
from bfpo.policy.devices import runs_on_cpu
from bfpo.policy.load import Policy
from bfpo.policy.reference.sources import choose_reference
from bfpo.training.arguments import BFPOConfig
from bfpo.training.forecast import ForecastFile, forecast, forecast_lines, reaching_beta
from bfpo.training.inputs import (
    Start,
    TrainingConfig,
    data_sections,
    describe_tokens,
    load_start,
    read_start,
    reference_cache,
)
from bfpo.training.packed import on_first_gpu
from bfpo.training.schedule import no_change, steps_of
from bfpo.training.trainer import BFPOTrainer

__all__ = [
    "MOST_ROWS",
    "NOT_MEASURED",
    "NOT_SHARED",
    "SHORT",
    "Rows",
    "measured_steps",
    "no_change_plan",
    "pair_plan",
    "sampled_forecast",
    "schedule_plan",
    "time_plan",
    "token_rows",
]

MOST_ROWS = 4
"""Rows of each stream in a measured step, at most."""
# The first of three steps also warms up. At learning rate 0 every step is the first one, and costs as much as any.
SHORT: dict[str, Any] = {
    "max_steps": 3,
    "learning_rate": 0.0,
    "gradient_accumulation_steps": 1,
    "eval_strategy": "no",
    "eval_steps": None,
    "eval_on_start": False,
    "save_strategy": "no",
    "logging_strategy": "no",
}
_NO_TIME = {"seconds_per_step": None}
NOT_MEASURED = Plan(
    ["time of a step: not measured, a training is estimated not to fit the free memory (bfpo doctor shows it)"],
    _NO_TIME,
)
NOT_SHARED = Plan(["time of a step: not measured with several processes"], _NO_TIME)
_SLOW = 20.0  # a step of more seconds is the last one that is measured
Row = TypeVar("Row")


class Rows(Generic[Row]):
    """The numbers of tokens of all rows of an input, and a random sample of at most `most` of them."""

    def __init__(self, count: Callable[[Row], int], *, seed: int, most: int = MOST_ROWS) -> None:
        self._count, self._most, self._draw = count, most, np.random.default_rng(seed)
        self.tokens: list[int] = []
        self.labels: list[tuple[float, float]] = []
        self.sample: list[Row] = []

    def add(self, rows: Iterable[Row]) -> None:
        """Add rows, one after the other; of pairs also their labels."""
        for row in rows:
            self.tokens.append(self._count(row))
            if isinstance(row, TokenPair):
                self.labels.append((row.chosen_is_safe, row.rejected_is_safe))
            place = len(self.sample) if len(self.sample) < self._most else int(self._draw.integers(len(self.tokens)))
            if place < self._most:
                self.sample[place : place + 1] = [row]

    def sampled_tokens(self, num: int) -> int:
        """Return the tokens of the first `num` rows of the sample."""
        return sum(map(self._count, self.sample[:num]))


def schedule_plan(args: TrainingArguments, rows: list[Rows[Any]], per_step: int, unit: str) -> Plan:
    """Return the optimizer steps, the warm-up and the tokens of a step; rows of the first input count."""
    per_epoch = (math.floor if args.dataloader_drop_last else math.ceil)(len(rows[0].tokens) / per_step)
    steps = steps_of(args, len(rows[0].tokens), per_step)
    warmup, tokens = args.get_warmup_steps(steps), _step_tokens(rows, per_step)
    shares = " + ".join([f"{per_step:,}"] * len(rows))
    passes = f"{per_epoch:,} are a pass over the data"
    lines = [
        f"optimizer steps: {steps:,} ({passes}), warm-up: {warmup:,} of them",
        f"a step: {shares} {unit}, about {tokens:,.0f} tokens",
    ]
    facts = {"steps": steps, "steps_per_epoch": per_epoch, "warmup_steps": warmup, "tokens_per_step": round(tokens)}
    return Plan(lines, facts)


def no_change_plan(args: TrainingArguments, plan: Plan, policy: Policy) -> Plan:
    """Return the line on steps that are too few and too small, if the steps of a plan are."""
    said = no_change(args, plan.facts["steps"], policy.trainable_report.num_trainable)
    return Plan([said] if said else [])


def _step_tokens(rows: list[Rows[Any]], per_step: int) -> float:
    return sum(per_step * sum(each.tokens) / len(each.tokens) for each in rows)


def measured_steps(make: Callable[[Path], Trainer]) -> tuple[list[float], Trainer] | None:
    """Return the seconds of the measured steps of the trainer that `make` returns, and it; writes nothing.

    `make` gets a folder, for arguments with `SHORT`. `None` where several processes are launched.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return None
    timer = _Timer()
    with TemporaryDirectory() as place, _quiet(), on_first_gpu():
        trainer = make(Path(place))
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(timer)
        trainer.train()
    return timer.seconds[min(1, len(timer.seconds) - 1) :], trainer


@contextmanager
def _quiet() -> Iterator[None]:
    """Log only warnings: what the short training says of itself is not about the one that is previewed."""
    logger = logging.getLogger("bfpo")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)


class _Timer(TrainerCallback):
    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._began = self._now()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.seconds.append(self._now() - self._began)
        control.should_training_stop |= self.seconds[-1] > _SLOW

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


def time_plan(
    config: TrainingKeys,
    seconds: list[float],
    rows: list[Rows[Any]],
    num: int,
    per_step: int,
    steps: int,
    unit: str,
    place: str,
) -> Plan:
    """Return the time of a step, scaled by tokens from measured steps of `num` rows of each input.

    What else takes time, probes and held-out rows, is named.
    """
    measured = sum(each.sampled_tokens(num) for each in rows)
    tokens = _step_tokens(rows, per_step)
    step = sum(seconds) / len(seconds) * tokens / measured
    shares = " + ".join([str(num)] * len(rows))
    others = {"probes": config.probe, "held-out evaluations": config.eval_steps}
    beside = " and ".join(name for name, setting in others.items() if setting is not None)
    whole = f"{_short(step * steps)} in all" + (f" without {beside}" if beside else "")
    line = (
        f"time of a step: about {_short(step)}, {whole}; scaled by tokens from {len(seconds)} measured "
        f"step{'s' * (len(seconds) > 1)} of {shares} {unit}, {measured:,} tokens, on this {place}"
    )
    return Plan([line], {"seconds_per_step": step})


def _short(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


# Preference training


def token_rows(
    config: TrainingConfig,
    start: Start,
    most: int = MOST_ROWS,
    *,
    streams: Mapping[str, RowStream[Any]] | None = None,
) -> tuple[list[str], list[Rows[TokenPair]]]:
    """Return the lines of `describe_tokens`, and the rows of what is trained on: the main stream, then the buffer."""
    rows: list[Rows[TokenPair]] = []

    def take(pairs: Iterator[TokenPair]) -> None:
        rows.append(Rows(_num_tokens, seed=config.seed, most=most))
        rows[-1].add(pairs)

    lines = describe_tokens(config, start, take, streams=streams)
    return lines, rows[: 1 if getattr(config, "buffer", None) is None else 2]


def _num_tokens(pair: TokenPair) -> int:
    return len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids)  # the prompt is in a packed row once


def sampled_forecast(
    config: AlignConfig, most: int = 64, *, betas: Sequence[float] = ()
) -> tuple[ForecastFile, list[str]]:
    """Return the forecast of a random sample of at most `most` pairs of each stream, and lines on them.

    With `betas` it is that of the one that `reaching_beta` chooses, in place of the config's. The
    log-probs go to the cache, where training finds them. Raises as `bfpo train` does for data and model, and
    `SettingError` for single answers.
    """
    if alone := [name for name, section in data_sections(config).items() if section.layout == UNPAIRED]:
        raise SettingError(f"--data: it is about pairs, and {', '.join(alone)} has single answers; leave it out")
    lines, rows = token_rows(config, read_start(config), most)
    policy = load_start(config)
    with TemporaryDirectory() as place, on_first_gpu():
        args = BFPOConfig(
            output_dir=place,
            use_cpu=runs_on_cpu(),
            bf16=config.dtype == "bfloat16",
            attention=config.attention,
            max_tokens_per_microbatch=config.max_tokens_per_microbatch,
            reference="precompute",
            reference_cache=reference_cache(config),
        )
        streams = [each.sample for each in rows]
        buffer = streams[1] if len(streams) > 1 else None
        trainer = BFPOTrainer(
            policy.model, args, train_dataset=streams[0], buffer_dataset=buffer, processing_class=policy.tokenizer
        )
    method = config.method_object()
    if betas:
        method = replace(method, beta=reaching_beta(trainer.streams, method, betas, reduction=config.reduction))
    found = forecast(trainer.streams, method, reduction=config.reduction)
    assert found is not None
    shares = " + ".join(f"{len(each.sample):,} of {len(each.tokens):,}" for each in rows)
    return found, [*lines, f"reference log-probs of {shares} pairs, drawn at random", *forecast_lines(found)]


def pair_plan(
    config: AlignConfig, rows: list[Rows[TokenPair]], arguments: Callable[..., BFPOConfig], policy: Policy | None
) -> Plan:
    """Return the steps of a dry-run of `bfpo train`, their time and the first loss.

    Without a policy nothing is measured, and that is said.

    `arguments`: folder and changed arguments -> those of the training.
    """
    num = min(MOST_ROWS, config.pairs_per_step, *(len(each.sample) for each in rows))
    if num == 0:
        return Plan()
    method = config.method_object()
    with TemporaryDirectory() as place:
        args = arguments(place)
        plan = schedule_plan(args, rows, config.pairs_per_step, "pairs") + _first_loss(config, rows)
    if policy is None:
        return plan + NOT_MEASURED
    plan += no_change_plan(args, plan, policy)
    reference = choose_reference(
        config.reference,
        num_to_compute=sum(len(each.tokens) for each in rows),
        num_pairs_seen=len(rows) * config.pairs_per_step * plan.facts["steps"],
        has_adapter=config.lora is not None,
    )
    streams = [each.sample[:num] for each in rows]

    def make(folder: Path) -> Trainer:
        changed = {"per_device_train_batch_size": num, "reference": reference, "reference_cache": None}
        return BFPOTrainer(
            policy.model,
            arguments(folder, **SHORT, **changed),
            train_dataset=streams[0],
            buffer_dataset=streams[1] if len(streams) > 1 else None,
            processing_class=policy.tokenizer,
            margin_logps=[torch.zeros(num, 2) for _ in streams] if method.shifted else None,
        )

    measured = measured_steps(make)
    if measured is None:
        return plan + NOT_SHARED
    seconds, trainer = measured
    place = str(trainer.args.device)
    if (anchor := trainer.state.log_history[-1].get("anchor_loss")) is not None:
        line = (
            f"anchor of the first steps: about {anchor:.4g}, that of {sum(map(len, streams))} pairs now, which is added"
        )
        plan += Plan([line], {"expected_anchor_loss": anchor})
    plan += time_plan(config, seconds, rows, num, config.pairs_per_step, plan.facts["steps"], "pairs", place)
    report = trainer.reference_report if isinstance(trainer, BFPOTrainer) else None
    if report is not None:
        share = sum(sum(each.tokens) for each in rows) / sum(each.sampled_tokens(num) for each in rows)
        line = f"reference log-probs before it: about {_short(report.seconds * share)} if none of them is cached"
        plan += Plan([line], {"reference_seconds": report.seconds * share})
    return plan


def _first_loss(config: AlignConfig, rows: list[Rows[TokenPair]]) -> Plan:
    """Return the loss that the labels imply at margin 0, as the check of the first step has it."""
    method = config.method_object()
    unknown = isinstance(method, ReadsBeside) and not method.starts_known
    if unknown or method.shifted:
        read = "the reference's own margins" if unknown else "the margins of margin_model"
        line = f"expected first loss: not known beforehand, {method.name} reads {read}"
        return Plan([line], {"expected_first_loss": None})
    means = []
    for each, section in zip(rows, data_sections(config).values(), strict=False):
        chosen, rejected = torch.tensor(each.labels, dtype=torch.float64).unbind(1)
        if (beside := method.at_rest(chosen)) is not None:
            beside.present[1] = section.layout != UNPAIRED
        means.append(float(loss_at_start(chosen, rejected, method=method, beside=beside).mean()))
    loss = means[0] + sum(config.buffer_weight * mean for mean in means[1:])
    scaled = f" ({method.normaliser * loss:.4g} times 1 / beta^2)" if method.squared else ""
    anchor = ", without the anchor" if config.anchor_weight > 0 else ""
    line = (
        f"expected first loss: {loss:.6g}{scaled}{anchor}; what the labels imply at margin 0, the mean over all pairs"
    )
    return Plan([line], {"expected_first_loss": loss})

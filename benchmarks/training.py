"""WORKER: one training run in a process of its own, ours or TRL's, timed by the trainer's callbacks.

The loop is that of `Trainer.train()`: loader, collation, forward, backward, clipping, optimizer, schedule, callbacks,
logs. Its first optimizer step warms kernels and allocators up, counts operations (on a CPU) and is left out of the
time. On a GPU the clock waits for the device at every step.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from benchmarks.flops import flop_counter, needed_flops, useful_tokens
from benchmarks.machine import peak_rss, reset_peak, rss
from benchmarks.process import worker
from benchmarks.workload import (
    ModelShape,
    Trains,
    make_model,
    make_pairs,
    make_tokenizer,
    pairs_of_length,
    real_model,
    text_rows,
)
from bfpo.core.errors import RunError
from bfpo.data.store import TokenStore
from bfpo.data.tokenize import TokenPair
from bfpo.policy.recompute import Recompute, set_recompute

if TYPE_CHECKING:
    from benchmarks.sft_training import SftRun

_OLD_NAME = "is_gradient_checkpointing"  # of older versions of transformers
BETA = 1.0  # a target of 0.5 per token, which small margins move visibly, so that agreement says something


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """What to run. `length`: all rows of that many tokens, `None` = lengths of chat data times `length_scale`.

    `microbatch` counts pairs per forward pass; ours are cut by tokens, so it takes all pairs of a step or one, unless
    `max_tokens` of a pass are given. `half`: bfloat16 but for what trains. `recompute`: activations are recomputed,
    by ours also "selective".
    `kernels`: TRL with its Liger kernels. `folder`: of a model with weights, whose sizes are `shape`. `store`: a file
    of tokens, whose pairs are trained on in its order from place `seed * steps * pairs_per_step`. `cpu_clock`: times
    are CPU-seconds of the process.
    """

    trainer: Literal["bfpo", "trl"]
    reference: Literal["precomputed", "online"]
    shape: ModelShape
    steps: int
    pairs_per_step: int
    microbatch: int
    seed: int
    length: int | None = None
    length_scale: float = 1.0
    learning_rate: float = 3e-3
    device: Literal["cpu", "cuda"] = "cpu"
    half: bool = False
    trains: Trains = "down_proj"
    recompute: Recompute = False
    max_tokens: int | None = None
    kernels: bool = False
    folder: str | None = None
    store: str | None = None
    cpu_clock: bool = False

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TrainingRun:
        """Return the run that `dataclasses.asdict` described."""
        return cls(**{**values, "shape": ModelShape(**values["shape"])})

    def model(self) -> Any:
        """Return the model that training starts from."""
        if self.folder is not None:
            return real_model(self.folder, trains=self.trains, half=self.half)
        return make_model(self.shape, device=self.device, half=self.half, trains=self.trains)

    def pairs(self) -> list[TokenPair]:
        """Return the pairs in the order they are trained on; the same for both trainers."""
        num, vocabulary = self.steps * self.pairs_per_step, self.shape.vocabulary
        if self.store is not None:
            return TokenStore(self.store)[self.seed * num : (self.seed + 1) * num]
        if self.length is not None:
            return pairs_of_length(num, length=self.length, vocabulary=vocabulary, seed=self.seed)
        return make_pairs(num, vocabulary=vocabulary, seed=self.seed, scale=self.length_scale)


def measure(run: TrainingRun, folder: str) -> dict[str, Any]:
    """Train and return times in seconds, memory in bytes above the model, counts and the losses of all steps."""
    pairs = run.pairs()
    lengths = [(len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs]
    tokenizer = make_tokenizer(run.shape.vocabulary, end=int(pairs[0].chosen_ids[-1]))
    import_trainer(run.trainer)
    model = run.model()
    memory = Memory(run.device)
    model_rss = memory.now()
    memory.reset()
    started = time.perf_counter()
    trainer = (our_trainer if run.trainer == "bfpo" else trl_trainer)(run, model, tokenizer, pairs, folder)
    setup_seconds, setup_peak = time.perf_counter() - started, memory.peak()
    clock = add_clock(trainer, count=run.device == "cpu", cpu=run.cpu_clock, after_first=memory.reset)
    peak_is_of_training = memory.reset()
    trainer.train()
    peak = memory.peak()
    if trainer.state.global_step != run.steps or len(clock.ends) != run.steps:
        raise RunError(f"{run.trainer}: took {trainer.state.global_step} optimizer steps, {run.steps} were asked for")
    recomputes = "is_activation_checkpointing" if hasattr(model, "is_activation_checkpointing") else _OLD_NAME
    if bool(getattr(model, recomputes, False)) != bool(run.recompute):
        raise RunError(f"{run.trainer}: recomputes activations, or does not, against what both sides are to do")
    first, rest = lengths[: run.pairs_per_step], lengths[run.pairs_per_step :]
    return {
        "loop_seconds": clock.stop - clock.ends[0],
        "loop_tokens": useful_tokens(rest),
        "loop_needed_flops": needed_flops(run.shape, rest, trains=run.trains),
        "step_seconds": [end - start for start, end in zip(clock.starts, clock.ends, strict=True)],
        "whole_loop_seconds": clock.stop - clock.start,
        "setup_seconds": setup_seconds,
        "first_step_flops": clock.flops,
        "first_step_needed_flops": needed_flops(run.shape, first, trains=run.trains),
        "form": str(getattr(trainer, "form", "padded")),
        "peak": peak,
        "model_rss": model_rss,
        "peak_above_model": None if peak is None or model_rss is None else peak - model_rss,
        "setup_peak_above_model": None if setup_peak is None or model_rss is None else setup_peak - model_rss,
        "peak_is_of_training": peak_is_of_training,
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
    }


def import_trainer(name: str) -> None:
    """Import what the trainer needs, so that its code counts neither as memory nor as time of training."""
    if name == "trl":
        import datasets  # noqa: F401
        import trl.trainer.dpo_trainer  # noqa: F401
    else:
        import bfpo.training.trainer  # noqa: F401


def common_arguments(run: TrainingRun | SftRun, folder: str, arguments_class: Any) -> dict[str, Any]:
    """Return the `TrainingArguments` of both trainers, those left out that this version does not have."""
    wanted = {
        "output_dir": folder,
        "max_steps": run.steps,
        "learning_rate": run.learning_rate,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "beta": BETA,
        "bf16": run.half,
        "gradient_checkpointing": run.recompute is True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if run.recompute is True else None,
        "train_sampling_strategy": "sequential",  # older versions shuffle both alike, by the seed
        "seed": 0,
        "data_seed": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": run.device == "cpu",
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": run.device != "cpu",
    }
    known = {field.name for field in dataclasses.fields(arguments_class)}
    return {name: value for name, value in wanted.items() if name in known}


def our_trainer(run: TrainingRun, model: Any, tokenizer: Any, pairs: list[TokenPair], folder: str) -> Any:
    """Return `BFPOTrainer` with TRL's loss: IPO on log-probs averaged over tokens."""
    from bfpo import BFPOConfig, BFPOTrainer

    arguments = BFPOConfig(
        **common_arguments(run, folder, BFPOConfig),
        per_device_train_batch_size=run.pairs_per_step,
        per_device_eval_batch_size=run.pairs_per_step,
        max_tokens_per_microbatch=run.max_tokens or _token_budget(run),
        method="ipo",
        reduction="mean",
        reference="precompute" if run.reference == "precomputed" else "adapter_off" if adapted(run) else "swap",
    )
    if run.recompute == "selective":
        set_recompute(model, "selective")
    return BFPOTrainer(model, arguments, train_dataset=pairs, processing_class=tokenizer)


def adapted(run: TrainingRun) -> bool:
    """Return whether adapters train, without which the model is the reference."""
    return run.trains in ("lora", "qlora")


def _token_budget(run: TrainingRun) -> int | None:
    if run.microbatch not in (1, run.pairs_per_step):
        raise RunError(f"microbatch: got {run.microbatch}; ours takes 1 or all {run.pairs_per_step} pairs of a step")
    return None if run.microbatch == run.pairs_per_step else 1  # a pair that is longer makes one of its own


def trl_trainer(run: TrainingRun, model: Any, tokenizer: Any, pairs: list[TokenPair], folder: str) -> Any:
    """Return TRL's `DPOTrainer` on the same ids, without what slows it down by default."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    if run.pairs_per_step % run.microbatch:
        raise RunError(f"microbatch: got {run.microbatch}; it must divide {run.pairs_per_step} pairs per step")
    arguments = DPOConfig(
        **common_arguments(run, folder, DPOConfig),
        per_device_train_batch_size=run.microbatch,
        gradient_accumulation_steps=run.pairs_per_step // run.microbatch,
        loss_type="ipo",
        max_length=None,
        precompute_ref_log_probs=run.reference == "precomputed",
        disable_dropout=True,
        **({"use_liger_kernel": True} if run.kernels else {}),
    )
    second = run.reference == "online" and not adapted(run)
    trainer = DPOTrainer(
        fast_attention(model, run),
        ref_model=fast_attention(run.model().requires_grad_(False), run) if second else None,
        args=arguments,
        train_dataset=Dataset.from_list(text_rows(pairs, end=tokenizer.eos_token_id)),
        processing_class=tokenizer,
    )
    for pair, row in zip(pairs, trainer.train_dataset, strict=True):
        for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
            if row[name] != getattr(pair, name).tolist():
                raise RunError(f"trl: {pair.pair_id}: {name} are not those that bfpo trains on")
    return trainer


def fast_attention(model: Any, run: TrainingRun | SftRun) -> Any:
    """Return TRL's model, which attends by flash attention where it is installed and can be, as ours does by itself."""
    if run.device == "cuda" and run.half and importlib.util.find_spec("flash_attn") is not None:
        model.set_attn_implementation("flash_attention_2")
    return model


class Memory:
    """Memory in bytes: of this process on the CPU, allocated by torch on a GPU."""

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"

    def now(self) -> int | None:
        """Return what is held now."""
        return _cuda().memory_allocated() if self._cuda else rss()

    def peak(self) -> int | None:
        """Return the most that was held since `reset`."""
        return _cuda().max_memory_allocated() if self._cuda else peak_rss()

    def reset(self) -> bool:
        """Let the peak start anew; returns whether that was possible."""
        if not self._cuda:
            return reset_peak()
        _cuda().reset_peak_memory_stats()
        return True


def _cuda() -> Any:
    import torch

    return torch.cuda


def add_clock(trainer: Any, **settings: Any) -> Any:
    """Return the callback of `make_clock`, added to the trainer."""
    from transformers import PrinterCallback

    clock = make_clock(**settings)
    trainer.add_callback(clock)
    trainer.remove_callback(PrinterCallback)
    return clock


def make_clock(*, count: bool = True, cpu: bool = False, after_first: Callable[[], object] = lambda: None) -> Any:
    """Return a callback that notes when steps start and end.

    `count`: operations of the first step, which makes that one slower and larger. `cpu`: in CPU-seconds of the process.
    `after_first`: called after the first step, outside of all steps.
    """
    import torch
    from transformers import TrainerCallback

    def now() -> float:
        if cpu:
            return time.process_time()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.start = self.stop = 0.0
            self.starts: list[float] = []
            self.ends: list[float] = []
            self.counter = flop_counter() if count else None
            self.flops = 0

        def on_train_begin(self, *_args: Any, **_kwargs: Any) -> None:
            self.start = now()

        def on_step_begin(self, *_args: Any, **_kwargs: Any) -> None:
            self.starts.append(now())
            if len(self.starts) == 1 and self.counter is not None:
                self.counter.__enter__()

        def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
            if not self.ends and self.counter is not None:
                self.counter.__exit__(None, None, None)
                self.flops = self.counter.get_total_flops()
                self.counter = None
            if not self.ends:
                after_first()
            self.ends.append(now())

        def on_train_end(self, *_args: Any, **_kwargs: Any) -> None:
            self.stop = now()

    return Clock()


def _main(values: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return measure(TrainingRun.from_json(values), folder)


if __name__ == "__main__":
    worker(_main)

"""One training on completions, ours or TRL's, in CPU-seconds of the process that it has for itself.

The loop is that of `Trainer.train()`. Its first optimizer step warms kernels and allocators up and is left out.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, replace
from typing import Any, Literal

from benchmarks.machine import peak_rss, reset_peak, rss
from benchmarks.training import add_clock, common_arguments, fast_attention
from benchmarks.workload import MODELS, make_model, make_texts, make_tokenizer, real_model
from bfpo.core.errors import RunError
from bfpo.data.store import TokenStore
from bfpo.data.tokenize import TokenPair
from bfpo.policy.recompute import Recompute, set_recompute


@dataclass(frozen=True, slots=True)
class SftRun:
    """What to run. `model`: a name of `MODELS`, or a folder. `texts_per_forward` divides `texts_per_step`.

    `form` of TRL's rows: "packed", all texts of a forward pass in one row as its packing makes them, without the rest
    that a fixed length leaves over, or "padded". Ours are packed. `store`: a file of tokens, whose prompts and chosen
    completions are trained on in its order, from place `seed * steps * texts_per_step`. `kernels`: TRL with its Liger
    kernels. `recompute`: activations are computed again in the backward pass,
    by ours also "selective".
    """

    trainer: Literal["bfpo", "trl"]
    form: Literal["packed", "padded"]
    model: str
    steps: int
    texts_per_step: int
    texts_per_forward: int
    seed: int
    dtype: Literal["float32", "bfloat16"] = "float32"
    length_scale: float = 1.0
    learning_rate: float = 1e-4
    store: str | None = None
    device: Literal["cpu", "cuda"] = "cpu"
    kernels: bool = False
    recompute: Recompute = False

    @property
    def half(self) -> bool:
        """Whether all but what trains is bfloat16."""
        return self.dtype == "bfloat16"

    def texts(self, vocabulary: int) -> list[TokenPair]:
        """Return the texts in the order they are trained on; the same for both trainers."""
        num = self.steps * self.texts_per_step
        if self.store is not None:
            pairs = TokenStore(self.store)[self.seed * num : (self.seed + 1) * num]
            return [replace(pair, rejected_ids=pair.rejected_ids[:0]) for pair in pairs]
        return make_texts(num, vocabulary=vocabulary, seed=self.seed, scale=self.length_scale)


def measure(run: SftRun, threads: int) -> dict[str, Any]:
    """Train all weights and return times in CPU-seconds, memory in bytes, counts and the losses of all steps."""
    import torch

    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        return _measured(run, folder)


def _measured(run: SftRun, folder: str) -> dict[str, Any]:
    model, tokenizer = _start(run.model)
    texts = run.texts(len(tokenizer))
    model_rss = rss()
    trainer = (_our_trainer if run.trainer == "bfpo" else trl_trainer)(run, model, tokenizer, texts, folder)
    clock = add_clock(trainer, cpu=True, after_first=reset_peak)
    trainer.train()
    peak = peak_rss()
    if trainer.state.global_step != run.steps or len(clock.ends) != run.steps:
        raise RunError(f"{run.trainer}: took {trainer.state.global_step} optimizer steps, {run.steps} were asked for")
    timed = texts[run.texts_per_step :]
    num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "loop_cpu_seconds": clock.stop - clock.ends[0],
        "loop_tokens": sum(len(text.prompt_ids) + len(text.chosen_ids) for text in timed),
        "completion_tokens": sum(len(text.chosen_ids) for text in timed),
        "first_step_flops": clock.flops,
        "peak_above_model": None if peak is None or model_rss is None else peak - model_rss,
        "state_bytes": 12 * num_trained,  # gradient and the two moments of AdamW, float32, of both
        "load_average": os.getloadavg()[0],
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
    }


def _start(name: str) -> tuple[Any, Any]:
    from bfpo.policy.load import load_tokenizer

    if name in MODELS:
        return make_model(MODELS[name]).requires_grad_(True), make_tokenizer(MODELS[name].vocabulary)
    return real_model(name), load_tokenizer(name)


def _our_trainer(run: SftRun, model: Any, tokenizer: Any, texts: list[TokenPair], folder: str) -> Any:
    from transformers import TrainingArguments

    from bfpo.training.sft_trainer import SftTrainer

    arguments = TrainingArguments(
        **common_arguments(run, folder, TrainingArguments),
        per_device_train_batch_size=run.texts_per_step,
        remove_unused_columns=False,
    )
    if run.recompute == "selective":
        set_recompute(model, "selective")
    return SftTrainer(
        model,
        arguments,
        train_dataset=texts,
        processing_class=tokenizer,
        max_tokens_per_microbatch=None,
        completions_per_microbatch=run.texts_per_forward,
    )


def trl_trainer(run: SftRun, model: Any, tokenizer: Any, texts: list[TokenPair], folder: str) -> Any:
    """Return TRL's `SFTTrainer` on the same ids and labels, without what slows it down by default."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    packed, num = run.form == "packed", run.texts_per_forward
    if run.texts_per_step % num:
        raise RunError(f"texts_per_forward: got {num}; it must divide {run.texts_per_step} texts per step")
    rows = [trl_row(texts[i : i + (num if packed else 1)]) for i in range(0, len(texts), num if packed else 1)]
    arguments = SFTConfig(
        **common_arguments(run, folder, SFTConfig),
        per_device_train_batch_size=1 if packed else num,
        gradient_accumulation_steps=run.texts_per_step // num,
        packing=packed,
        max_length=None if not packed else max(len(row["input_ids"]) for row in rows),
        dataset_kwargs={"skip_prepare_dataset": True},  # the rows are as its preparation leaves them
        **({"use_liger_kernel": True} if run.kernels else {}),
    )
    model = fast_attention(model, run)
    return SFTTrainer(model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)


def trl_row(texts: list[TokenPair]) -> dict[str, list[int]]:
    """Return the texts as one row of TRL: ids, labels on completions only, and the lengths of the texts."""
    ids: list[int] = []
    labels: list[int] = []
    for text in texts:
        ids += [*text.prompt_ids.tolist(), *text.chosen_ids.tolist()]
        labels += [-100] * len(text.prompt_ids) + text.chosen_ids.tolist()
    lengths = [len(text.prompt_ids) + len(text.chosen_ids) for text in texts]
    return {"input_ids": ids, "labels": labels, "seq_lengths": lengths}

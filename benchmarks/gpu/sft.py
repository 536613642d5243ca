"""WORKER: supervised fine-tuning by the command `bfpo sft`, or by TRL's `SFTTrainer`, on the same rows and weights."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.flops import needed_flops
from benchmarks.process import worker
from benchmarks.training import Memory, make_clock
from benchmarks.workload import ModelShape, make_model, make_pairs, make_tokenizer, text_rows
from bfpo.core.errors import RunError


class _MeasuredError(Exception):
    """The last step has been timed: what would follow, checkpoint and model, is not measured."""


def measure(values: dict[str, Any]) -> dict[str, Any]:
    """Train on `prompt` and `completion`, all weights; seconds and tokens are those after the first step."""
    from transformers import trainer as transformers_trainer

    shape = ModelShape(**values["shape"])
    small, steps, per_step = values["small"], 3 if values["small"] else 8, 4 if values["small"] else 64
    pairs = make_pairs(steps * per_step, vocabulary=shape.vocabulary, seed=0, scale=0.1 if small else 1.0)
    lengths = [(len(pair.prompt_ids), len(pair.chosen_ids), 0) for pair in pairs]
    rows = [{"prompt": row["prompt"], "completion": row["chosen"].removesuffix(" </s>")} for row in text_rows(pairs)]
    clock = _stopping(steps)
    transformers_trainer.DEFAULT_CALLBACKS.append(clock)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        _write_model(shape, folder / "model", device=values["device"], half=values["half"])
        memory = Memory(values["device"])
        before = memory.now()
        memory.reset()
        try:
            (_bfpo if values["arm"] == "bfpo" else _trl)(values, folder, rows, steps, per_step)
        except _MeasuredError:
            pass
        else:
            raise RunError(f"{values['arm']}: training ended before step {steps}")
    peak = memory.peak()
    rest = lengths[per_step:]
    return {
        "loop_seconds": clock.ends[-1] - clock.ends[0],
        "loop_tokens": sum(map(sum, rest)),
        "loop_needed_flops": needed_flops(shape, rest, trains="all"),
        "peak": peak,
        "peak_above_model": None if peak is None or before is None else peak - before,
    }


def _stopping(steps: int) -> Any:
    kind = type(make_clock(count=False))

    class Stopping(kind):  # type: ignore[misc, valid-type]
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            super().on_step_end(*args, **kwargs)
            if len(self.ends) == steps:
                raise _MeasuredError

    return Stopping()


def _write_model(shape: ModelShape, folder: Path, *, device: str, half: bool) -> None:
    model = make_model(shape, device=device, half=half)
    model.bfloat16() if half else model.float()
    model.save_pretrained(folder)
    make_tokenizer(shape.vocabulary).save_pretrained(folder)


def _bfpo(values: dict[str, Any], folder: Path, rows: list[dict[str, str]], steps: int, per_step: int) -> None:
    from bfpo.config import SftConfig
    from bfpo.runs.stages import run_stage

    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings: dict[str, Any] = {
        "model": str(folder / "model"),
        "data": {"files": str(folder / "rows.jsonl")},
        "completions_per_step": per_step,
        "max_steps": steps,
        "dtype": "bfloat16" if values["half"] else "float32",
        "learning_rate": 1e-5,
    }
    run_stage("sft", SftConfig(**settings), folder / "run")


def _trl(values: dict[str, Any], folder: Path, rows: list[dict[str, str]], steps: int, per_step: int) -> None:
    import dataclasses

    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    flash = values["device"] == "cuda" and importlib.util.find_spec("flash_attn") is not None
    per_pass = min(per_step, 16)
    wanted = {
        "output_dir": str(folder / "trl"),
        "max_steps": steps,
        "per_device_train_batch_size": per_pass,
        "gradient_accumulation_steps": per_step // per_pass,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "bf16": values["half"],
        "use_cpu": values["device"] == "cpu",
        "gradient_checkpointing": False,
        "completion_only_loss": True,
        "padding_free": flash,
        "max_length": None,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": values["device"] != "cpu",
    }
    known = {field.name for field in dataclasses.fields(SFTConfig)}
    model = AutoModelForCausalLM.from_pretrained(
        folder / "model",
        dtype="float32",  # what trains, as in bfpo sft; the products are bfloat16 by autocast
        attn_implementation="flash_attention_2" if flash else "sdpa",
        trust_remote_code=False,
    )
    SFTTrainer(
        model,
        args=SFTConfig(**{name: value for name, value in wanted.items() if name in known}),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder / "model", trust_remote_code=False),
    ).train()


if __name__ == "__main__":
    worker(measure)

"""WORKER: supervised fine-tuning by the command `bfpo sft`, or by TRL's `SFTTrainer`, on the same rows and weights."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.flops import needed_flops
from benchmarks.process import worker
from benchmarks.sft_training import SftRun, trl_trainer
from benchmarks.training import Memory, make_clock
from benchmarks.workload import EOS, ModelShape, make_model, make_pairs, make_tokenizer, text_rows
from bfpo.core.errors import RunError
from bfpo.data.tokenize import TokenPair

LEARNING_RATE = 1e-5


class _MeasuredError(Exception):
    """The last step has been timed: what would follow, checkpoint and model, is not measured."""


def measure(values: dict[str, Any]) -> dict[str, Any]:
    """Train on `prompt` and `completion`, all weights; seconds and tokens are those after the first step."""
    from transformers import trainer as transformers_trainer

    shape = ModelShape(**values["shape"])
    small, steps, per_step = values["small"], 3 if values["small"] else 8, 4 if values["small"] else 64
    pairs = make_pairs(steps * per_step, vocabulary=shape.vocabulary, seed=values["seed"], scale=0.1 if small else 1.0)
    lengths = [(len(pair.prompt_ids), len(pair.chosen_ids), 0) for pair in pairs]
    clock = _stopping(steps)
    transformers_trainer.DEFAULT_CALLBACKS.append(clock)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_model(shape, folder / "model", device=values["device"], half=values["half"])
        memory = Memory(values["device"])
        before = memory.now()
        memory.reset()
        try:
            (_bfpo if values["arm"] == "bfpo" else _trl)(values, folder, pairs, steps, per_step)
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


def write_model(shape: ModelShape, folder: Path, *, device: str, half: bool, ends: Sequence[int] = ()) -> None:
    """Write a model with random weights and its tokenizer; `ends`: tokens that end an answer beside the end token."""
    model = make_model(shape, device=device, half=half)
    model.bfloat16() if half else model.float()
    model.generation_config.eos_token_id = [EOS, *ends]
    model.save_pretrained(folder)
    make_tokenizer(shape.vocabulary).save_pretrained(folder)


def _bfpo(values: dict[str, Any], folder: Path, pairs: list[TokenPair], steps: int, per_step: int) -> None:
    from bfpo.config import SftConfig
    from bfpo.runs.stages import run_stage

    rows = [{"prompt": row["prompt"], "completion": row["chosen"].removesuffix(" </s>")} for row in text_rows(pairs)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings: dict[str, Any] = {
        "model": str(folder / "model"),
        "data": {"files": str(folder / "rows.jsonl")},
        "completions_per_step": per_step,
        "max_steps": steps,
        "dtype": "bfloat16" if values["half"] else "float32",
        "learning_rate": LEARNING_RATE,
    }
    run_stage("sft", SftConfig(**settings), folder / "run")


def _trl(values: dict[str, Any], folder: Path, pairs: list[TokenPair], steps: int, per_step: int) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = SftRun(
        trainer="trl",
        form=values["form"],
        model=str(folder / "model"),
        steps=steps,
        texts_per_step=per_step,
        texts_per_forward=min(per_step, 16),
        seed=values["seed"],
        dtype="bfloat16" if values["half"] else "float32",
        learning_rate=LEARNING_RATE,
        device=values["device"],
        kernels=values["kernels"],
    )
    # What trains is float32, as in bfpo sft; the products are bfloat16 by autocast.
    model = AutoModelForCausalLM.from_pretrained(run.model, dtype="float32", trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(run.model, trust_remote_code=False)
    trl_trainer(run, model, tokenizer, pairs, str(folder / "trl")).train()


if __name__ == "__main__":
    worker(measure)

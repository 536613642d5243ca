"""WORKER: sampling by the command `bfpo generate`, or by plain `generate` of transformers, from the same weights.

Both load the model from a folder, which counts as time for both. So many tokens end an answer that answers have a mean
length of `MEAN_LENGTH` tokens; the two draw different ones.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.generation import MEAN_LENGTH
from benchmarks.process import worker
from benchmarks.training import Memory
from benchmarks.workload import FIRST_WORD, ModelShape
from bfpo.core.errors import RunError


def measure(values: dict[str, Any]) -> dict[str, Any]:
    """Return seconds, sampled tokens and the memory peak; `batch` is that of plain transformers."""
    import torch
    import transformers  # noqa: F401

    from benchmarks.gpu.sft import write_model

    shape = ModelShape(**values["shape"])
    generator = np.random.default_rng(values["seed"])
    num, most = (8, 64) if values["small"] else (256, 256)
    lengths = np.clip(150 * np.exp(0.6 * generator.standard_normal(num)), 50, 500).astype(int)
    prompts = [
        " ".join(f"w{i}" for i in generator.integers(FIRST_WORD, shape.vocabulary, size=length)) for length in lengths
    ]
    words = np.arange(FIRST_WORD, shape.vocabulary)
    ends = generator.choice(words, max(1, shape.vocabulary // MEAN_LENGTH), replace=False).tolist()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_model(shape, folder / "model", device=values["device"], half=values["half"], ends=ends)
        memory = Memory(values["device"])
        memory.reset()
        started = time.perf_counter()
        tokens = (_bfpo if values["arm"] == "bfpo" else _plain)(values, folder, prompts, most)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    return {"loop_seconds": seconds, "loop_tokens": tokens, "peak": memory.peak()}


def _bfpo(values: dict[str, Any], folder: Path, prompts: list[str], most: int) -> int:
    from bfpo.config import GenerateConfig
    from bfpo.runs.stages import run_stage

    (folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in prompts), encoding="utf-8")
    settings: dict[str, Any] = {
        "model": str(folder / "model"),
        "prompts": str(folder / "prompts.txt"),
        "max_new_tokens": most,
        "dtype": "bfloat16" if values["half"] else "float32",
        "seed": values["seed"],
    }
    made = run_stage("generate", GenerateConfig.model_validate(settings), folder / "run").record["completions"]
    if made["num_completions"] != len(prompts):
        raise RunError(f"bfpo generate: {made['num_completions']} completions for {len(prompts)} prompts")
    return int(made["completion_tokens"])


def _plain(values: dict[str, Any], folder: Path, prompts: list[str], most: int) -> int:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model", padding_side="left", trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(
        folder / "model", dtype="bfloat16" if values["half"] else "float32", trust_remote_code=False
    ).to(values["device"])
    torch.manual_seed(values["seed"])
    ends = torch.tensor(model.generation_config.eos_token_id, device=values["device"])
    total = 0
    ordered = sorted(prompts, key=len, reverse=True)
    for start in range(0, len(ordered), values["batch"]):
        batch = tokenizer(ordered[start : start + values["batch"]], return_tensors="pt", padding=True).to(
            values["device"]
        )
        batch.pop("token_type_ids", None)
        output = model.generate(**batch, max_new_tokens=most, do_sample=True, top_k=0, temperature=1.0)
        made = output[:, batch["input_ids"].shape[1] :]
        ended = torch.isin(made, ends).cumsum(1)
        total += int((ended == 0).sum())
    return total


if __name__ == "__main__":
    worker(measure)

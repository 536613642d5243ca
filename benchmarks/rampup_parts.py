"""WORKER: one part of the way to the first step, on so many synthetic pairs, timed and with its peak memory."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import peak_rss, reset_peak, rss
from benchmarks.process import worker
from benchmarks.workload import MODELS, make_model, make_pairs, make_tokenizer
from bfpo.core.files import write_text_whole
from bfpo.data.tokenize import TokenPair

SHAPE = MODELS["XS"]
WORDS_PER_FIELD = 40


def write_synthetic_pairs(path: Path, rows: int, *, seed: int = 0) -> None:
    """Write pairs of three fields of 40 words each as JSON lines, a thousand at a time, so that memory stays flat."""
    generator = np.random.default_rng(seed)
    with path.open("w", encoding="utf-8") as file:
        for start in range(0, rows, 1000):
            count = min(1000, rows - start)
            drawn = generator.integers(3, SHAPE.vocabulary, size=(count, 3, WORDS_PER_FIELD)).tolist()
            for i, texts in enumerate(drawn, start):
                prompt, chosen, rejected = (" ".join(f"w{word}" for word in words) for words in texts)
                row = {
                    "id": f"pair-{i}",
                    "prompt": prompt,
                    "chosen": chosen,
                    "rejected": rejected,
                    "chosen_is_safe": i % 2 == 0,
                    "rejected_is_safe": i % 3 == 0,
                }
                file.write(json.dumps(row) + "\n")


def read(path: Path) -> int:
    """Read pairs as `bfpo train` does, and count them."""
    from bfpo.data.load import PairStream
    from bfpo.data.settings import DataConfig

    return sum(1 for _ in PairStream(DataConfig(files=[str(path)])))


def read_and_tokenize(path: Path) -> Any:
    """Read pairs and write their tokens to a mapped file, as `bfpo train` does."""
    from bfpo.data.load import PairStream
    from bfpo.data.settings import DataConfig
    from bfpo.data.store import write_tokens
    from bfpo.data.tokenize import PairTokenizer

    tokenize = PairTokenizer(make_tokenizer(SHAPE.vocabulary))
    return write_tokens(path.with_suffix(".arrow"), tokenize(PairStream(DataConfig(files=[str(path)]))))


def prepare(path: Path) -> Any:
    """Split, clean and describe pairs in one process, as `bfpo prepare` does."""
    from bfpo.config import PrepareConfig
    from bfpo.runs.stages import run_stage

    sources = [{"name": "pairs", "files": str(path)}]
    return run_stage("prepare", PrepareConfig.model_validate({"sources": sources, "processes": 1}), path.parent / "out")


def reference_pass(rows: int, folder: str) -> Callable[[], Any]:
    """Return what computes and stores the reference log-probs of so many pairs with a tiny model, as the trainer does.

    The pairs come from a mapped file of tokens; a thousand at a time are drawn.
    """
    from bfpo import BFPOConfig, BFPOTrainer
    from bfpo.data.store import write_tokens

    def drawn() -> Iterator[TokenPair]:
        for start in range(0, rows, 1000):
            yield from make_pairs(min(1000, rows - start), vocabulary=SHAPE.vocabulary, seed=start, scale=0.2)

    pairs = write_tokens(Path(folder) / "pairs.arrow", drawn())
    model, tokenizer = make_model(SHAPE), make_tokenizer(SHAPE.vocabulary)
    arguments = BFPOConfig(
        output_dir=folder,
        per_device_eval_batch_size=16,
        max_steps=1,
        reference="precompute",
        reference_cache=str(Path(folder) / "cache"),
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    return lambda: BFPOTrainer(model, arguments, train_dataset=pairs, processing_class=tokenizer)


def measure(values: dict[str, Any]) -> dict[str, Any]:
    """Return seconds and bytes above what was resident before the part began."""
    import bfpo.commands.prepare
    import bfpo.data.load
    import bfpo.data.store
    import bfpo.data.tokenize
    import bfpo.plots.style
    import bfpo.training.trainer  # noqa: F401  the parts are timed, not the imports

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pairs.jsonl"
        run: Callable[[], Any]
        if values["part"] == "reference pass":
            run = reference_pass(values["rows"], folder)
        else:
            write_synthetic_pairs(path, values["rows"])
            part = {"read": read, "read and tokenize": read_and_tokenize, "prepare": prepare}[values["part"]]

            def run() -> Any:
                return part(path)

        before = rss()
        reset_peak()
        started = time.perf_counter()
        kept = run()
        seconds, peak = time.perf_counter() - started, peak_rss()
        del kept
    return {"seconds": seconds, "peak_bytes": None if peak is None or before is None else peak - before}


def dry_run_files(folder: Path) -> Path:
    """Write a tiny model, a hundred pairs and a config of `bfpo train`; return the config."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = folder / "model"
    make_model(SHAPE).save_pretrained(model)
    make_tokenizer(SHAPE.vocabulary).save_pretrained(model)
    write_synthetic_pairs(folder / "pairs.jsonl", 100)
    config = folder / "train.yaml"
    write_text_whole(config, f"model: {model}\ndata:\n  files: [{folder / 'pairs.jsonl'}]\n")
    return config


if __name__ == "__main__":
    worker(measure)

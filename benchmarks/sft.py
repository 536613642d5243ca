"""BENCHMARK: CPU time and memory of training on completions, ours against TRL's `SFTTrainer` with packing.

    python -m benchmarks.sft [--quick] [--models M FOLDER]

Same model, ids, labels, order and texts per optimizer step; all weights train. Every measurement is a process of its
own, in CPU-seconds; within a repeat, which has texts of its own, their order is shuffled.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.options import add_common_options, thread_count
from benchmarks.process import QUIET, of_dtype, program, read_results, write_results
from benchmarks.sft_training import SftRun, measure
from benchmarks.tables import show_tables
from benchmarks.throughput import AGREEMENT, losses_agree
from benchmarks.workload import MODELS
from bfpo.core.errors import RunError, TrainingError


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, check that all went the same way, write the results after each repeat, and show the table."""
    options = parse(arguments)
    left_out = ("out", "quick", "models", "repeats", "append")
    settings = {name: value for name, value in vars(options).items() if name not in left_out}
    file = of_dtype("sft", options.dtype)
    known = read_results(options.out, file) if options.append else None
    if known is not None and known["settings"] != settings:
        raise RunError(f"--append: {options.out} holds runs with the settings {known['settings']}, not {settings}")
    os.environ.update(QUIET, OMP_NUM_THREADS=str(options.threads))
    # Each measurement is a fork of a process that has imported both trainers and nothing else.
    context = get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.sft_training", "trl.trainer.sft_trainer", "bfpo.training.sft_trainer"])
    runs: list[dict[str, Any]] = [] if known is None else known["runs"]
    for repeat in range(options.repeats):
        found = one_repeat(options, repeat, context)
        check_same_way(found)
        runs += found
        write_results(options.out, file, settings=settings, runs=runs)
    show_tables(options.out, [file])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options, those of the smoke form put in where it is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_common_options(parser)
    parser.add_argument("--models", nargs="+", default=["S", "M"], help=f"of {', '.join(MODELS)}, or folders of models")
    parser.add_argument("--dtype", choices=tuple(AGREEMENT), default="float32")
    parser.add_argument("--repeats", type=int, default=3, help="each with texts of its own")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps; the first is not timed")
    parser.add_argument("--texts", type=int, default=8, help="texts per optimizer step")
    parser.add_argument("--length-scale", type=float, default=1.0, help="factor on the lengths of HH-RLHF")
    parser.add_argument("--append", action="store_true", help="add to what --out holds: another model")
    options = parser.parse_args(arguments)
    if options.quick:
        options.models, options.repeats, options.length_scale = ["XS"], 1, 0.2
    options.threads = thread_count(options.threads)
    return options


def one_repeat(options: argparse.Namespace, repeat: int, context: Any) -> list[dict[str, Any]]:
    """Return the measurements of one repeat, taken in shuffled order.

    TRL runs packed as a whole step and, without padding or masks, one text a forward pass, its best on a CPU. TRL also
    computes activations again, which is its default; ours computes the cheap ones again.
    """
    arms = [
        SftRun(
            trainer=trainer,  # type: ignore[arg-type]
            form=form,  # type: ignore[arg-type]
            model=model,
            steps=options.steps,
            texts_per_step=options.texts,
            texts_per_forward=num,
            seed=repeat,
            dtype=options.dtype,
            length_scale=options.length_scale,
            recompute=recompute,  # type: ignore[arg-type]
        )
        for model in options.models
        for trainer, form, num, recompute in (
            ("bfpo", "packed", options.texts, False),
            ("bfpo", "packed", options.texts, "selective"),
            ("bfpo", "packed", (options.texts + 1) // 2, "selective"),
            ("bfpo", "packed", 1, False),
            ("trl", "packed", options.texts, False),
            ("trl", "packed", options.texts, True),
            ("trl", "padded", 1, False),
        )
    ]
    random.Random(repeat).shuffle(arms)
    found = []
    for place, run in enumerate(arms, 1):
        with ProcessPoolExecutor(1, mp_context=context) as process:
            measured = process.submit(measure, run, options.threads).result()
        values = {
            "repeat": repeat,
            "model": Path(run.model).name,
            "trainer": run.trainer,
            "form": run.form,
            "texts_per_forward": run.texts_per_forward,
            "recompute": run.recompute,
        }
        shown = " ".join(str(value) for name, value in values.items() if name != "repeat")
        sys.stderr.write(f"repeat {repeat + 1}/{options.repeats}, {place}/{len(arms)}: {shown}\n")
        found.append({**values, **measured})
    return found


def check_same_way(runs: Sequence[dict[str, Any]], dtype: str = "float32") -> None:
    """Raise `TrainingError` where runs of one model saw other tokens, took other steps or had other losses."""
    first_of: dict[str, dict[str, Any]] = {}
    for run in runs:
        first = first_of.setdefault(run["model"], run)
        name = f"{run['model']}: {run['trainer']}, {run['form']}, {run['texts_per_forward']} a forward"
        if run["loop_tokens"] != first["loop_tokens"] or len(run["losses"]) != len(first["losses"]):
            raise TrainingError(f"{name}: other tokens or steps than {first['trainer']}")
        moved = max(abs(loss - first["losses"][0]) for loss in first["losses"])
        for step, (loss, other) in enumerate(zip(run["losses"], first["losses"], strict=True), 1):
            if asked := losses_agree(loss, other, moved, dtype):
                raise TrainingError(
                    f"{name}: the loss of step {step} is {loss:.6f}, that of {first['trainer']} {other:.6f}; {asked}"
                )


if __name__ == "__main__":
    program(main)

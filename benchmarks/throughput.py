"""BENCHMARK: tokens per CPU-second, memory and work of whole training loops, ours against TRL's `DPOTrainer`.

    python -m benchmarks.throughput [--quick]

Same model, pairs, order, trainable weights, loss and pairs per optimizer step, float32, on the CPU. Every measurement
is a process of its own; within a repeat, which has pairs of its own, their order is shuffled, with a measurement of the
machine's matrix rate among them.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import random
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.options import add_common_options, integers, thread_count
from benchmarks.process import in_process, program, write_results
from benchmarks.tables import show_tables
from benchmarks.training import TrainingRun
from benchmarks.workload import MODELS
from bfpo.core.errors import TrainingError

# Of a loss, and of how far losses move, so that agreement says something. In bfloat16 the two sides round at other
# places: a log-prob of 25 tokens is off by 0.2 nats, their mean by 0.008, and a loss of 0.25 by 0.01. TRL's own two
# forms differ by 0.05 of a loss.
AGREEMENT = {"float32": (1e-3, 1 / 20), "bfloat16": (0.1, 1 / 5)}
REFERENCES = ("precomputed", "online")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, check that both did the same work, write the results and show the table."""
    options = parse(arguments)
    settings = {name: value for name, value in vars(options).items() if name not in ("out", "quick")}
    runs: list[dict[str, Any]] = []
    for repeat in range(options.repeats):
        found = one_repeat(options, repeat)
        check_same_work(found)
        runs += found
    settings["load"] = os.getloadavg()[2]
    write_results(options.out, "throughput", settings=settings, runs=runs)
    show_tables(options.out, ["throughput"])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options, those of the smoke form put in where it is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_common_options(parser)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["S", "M"])
    parser.add_argument("--repeats", type=int, default=3, help="each with pairs of its own")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps; the first is not timed")
    parser.add_argument("--pairs", type=int, default=4, help="pairs per optimizer step")
    parser.add_argument("--microbatches", type=integers, default=[4, 1], help="pairs per forward pass, of both")
    parser.add_argument("--length-scale", type=float, default=1.0, help="factor on the lengths of chat data")
    options = parser.parse_args(arguments)
    if options.quick:
        options.models, options.repeats, options.steps, options.microbatches = ["XS"], 1, 3, [4]
        options.length_scale = 0.2
    options.threads = thread_count(options.threads)
    return options


def one_repeat(options: argparse.Namespace, repeat: int) -> list[dict[str, Any]]:
    """Return the measurements of one repeat, taken in shuffled order."""
    arms: list[tuple[str, TrainingRun | None]] = [("matrix", None)]
    for model in options.models:
        for reference in REFERENCES:
            for trainer, microbatch in itertools.product(("bfpo", "trl"), options.microbatches):
                training = TrainingRun(
                    trainer=trainer,  # type: ignore[arg-type]
                    reference=reference,  # type: ignore[arg-type]
                    shape=MODELS[model],
                    steps=options.steps,
                    pairs_per_step=options.pairs,
                    microbatch=microbatch,
                    seed=repeat,
                    length_scale=options.length_scale,
                    cpu_clock=True,
                )
                arms.append((model, training))
    random.Random(repeat).shuffle(arms)
    found = []
    for place, (model, run) in enumerate(arms, 1):
        if run is None:
            values = {"kind": "matrix", "repeat": repeat}
            measured = in_process("benchmarks.matrix", {}, threads=options.threads)
        else:
            values = {
                "kind": "training",
                "repeat": repeat,
                "model": model,
                "trainer": run.trainer,
                "reference": run.reference,
                "microbatch": run.microbatch,
            }
            measured = in_process("benchmarks.training", dataclasses.asdict(run), threads=options.threads)
        shown = " ".join(str(value) for name, value in values.items() if name not in ("kind", "repeat") and value)
        sys.stderr.write(f"repeat {repeat + 1}/{options.repeats}, {place}/{len(arms)}: {shown or 'matrix rate'}\n")
        found.append({**values, **measured})
    return found


def losses_agree(loss: float, other: float, moved: float, dtype: str) -> str:
    """Return what is asked for where two losses of a step differ too much, "" where they agree."""
    share, part = AGREEMENT[dtype]
    if abs(loss - other) <= min(share * abs(other), moved * part):
        return ""
    return f"they must agree to {share} and to {part:g} of how far they move ({moved:.2g})"


def check_same_work(runs: Sequence[dict[str, Any]], dtype: str = "float32") -> None:
    """Raise `TrainingError` where trainers of a repeat saw other tokens, took other steps or went another way."""
    training = [run for run in runs if run["kind"] == "training"]
    groups = {(run["model"], run["repeat"]) for run in training}
    for group in groups:
        same = [run for run in training if (run["model"], run["repeat"]) == group]
        first = same[0]
        start = first["losses"][0]
        moved = max(abs(loss - start) for loss in first["losses"])
        if moved < AGREEMENT[dtype][0] * abs(start):
            raise TrainingError(f"{group}: the losses move by {moved:.2g} only, so their agreement would say nothing")
        for run in same:
            if run["first_step_flops"] < run["first_step_needed_flops"]:
                raise TrainingError(
                    f"{group}: {run['trainer']} is counted to do {run['first_step_flops']} operations in a step, "
                    f"fewer than needed ({run['first_step_needed_flops']}); the count or the formula is wrong"
                )
        for run in same[1:]:
            name = f"{group}: {run['trainer']} with the reference {run['reference']}"
            if len(run["losses"]) != len(first["losses"]) or run["loop_tokens"] != first["loop_tokens"]:
                raise TrainingError(
                    f"{name}: {len(run['losses'])} steps and {run['loop_tokens']} tokens; "
                    f"{first['trainer']} took {len(first['losses'])} and {first['loop_tokens']}"
                )
            for step, (loss, other) in enumerate(zip(run["losses"], first["losses"], strict=True), 1):
                if asked := losses_agree(loss, other, moved, dtype):
                    raise TrainingError(
                        f"{name}: the loss of step {step} is {loss:.6f}, that of {first['trainer']} {other:.6f}; "
                        f"{asked}"
                    )


if __name__ == "__main__":
    program(main)

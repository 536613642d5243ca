"""BENCHMARK: how a step's CPU time and memory grow with tokens, pairs and vocabulary, ours and TRL's.

    python -m benchmarks.scaling [--quick]

One of the three varies at a time around a centre; every row of tokens has the same length, half of it prompt, so
nothing is padding. The reference is precomputed. The size of the layers is that of a model of `workload.MODELS`.
"""

from __future__ import annotations

import argparse
import dataclasses
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

Point = dict[str, int]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every point, in shuffled order, write the results and show the table."""
    options = parse(arguments)
    runs: list[dict[str, Any]] = []
    for repeat in range(options.repeats):
        arms = [(point, trainer) for point in points(options) for trainer in ("bfpo", "trl")]
        random.Random(repeat).shuffle(arms)
        for place, (point, trainer) in enumerate(arms, 1):
            sys.stderr.write(f"repeat {repeat + 1}/{options.repeats}, {place}/{len(arms)}: {trainer} {point}\n")
            runs.append(one_point(options, point, trainer, repeat))
    settings = {name: value for name, value in vars(options).items() if name not in ("out", "quick")}
    settings["load"] = os.getloadavg()[2]
    write_results(options.out, "scaling", settings=settings, runs=runs)
    show_tables(options.out, ["scaling"])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options, those of the smoke form put in where it is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_common_options(parser)
    parser.add_argument("--model", choices=MODELS, default="S", help="size of the layers")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps; the first is not timed")
    parser.add_argument("--lengths", type=integers, default=[128, 512, 2048], help="tokens of prompt + completion")
    parser.add_argument("--pairs", type=integers, default=[1, 4, 8], help="pairs per optimizer step")
    parser.add_argument("--vocabularies", type=integers, default=[4096, 32_000, 128_000])
    parser.add_argument("--centre", type=integers, default=[512, 4, 32_000], help="tokens, pairs, vocabulary")
    options = parser.parse_args(arguments)
    if options.quick:
        options.model, options.lengths, options.pairs, options.vocabularies = "XS", [32], [1], [512]
        options.centre, options.steps = [32, 1, 512], 2
    options.threads = thread_count(options.threads)
    return options


def points(options: argparse.Namespace) -> list[Point]:
    """Return the points to measure, each once."""
    length, pairs, vocabulary = options.centre
    found: list[Point] = []
    for one, other, third in [
        *((value, pairs, vocabulary) for value in options.lengths),
        *((length, value, vocabulary) for value in options.pairs),
        *((length, pairs, value) for value in options.vocabularies),
    ]:
        point = {"length": one, "pairs": other, "vocabulary": third}
        if point not in found:
            found.append(point)
    return found


def one_point(options: argparse.Namespace, point: Point, trainer: str, repeat: int) -> dict[str, Any]:
    """Return the measurement of one trainer at one point; the whole step is one forward pass."""
    run = TrainingRun(
        trainer=trainer,  # type: ignore[arg-type]
        reference="precomputed",
        shape=dataclasses.replace(MODELS[options.model], vocabulary=point["vocabulary"]),
        steps=options.steps,
        pairs_per_step=point["pairs"],
        microbatch=point["pairs"],
        seed=repeat,
        length=point["length"],
        cpu_clock=True,
    )
    measured = in_process("benchmarks.training", dataclasses.asdict(run), threads=options.threads)
    return {"kind": "training", "repeat": repeat, "trainer": trainer, **point, **measured}


if __name__ == "__main__":
    program(main)

"""SIMULATION: how evenly the pairs of a step are shared by several processes, by length and at random.

    python -m benchmarks.balance [--ranks 1,2,8,64,512] [--pairs 4,16] [--steps 40] [--out FOLDER]

A step ends when its slowest process does, so the useful part is the step's tokens over (processes x the most tokens of
one). "At random" gives each process its pairs in the order of the sampler, as data loaders do; "dealt" is what training
does (`bfpo.data.pack.deal`). Lengths are simulated: no process is started and nothing is timed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from statistics import quantiles
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.options import add_common_options, integers
from benchmarks.process import program, write_results
from benchmarks.summary import Spread
from benchmarks.tables import Table, number
from bfpo.core.markdown import table
from bfpo.data.pack import deal, pair_sizes

__all__ = ["LENGTHS", "balance_tables", "draw_lengths", "useful"]

GOAL = 0.95

# Median and spread (of the logarithm) of prompt and completion, and the limit of each: log-normal, as lengths of chats
# roughly are.
LENGTHS: dict[str, tuple[tuple[float, float, int], tuple[float, float, int]]] = {
    "short turns": ((30, 0.8, 512), (60, 0.9, 512)),
    "chat": ((120, 1.1, 2048), (250, 0.9, 2048)),
    "long tail": ((60, 1.4, 4096), (80, 1.5, 4096)),
}


def draw_lengths(name: str, num: int, generator: np.random.Generator) -> npt.NDArray[np.int64]:
    """Return tokens of prompt, chosen and rejected of pairs, (num, 3), each at least 1."""
    prompt, completion = LENGTHS[name]
    columns = [
        np.exp(generator.normal(np.log(median), spread, num)).clip(1, limit)
        for median, spread, limit in (prompt, completion, completion)
    ]
    return np.stack(columns, axis=1).astype(np.int64)


def useful(sizes: npt.NDArray[np.int64], ranks: int, *, dealt: bool) -> float:
    """Return the useful part of one step whose pairs have these tokens."""
    if dealt:
        shares = deal(sizes.tolist(), ranks)
        slowest = max(int(sizes[share].sum()) for share in shares)
    else:
        slowest = max(int(share.sum()) for share in np.array_split(sizes, ranks))
    return float(sizes.sum() / (ranks * slowest))


def main(arguments: Sequence[str] | None = None) -> None:
    """Simulate, show the table as Markdown, and write every quantile where `--out` says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_common_options(parser)
    parser.add_argument("--ranks", type=integers, default=[1, 2, 8, 64, 512])
    parser.add_argument("--pairs", type=integers, default=[4, 16], help="pairs of a process in a step, both streams")
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args(arguments)
    if options.quick:
        options.ranks, options.steps = [1, 8], 5
    runs: list[dict[str, Any]] = []
    for name in LENGTHS:
        for pairs in options.pairs:
            for ranks in options.ranks:
                generator = np.random.default_rng(0)
                steps = [
                    pair_sizes(draw_lengths(name, pairs * ranks, generator), form="packed")
                    for _ in range(options.steps)
                ]
                row: dict[str, Any] = {"lengths": name, "pairs": pairs, "ranks": ranks}
                for way, dealt in (("random", False), ("dealt", True)):
                    row[way] = quantiles([useful(sizes, ranks, dealt=dealt) for sizes in steps], n=4)
                runs.append(row)
    settings = {"steps": options.steps, "lengths": LENGTHS}
    write_results(options.out, "balance", settings=settings, runs=runs)
    (shown,) = balance_tables({"settings": settings, "runs": runs})
    sys.stdout.write("\n".join(table(shown.columns, shown.rows)) + "\n")


def balance_tables(results: dict[str, Any]) -> list[Table]:
    """Return the table of the useful part of a step, and in its note the rows below `GOAL` when dealt."""
    settings, runs = results["settings"], results["runs"]

    def cell(run: dict[str, Any], way: str) -> str:
        low, middle, high = run[way]
        return number(Spread(low, middle, high), 2)

    rows = [
        [run["lengths"], *(str(run[name]) for name in ("pairs", "ranks")), cell(run, "random"), cell(run, "dealt")]
        for run in runs
    ]
    below = [
        f"{run['lengths']}, {run['pairs']} pairs on {run['ranks']}: {run['dealt'][1]:.3f}"
        for run in runs
        if run["dealt"][1] < GOAL
    ]
    medians = "; ".join(f"{name} {one[0]:g} and {other[0]:g}" for name, (one, other) in settings["lengths"].items())
    note = (
        f"Simulated, nothing is timed: tokens of a step over (processes x the most tokens of one), median [quartiles] "
        f"of {settings['steps']} steps of packed rows. Log-normal, medians of prompt and completion: {medians}. "
        f"Below {GOAL} when dealt: {'; '.join(below) or 'none'}."
    )
    columns = ["lengths", "pairs per process", "processes", "at random", "dealt"]
    return [Table("The pairs of a step, shared by processes", note, columns, rows)]


if __name__ == "__main__":
    program(main)

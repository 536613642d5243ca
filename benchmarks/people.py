"""Coverage of rates and paired differences from people's labels and a judge (PPI++), over simulated answers.

Axes: T trials, N answers (prompts), n of them labelled.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import expit, ndtri

from benchmarks.options import add_common_options
from benchmarks.process import program, write_results
from bfpo.experiments.tradeoff import table_row
from bfpo.stats.clustered import clopper_pearson
from bfpo.stats.powered import powered_difference_bounds, powered_rate_bounds

__all__ = ["GRID", "JUDGES", "coverage", "people_table", "summary"]

Floats = npt.NDArray[np.float64]
CONFIDENCE = 0.95
GRID: dict[str, Sequence[Any]] = {
    "labels": ((10, 100), (20, 100), (20, 400), (40, 400), (60, 100), (60, 400), (100, 400), (200, 400), (60, 3000)),
    "rates": (0.005, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.9, 0.98, 0.995),
    "pairs": ((0.02, 0.02), (0.1, 0.3), (0.3, 0.05), (0.5, 0.5), (0.5, 0.6), (0.9, 0.95), (0.02, 0.9)),
}


def _noisy(right: float, wrong: float) -> Callable[[np.random.Generator, Floats], Floats]:
    """Return a judge that says 1 of this share of the answers that are 1, and of this share of the others."""
    return lambda rng, truth: (rng.random(truth.shape) < np.where(truth > 0, right, wrong)).astype(np.float64)


def _graded(distance: float) -> Callable[[np.random.Generator, Floats], Floats]:
    """Return a judge whose scores are normal, and so far apart."""
    return lambda rng, truth: np.asarray(expit(rng.standard_normal(truth.shape) + distance * (truth - 0.5)))


JUDGES: dict[str, Callable[[np.random.Generator, Floats], Floats]] = {
    "says nothing": lambda rng, truth: rng.random(truth.shape),
    "right 4 times in 5": _noisy(0.8, 0.2),
    "right 19 times in 20": _noisy(0.95, 0.05),
    "exact": lambda rng, truth: truth,
    "lenient": _noisy(0.4, 0.02),
    "strict": _noisy(1.0, 0.3),
    "probabilities, AUC .76": _graded(1.0),
    "probabilities, AUC .92": _graded(2.0),
}
Cell = tuple[Floats, Floats, Floats]
"""Labels and predictions of the labelled answers, (T, n) each, and the mean prediction of all N, (T,)."""


def _ours(cell: Cell, total: int) -> tuple[Floats, Floats]:
    labels, predicted, mean = cell
    found = powered_rate_bounds(labels, labels, predicted, np.ones_like(labels), mean, total, CONFIDENCE)
    return found.low, found.high


def _alone(cell: Cell, total: int) -> tuple[Floats, Floats]:
    return clopper_pearson(cell[0].mean(axis=1), cell[0].shape[1], CONFIDENCE)


def _normal(cell: Cell, total: int) -> tuple[Floats, Floats]:
    """Return the normal interval of PPI++ as in the paper, with the weight tuned on the labels."""
    labels, predicted, mean = cell
    num = labels.shape[1]
    y, f = labels - labels.mean(axis=1, keepdims=True), predicted - predicted.mean(axis=1, keepdims=True)
    spread = (f * f).mean(axis=1)
    weight = np.where(spread > 0, (y * f).mean(axis=1) / np.where(spread > 0, spread, 1.0), 0.0)
    value = labels.mean(axis=1) - weight * (predicted.mean(axis=1) - mean)
    variance = (y - weight[:, None] * f).var(axis=1, ddof=1) * (1 / num - 1 / total) + y.var(axis=1, ddof=1) / total
    half = float(ndtri((1 + CONFIDENCE) / 2)) * np.sqrt(variance)
    return value - half, value + half


OURS, PAIRED = "people + judge, bfpo", "people + judge, bfpo, paired difference"
METHODS: dict[str, Callable[[Cell, int], tuple[Floats, Floats]]] = {
    OURS: _ours,
    "people alone (Clopper-Pearson)": _alone,
    "PPI++ with a normal interval": _normal,
}


def coverage(grid: Mapping[str, Sequence[Any]], trials: int) -> Iterator[dict[str, Any]]:
    """Yield coverage and mean half-width of each method in each cell of the grid."""
    for (num, total), (name, judge) in itertools.product(grid["labels"], JUDGES.items()):
        for rate in grid["rates"]:
            rng = np.random.default_rng(zlib.crc32(f"{num} {total} {name} {rate}".encode()))
            truth = (rng.random((trials, total)) < rate).astype(np.float64)
            predicted = judge(rng, truth)
            cell = truth[:, :num], predicted[:, :num], predicted.mean(axis=1)
            facts = {"labels": num, "answers": total, "judge": name, "rate": rate}
            for method, bounds in METHODS.items():
                yield {**facts, "method": method, **_measured(*bounds(cell, total), rate)}
        for (first, second), together in itertools.product(grid["pairs"], (0.0, 0.6)):
            rng = np.random.default_rng(zlib.crc32(f"{num} {total} {name} {first} {second} {together}".encode()))
            luck = rng.random((trials, total))
            other = np.where(rng.random(luck.shape) < together, luck, rng.random(luck.shape))
            one, two = (luck < first).astype(np.float64), (other < second).astype(np.float64)
            said = judge(rng, one) - judge(rng, two)
            ones = np.ones((trials, num))
            difference = (one - two)[:, :num]
            found = powered_difference_bounds(difference, said[:, :num], ones, said.mean(axis=1), total, CONFIDENCE)
            facts = {"labels": num, "answers": total, "judge": name, "rate": [first, second], "together": together}
            yield {**facts, "method": PAIRED, **_measured(found.low, found.high, first - second)}


def _measured(low: Floats, high: Floats, truth: float) -> dict[str, float]:
    inside = (low <= truth) & (truth <= high)
    return {"coverage": float(inside.mean()), "half_width": float((high - low).mean()) / 2}


def summary(cells: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each method and number of labels: lowest and mean coverage, the worst cell, mean half-width."""
    groups: dict[tuple[str, int, int], list[Mapping[str, Any]]] = {}
    for cell in cells:
        groups.setdefault((cell["method"], cell["labels"], cell["answers"]), []).append(cell)
    return [
        {
            "method": method,
            "labels": labels,
            "answers": answers,
            "cells": len(found),
            "mean_coverage": float(np.mean([cell["coverage"] for cell in found])),
            "worst": min(found, key=lambda cell: float(cell["coverage"])),
            "half_width": float(np.mean([cell["half_width"] for cell in found])),
            "by_judge": {
                name: float(
                    np.mean([c["half_width"] for c in found if c["judge"] == name and c["rate"] == 0.35] or [0])
                )
                for name in JUDGES
            },
        }
        for (method, labels, answers), found in groups.items()
    ]


def _shown(cell: Mapping[str, Any], judge: str) -> bool:
    return bool(cell["judge"] == judge and cell["rate"] == 0.35)


def people_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of docs/annotate.md as Markdown: half-widths are in points, at a rate of 35%."""
    judges = [name for name in JUDGES if name not in ("lenient", "strict")]
    heads = ["interval", "labels", "answers", "lowest coverage", "mean", *(f"+- {name}" for name in judges)]
    lines = [table_row(heads), table_row(["---"] * len(heads))]
    for row in sorted(rows, key=lambda row: list(dict.fromkeys(r["method"] for r in rows)).index(row["method"])):
        found = [f"{row['worst']['coverage']:.3f}", f"{row['mean_coverage']:.3f}"]
        widths = ["" if row["method"] == PAIRED else f"{100 * row['by_judge'][name]:.1f}" for name in judges]
        lines.append(table_row([row["method"], str(row["labels"]), str(row["answers"]), *found, *widths]))
    return "\n".join(lines)


def main() -> None:
    """Simulate the grid and print the table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    add_common_options(parser)
    parser.add_argument("--trials", type=int, default=4000, help="simulated data sets per cell")
    options = parser.parse_args()
    trials = 50 if options.quick else options.trials
    rows = summary(coverage(GRID, trials))
    settings = {**GRID, "judges": list(JUDGES), "trials": trials, "confidence": CONFIDENCE}
    path = write_results(options.out, "people", settings=settings, runs=rows)
    sys.stdout.write(f"{people_table(rows)}\n\n{path}\n")


if __name__ == "__main__":
    program(main)

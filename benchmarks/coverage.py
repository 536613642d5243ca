"""Coverage of the intervals of rates and paired differences over simulated answers, several to a prompt.

Axes: T trials, C clusters (prompts).
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
from scipy.special import betainc, betaincinv, ndtri

from benchmarks.options import add_common_options
from benchmarks.process import program, write_results
from bfpo.core import markdown
from bfpo.stats.clustered import difference_bounds, rate_bounds

__all__ = [
    "CONFIDENCE",
    "GRID",
    "SHAPES",
    "coverage_table",
    "grouped",
    "paired_coverage",
    "rate_coverage",
    "simulate",
    "summary",
    "together",
]

Floats = npt.NDArray[np.float64]
CONFIDENCE = 0.95
GRID: dict[str, Sequence[Any]] = {
    "prompts": (10, 20, 50, 100, 300),
    "answers": (1, 2, 4),
    "rates": (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5),
}
PAIRS = (  # the rates of two models
    *((rate, rate) for rate in (0.005, 0.02, 0.1, 0.2, 0.5)),
    (0.02, 0.0), (0.5, 0.0), (0.01, 0.99), (0.02, 0.1), (0.05, 0.1), (0.2, 0.3), (0.5, 0.6), (0.5, 0.9), (0.9, 0.95),
)  # fmt: skip
_STEPS = 4000  # of the table of beta quantiles


def _beta(correlation: float) -> Callable[[float, Floats], Floats]:
    """Return the rates of prompts, given uniform numbers, whose answers have this intra-prompt correlation."""

    def rates(rate: float, uniform: Floats) -> Floats:
        if correlation == 0 or rate in (0, 1):
            return np.full_like(uniform, rate)
        if correlation == 1:
            return (uniform < rate).astype(np.float64)
        table = _beta_means(rate * (1 / correlation - 1), (1 - rate) * (1 / correlation - 1))
        return np.asarray(table[(_STEPS * (1 - uniform)).astype(int).clip(0, _STEPS - 1)], np.float64)

    return rates


def _beta_means(first: float, second: float) -> Floats:
    """Return the means of a beta distribution between its quantiles, (_STEPS,), whose mean is thus exact."""
    share = np.linspace(0, 1, _STEPS + 1)
    below, above = betaincinv(first, second, share), betaincinv(second, first, 1 - share)
    mean = first / (first + second)
    # The mean up to each quantile; near 1 from the other end, where the distance to 1 is not lost in rounding.
    low = mean * betainc(first + 1, second, below)
    high = mean - (1 - share) + (1 - mean) * betainc(second + 1, first, above)
    return np.asarray(np.clip(_STEPS * np.diff(np.where(below < 0.5, low, high)), 0.0, 1.0), np.float64)


def _always(share: float) -> Callable[[float, Floats], Floats]:
    """Return rates where this share of the hits comes from prompts that always hit, and the others are alike."""

    def rates(rate: float, uniform: Floats) -> Floats:
        always = share * rate
        return np.where(uniform < always, 1.0, (rate - always) / (1 - always))

    return rates


def _coin(rate: float, uniform: Floats) -> Floats:
    """Return rates where prompts hit every other time or, the others, never (always above a rate of a half)."""
    if rate > 0.5:
        return 1 - _coin(1 - rate, uniform)
    return np.where(uniform < 2 * rate, 0.5, 0.0)


SHAPES: dict[str, Callable[[float, Floats], Floats]] = {
    **{f"correlation {correlation:g}": _beta(correlation) for correlation in (0, 0.2, 0.5, 0.8, 1)},
    "a fifth of the hits from prompts that always hit": _always(0.2),
    "half of the hits from prompts that always hit": _always(0.5),
    "prompts that hit half the time, others never": _coin,
}
Bounds = tuple[Floats, Floats]


def this_interval(hits: Floats, answers: int) -> Bounds:
    """Return the bounds of `bfpo.stats.rate_interval`, (T,), from hits per prompt, (T, C)."""
    return rate_bounds(hits, hits, np.full_like(hits, answers), CONFIDENCE)


def wilson_of_answers(hits: Floats, answers: int) -> Bounds:
    """Return Wilson's bounds as if all answers were independent."""
    return _wilson(hits.mean(axis=1) / answers, hits.shape[1] * answers)


def _wilson(rate: Floats, num: int) -> Bounds:
    z = float(ndtri((1 + CONFIDENCE) / 2))
    centre, scale = rate + z * z / (2 * num), 1 + z * z / num
    half = z * np.sqrt(rate * (1 - rate) / num + z * z / (4 * num * num))
    return np.where(rate > 0, (centre - half) / scale, 0.0), np.where(rate < 1, (centre + half) / scale, 1.0)


def bootstrap_of_prompts(hits: Floats, answers: int) -> Bounds:
    """Return a percentile bootstrap over prompts; without spread, Wilson's bounds of the number of prompts."""
    num = hits.shape[1]
    drawn = np.random.default_rng(0).multinomial(num, np.full(num, 1 / num), size=400)
    low, high = np.quantile(hits @ drawn.T / (num * answers), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=1)
    rate = hits.mean(axis=1) / answers
    instead = _wilson(np.round(rate * num) / num, num)
    flat = low >= high
    return np.where(flat, np.minimum(instead[0], rate), low), np.where(flat, np.maximum(instead[1], rate), high)


MAIN, PAIRED = "bfpo", "bfpo, paired difference"
METHODS: dict[str, Callable[[Floats, int], Bounds]] = {
    MAIN: this_interval,
    "Wilson, of answers": wilson_of_answers,
    "bootstrap of prompts": bootstrap_of_prompts,
}


def rate_coverage(
    grid: Mapping[str, Sequence[Any]], trials: int, methods: Mapping[str, Callable[[Floats, int], Bounds]] = METHODS
) -> Iterator[dict[str, Any]]:
    """Yield the coverage and mean width of each method in each cell of the grid; the shapes matter from 2 answers."""
    for prompts in grid["prompts"]:
        for answers in grid["answers"]:
            for rate in grid["rates"]:
                for shape, rates in SHAPES.items() if answers > 1 else [next(iter(SHAPES.items()))]:
                    rng = np.random.default_rng(zlib.crc32(f"{prompts} {answers} {rate} {shape}".encode()))
                    chances = rates(rate, rng.random((trials, prompts)))
                    hits = rng.binomial(answers, chances).astype(np.float64)
                    cell = {"prompts": prompts, "answers": answers, "rate": rate, "shape": shape}
                    other = {
                        "Wilson, all answers": _width(wilson_of_answers(hits, answers)),
                        "Wilson, one answer per prompt": _width(_wilson(hits.mean(axis=1) / answers, prompts)),
                    }
                    for name, bounds in methods.items():
                        low, high = bounds(hits, answers)
                        inside = (low <= rate) & (rate <= high)
                        widths = {key: _width((low, high)) / width for key, width in other.items()}
                        yield {**cell, "method": name, "coverage": float(inside.mean()), "widths": widths}


def paired_coverage(grid: Mapping[str, Sequence[Any]], trials: int) -> Iterator[dict[str, Any]]:
    """Yield the coverage of the interval of a paired difference; prompts and answers of two models go together."""
    for prompts in grid["prompts"]:
        for answers in grid["answers"]:
            for first, second in PAIRS:
                for shape, rates in SHAPES.items() if answers > 1 else [next(iter(SHAPES.items()))]:
                    for share in (0.0, 0.6):
                        rng = np.random.default_rng(zlib.crc32(f"{prompts} {answers} {first} {second}".encode()))
                        hard = together(rng, (trials, prompts), share)
                        luck = together(rng, (trials, prompts, answers), share)
                        hits = [
                            (each < rates(rate, own)[..., None]).mean(axis=-1)
                            for rate, own, each in zip((first, second), hard, luck, strict=True)
                        ]
                        low, high = difference_bounds(hits[0] - hits[1], np.ones_like(hits[0]), CONFIDENCE)
                        inside = (low <= first - second) & (first - second <= high)
                        cell = {"prompts": prompts, "answers": answers, "rates": [first, second], "shape": shape}
                        found = {"together": share, "method": PAIRED, "coverage": float(inside.mean())}
                        yield {**cell, **found, "widths": {}}


def together(rng: np.random.Generator, shape: tuple[int, ...], share: float) -> tuple[Floats, Floats]:
    """Return uniform numbers for two models; this share of them is the same for both."""
    first = rng.random(shape)
    return first, np.where(rng.random(shape) < share, first, rng.random(shape))


def _width(bounds: Bounds) -> float:
    return float((bounds[1] - bounds[0]).mean())


def grouped(cells: Iterable[Mapping[str, Any]], keys: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield a row for each combination of the keys, with its `cells`: lowest and mean coverage and the worst cell."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for cell in cells:
        groups.setdefault(tuple(cell[key] for key in keys), []).append(cell)
    for values, found in groups.items():
        coverage = [float(cell["coverage"]) for cell in found]
        worst = found[int(np.argmin(coverage))]
        yield {**dict(zip(keys, values, strict=True)), "cells": found, "mean": float(np.mean(coverage)), "worst": worst}


def summary(cells: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each number of answers and method: lowest and mean coverage, its worst cell, mean widths."""
    rows = []
    for row in grouped(cells, ("answers", "method")):
        found = row["cells"]
        widths = {key: float(np.mean([cell["widths"][key] for cell in found])) for key in found[0]["widths"]}
        rows.append({**row, "cells": len(found), "widths": widths})
    return sorted(rows, key=lambda row: (row["method"] == PAIRED, row["answers"]))


def coverage_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of docs/evaluation.md as Markdown."""
    widths = list(dict.fromkeys(key for row in rows for key in row["widths"]))
    heads = ["answers per prompt", "interval", "lowest coverage", "mean", *(f"width over {key}" for key in widths)]
    cells = []
    for row in rows:
        found = [f"{row['worst']['coverage']:.3f}", f"{row['mean']:.3f}"]
        found += [f"{row['widths'][key]:.2f}" if key in row["widths"] else "" for key in widths]
        cells.append([row["answers"], row["method"], *found])
    return "\n".join(markdown.table(heads, cells))


def simulate(
    benchmark: str,
    settings: Mapping[str, Any],
    measured: Callable[[int], list[dict[str, Any]]],
    table: Callable[[Sequence[Mapping[str, Any]]], str],
    *,
    trials: int,
) -> None:
    """Read the options, simulate, write the results and print the table."""
    parser = argparse.ArgumentParser(description="Simulate the grid and print the table.")
    add_common_options(parser, threads=False)
    parser.add_argument("--trials", type=int, default=trials, help="simulated data sets per cell")
    options = parser.parse_args()
    trials = 50 if options.quick else options.trials
    rows = measured(trials)
    path = write_results(
        options.out, benchmark, settings={**settings, "trials": trials, "confidence": CONFIDENCE}, runs=rows
    )
    sys.stdout.write(f"{table(rows)}\n\n{path}\n")


def _measured(trials: int) -> list[dict[str, Any]]:
    return summary(itertools.chain(rate_coverage(GRID, trials), paired_coverage(GRID, trials // 2)))


if __name__ == "__main__":
    program(lambda: simulate("coverage", {**GRID, "pairs": PAIRS}, _measured, coverage_table, trials=4000))

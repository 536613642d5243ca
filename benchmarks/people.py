"""Coverage of rates and paired differences from people's labels and a judge (PPI++), over simulated answers.

Axes: T trials, N prompts, M answers to each, n labelled prompts.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import expit, ndtri

from benchmarks.coverage import CONFIDENCE, SHAPES, grouped, simulate, together
from benchmarks.process import program
from bfpo.core import markdown
from bfpo.stats.clustered import clopper_pearson
from bfpo.stats.powered import powered_difference_bounds, powered_rate_bounds

__all__ = [
    "GRIDS",
    "JUDGES",
    "METHODS",
    "OURS",
    "PAIRED",
    "PLAIN",
    "Grid",
    "Population",
    "coverage",
    "drawn",
    "people_table",
    "summary",
]

Floats = npt.NDArray[Any]
"""float64; answers and verdicts before they are summed are float32."""
Rate = float | tuple[float, float]
"""The rate of all prompts, or of the first and of the second stratum."""


def _noisy(right: float, wrong: float) -> Callable[[np.random.Generator, Floats], Floats]:
    """Return a judge that says 1 of this share of the answers that are 1, and of this share of the others."""
    return lambda rng, truth: (
        rng.random(truth.shape, np.float32) < np.where(truth > 0, np.float32(right), np.float32(wrong))
    ).astype(np.float32)


def _graded(distance: float) -> Callable[[np.random.Generator, Floats], Floats]:
    """Return a judge whose scores are normal, and so far apart."""
    return lambda rng, truth: np.asarray(expit(rng.standard_normal(truth.shape, np.float32) + distance * (truth - 0.5)))


JUDGES: dict[str, Callable[[np.random.Generator, Floats], Floats]] = {
    "says nothing": lambda rng, truth: rng.random(truth.shape, np.float32),
    "right 4 times in 5": _noisy(0.8, 0.2),
    "right 19 times in 20": _noisy(0.95, 0.05),
    "exact": lambda rng, truth: truth,
    "lenient": _noisy(0.4, 0.02),
    "strict": _noisy(1.0, 0.3),
    "probabilities, AUC .76": _graded(1.0),
    "probabilities, AUC .92": _graded(2.0),
}


@dataclass(frozen=True, slots=True)
class Population:
    """So many prompts with so many answers each, which are alike as in `SHAPES`.

    `rare`: prompts of the first stratum, of which half of the labels are; 0: no strata.
    """

    prompts: int
    rare: int = 0
    answers: int = 1
    shape: str = "correlation 0"

    def rate(self, rate: Rate) -> float:
        """Return the rate over all prompts."""
        shares = [self.rare, self.prompts - self.rare]
        return float(np.average(rate, weights=shares)) if isinstance(rate, tuple) else rate

    def truth(self, rate: Rate, hard: Floats, luck: Floats) -> Floats:
        """Return answers that are 0 or 1, (T, N, M), from uniform numbers (T, N) and (T, N, M)."""
        if isinstance(rate, tuple):
            return np.asarray(luck < np.where(np.arange(self.prompts) < self.rare, *rate)[:, None], np.float32)
        return np.asarray(luck < SHAPES[self.shape](rate, hard)[..., None], np.float32)


@dataclass(frozen=True, slots=True)
class Cell:
    """What people and the judge said: weighted sums per labelled prompt, (T, n), their weights, (n,), and the judge's
    mean over all answers, (T,), to `total` prompts.
    """

    labels: Floats
    predicted: Floats
    sizes: Floats
    mean: Floats
    total: int


def drawn(population: Population, labels: int, read: int, truth: Floats, said: Floats) -> Cell:
    """Return what is labelled, `read` answers to each of `labels` prompts, of (T, N, M); prompts are exchangeable."""
    rare = population.rare
    first = labels // 2 if rare else labels
    places = np.concatenate([np.arange(first), rare + np.arange(labels - first)])
    weights: Floats = np.ones(labels)
    if rare:
        weights = np.where(places < rare, rare / first, (population.prompts - rare) / (labels - first))
        weights /= weights.mean()

    def sums(of: Floats) -> Floats:
        return np.asarray(of[:, places, :read].sum(axis=-1, dtype=np.float64) * weights)

    return Cell(sums(truth), sums(said), weights * read, said.mean(axis=(1, 2), dtype=np.float64), population.prompts)


def _ours(cell: Cell) -> tuple[Floats, Floats]:
    sizes = np.broadcast_to(cell.sizes, cell.labels.shape)  # labels are 0 or 1, so that sums of squares are sums
    found = powered_rate_bounds(cell.labels, cell.labels, cell.predicted, sizes, cell.mean, cell.total, CONFIDENCE)
    return found.low, found.high


def _difference(cell: Cell) -> tuple[Floats, Floats]:
    sizes = np.broadcast_to(cell.sizes, cell.labels.shape)
    found = powered_difference_bounds(
        cell.labels / sizes, cell.predicted / sizes, sizes, cell.mean, cell.total, CONFIDENCE
    )
    return found.low, found.high


def _alone(cell: Cell) -> tuple[Floats, Floats]:
    return clopper_pearson(cell.labels.mean(axis=1), cell.labels.shape[1], CONFIDENCE)


def _normal(cell: Cell) -> tuple[Floats, Floats]:
    """Return the normal interval of PPI++ as in the paper, with the weight tuned on the labels."""
    labels, predicted, mean, total = cell.labels, cell.predicted, cell.mean, cell.total
    num = labels.shape[1]
    y, f = labels - labels.mean(axis=1, keepdims=True), predicted - predicted.mean(axis=1, keepdims=True)
    spread = (f * f).mean(axis=1)
    weight = np.where(spread > 0, (y * f).mean(axis=1) / np.where(spread > 0, spread, 1.0), 0.0)
    value = labels.mean(axis=1) - weight * (predicted.mean(axis=1) - mean)
    variance = (y - weight[:, None] * f).var(axis=1, ddof=1) * (1 / num - 1 / total) + y.var(axis=1, ddof=1) / total
    half = float(ndtri((1 + CONFIDENCE) / 2)) * np.sqrt(variance)
    return value - half, value + half


OURS, PAIRED = "people + judge, bfpo", "people + judge, bfpo, paired difference"
METHODS: dict[str, Callable[[Cell], tuple[Floats, Floats]]] = {
    OURS: _ours,
    "people alone (Clopper-Pearson)": _alone,
    "PPI++ with a normal interval": _normal,
}


@dataclass(frozen=True, slots=True)
class Grid:
    """Every population with its (labelled prompts, answers read of each), every judge, and every rate or pair of rates.

    The designs of one population share its data sets. `share`: of the trials.
    """

    populations: Mapping[Population, Sequence[tuple[int, int]]]
    rates: Sequence[Rate]
    pairs: Sequence[tuple[Rate, Rate]]
    judges: Sequence[str] = tuple(JUDGES)
    share: float = 1.0


PLAIN, SHOWN = "one answer per prompt", (60, 400, 0.35)
GRIDS = {
    PLAIN: Grid(
        {
            Population(100): ((10, 1), (20, 1), (60, 1)),
            Population(400): ((20, 1), (40, 1), (60, 1), (100, 1), (200, 1)),
            Population(1000): ((60, 1),),
        },
        (0.005, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.9, 0.98, 0.995),
        ((0.02, 0.02), (0.1, 0.3), (0.3, 0.05), (0.5, 0.5), (0.5, 0.6), (0.9, 0.95), (0.02, 0.9)),
    ),
    "two strata, sampled unequally": Grid(
        {
            Population(100, 20): ((20, 1), (30, 1)),
            Population(400, 40): ((20, 1), (60, 1)),
            Population(400, 100): ((40, 1), (60, 1), (100, 1)),
        },
        ((0.02, 0.02), (0.6, 0.05), (0.05, 0.6), (0.5, 0.1), (0.02, 0.9), (0.9, 0.98), (0.5, 0.5)),
        (
            ((0.6, 0.05), (0.5, 0.05)),
            ((0.6, 0.05), (0.1, 0.02)),
            ((0.05, 0.6), (0.05, 0.3)),
            ((0.02, 0.02), (0.02, 0.02)),
        ),
    ),
    "several answers per prompt": Grid(
        {
            Population(prompts, 0, answers, shape): [
                (labels, read) for labels in (20, 60) for read in (1, answers) if labels < prompts
            ]
            for prompts in (50, 200)
            for answers in (2, 4)
            for shape in ("correlation 0", "correlation 0.5", "correlation 1")
        },
        (0.02, 0.1, 0.35, 0.65, 0.98),
        ((0.1, 0.3), (0.5, 0.5), (0.9, 0.95)),
        ("says nothing", "right 4 times in 5", "exact", "strict"),
        share=0.5,
    ),
}


def coverage(grids: Mapping[str, Grid], trials: int) -> Iterator[dict[str, Any]]:
    """Yield coverage and mean half-width of each method in each cell; rivals only with one answer per prompt."""
    for name, grid in grids.items():
        methods = METHODS if name == PLAIN else {OURS: _ours}
        for population, designs in grid.populations.items():
            size = (round(trials * grid.share), population.prompts, population.answers)
            for rate in grid.rates:
                rng = _numbers(population, rate)
                truth = population.truth(rate, rng.random(size[:2]), rng.random(size, np.float32))
                for judge in grid.judges:
                    said = JUDGES[judge](rng, truth)
                    for labels, read in designs:
                        cell = drawn(population, labels, read, truth, said)
                        facts = {**asdict(population), "data": name, "labels": labels, "read": read, "judge": judge}
                        for method, bounds in methods.items():
                            found = _measured(*bounds(cell), population.rate(rate))
                            yield {**facts, "rate": rate, "method": method, **found}
            for pair, share in itertools.product(grid.pairs, (0.0, 0.6)):
                rng = _numbers(population, pair, share)
                luck = zip(pair, together(rng, size[:2], share), together(rng, size, share), strict=True)
                one, two = (population.truth(*numbers) for numbers in luck)
                for judge in grid.judges:
                    said = JUDGES[judge](rng, one) - JUDGES[judge](rng, two)
                    for labels, read in designs:
                        cell = drawn(population, labels, read, one - two, said)
                        facts = {**asdict(population), "data": name, "labels": labels, "read": read, "judge": judge}
                        found = _measured(*_difference(cell), population.rate(pair[0]) - population.rate(pair[1]))
                        yield {**facts, "rate": pair, "together": share, "method": PAIRED, **found}


def _numbers(*facts: object) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(repr(facts).encode()))


def _measured(low: Floats, high: Floats, truth: float) -> dict[str, float]:
    inside = (low <= truth) & (truth <= high)
    return {"coverage": float(inside.mean()), "half_width": float((high - low).mean()) / 2}


def summary(cells: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each method: lowest and mean coverage, the worst cell, and half-widths by judge.

    These are of 60 labels of 400 answers at a rate of 35%.
    """
    rows = []
    for row in grouped(cells, ("data", "method")):
        shown = [cell for cell in row["cells"] if (cell["labels"], cell["prompts"], cell["rate"]) == SHOWN]
        widths = {cell["judge"]: cell["half_width"] for cell in shown}
        rows.append({**row, "cells": len(row["cells"]), "half_width": widths})
    return rows


def people_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of docs/annotate.md as Markdown; half-widths are in points."""
    judges = [name for name in JUDGES if name not in ("lenient", "strict")]
    heads = ["answers", "interval", "cells", "lowest coverage", "mean", *(f"+- {name}" for name in judges)]
    cells = []
    for row in rows:
        found = [str(row["cells"]), f"{row['worst']['coverage']:.3f}", f"{row['mean']:.3f}"]
        widths = [f"{100 * row['half_width'][name]:.1f}" if name in row["half_width"] else "" for name in judges]
        cells.append([row["data"], row["method"], *found, *widths])
    return "\n".join(markdown.table(heads, cells))


def _rows(trials: int) -> list[dict[str, Any]]:
    return summary(coverage(GRIDS, trials))


SETTINGS = {
    name: {
        **asdict(replace(grid, populations={})),
        "populations": [{**asdict(one), "labels": designs} for one, designs in grid.populations.items()],
    }
    for name, grid in GRIDS.items()
}


if __name__ == "__main__":
    program(lambda: simulate("people", SETTINGS, _rows, people_table, trials=4000))

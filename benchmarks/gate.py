"""The rate of false passes of `bfpo gate`, where the true difference is exactly the limit.

One binary answer per prompt: exact, over all outcomes. Graded answers, and two answers per prompt: simulated.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import gammaln, xlogy

from benchmarks.coverage import grouped, simulate
from benchmarks.process import program
from bfpo.core import markdown
from bfpo.stats import difference_floor
from bfpo.stats.clustered import difference_bounds

__all__ = ["GRID", "false_passes", "passing", "rows_of", "table"]

Floats = npt.NDArray[np.float64]
GRID: dict[str, Sequence[Any]] = {
    "confidences": (0.9, 0.95, 0.99),
    "prompts": (10, 20, 50, 100),
    "limits": (0.05, 0.0, -0.03, -0.1),
    "against": (0.0, 0.005, 0.02, 0.05, 0.1, 0.2, 0.3, 0.45),  # shares that favour the start, beyond those of the limit
    "several": {"prompts": (20, 100), "limits": (0.05, -0.05), "against": (0.02, 0.2)},  # type: ignore[dict-item]
}
OURS, ONE_SIDE = "bfpo gate", "one side of the two-sided interval"
Passes = Callable[[int, int, int, float, float], bool]


def _ours(favour: int, against: int, num: int, limit: float, confidence: float) -> bool:
    """Return whether so many prompts that favour the model, and the start, of `num` show the limit."""
    first = [1.0] * favour + [0.0] * (num - favour)
    second = [0.0] * favour + [1.0] * against + [0.0] * (num - favour - against)
    bound = difference_floor(first, second, confidence=confidence)
    return bound is not None and bound >= limit


def _one_side(favour: int, against: int, num: int, limit: float, confidence: float) -> bool:
    means = np.array([1.0] * favour + [-1.0] * against + [0.0] * (num - favour - against))
    return bool(difference_bounds(means, np.ones(num), 2 * confidence - 1)[0] >= limit)


def passing(passes: Passes, num: int, limit: float, confidence: float) -> list[int]:
    """Return for b = 0 ... num the largest c that passes, -1 if none does: more against the model is never better."""
    most, found = -1, []
    for favour in range(num + 1):
        most = min(most, num - favour)
        while most < num - favour and passes(favour, most + 1, num, limit, confidence):
            most += 1
        found.append(most)
    return found


def false_passes(most: Sequence[int], num: int, limit: float, against: float) -> float:
    """Return the probability of an outcome that passes, at the limit; `against`: the share that favours the start."""
    outcomes = np.array([(b, c) for b in range(num + 1) for c in range(most[b] + 1)]).reshape(-1, 2)
    favour, c = outcomes.T
    rest = num - favour - c
    chances = (against + limit, against, 1 - 2 * against - limit)
    logs = gammaln(num + 1) - gammaln(favour + 1) - gammaln(c + 1) - gammaln(rest + 1)
    return float(
        np.exp(logs + sum(xlogy(k, max(p, 0.0)) for k, p in zip((favour, c, rest), chances, strict=True))).sum()
    )


def _exact(grid: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for confidence, num, limit in itertools.product(grid["confidences"], grid["prompts"], grid["limits"]):
        for name, passes in ((OURS, _ours), (ONE_SIDE, _one_side)):
            most = passing(passes, num, limit, confidence)
            for more in grid["against"]:
                share = max(0.0, -limit) + more
                if 2 * share + limit <= 1:
                    cell = {
                        "answers": "one",
                        "confidence": confidence,
                        "prompts": num,
                        "limit": limit,
                        "against": share,
                    }
                    yield {**cell, "method": name, "coverage": 1 - false_passes(most, num, limit, share)}


def _simulated(grid: Mapping[str, Any], trials: int) -> Iterator[dict[str, Any]]:
    own, confidence = grid["several"], 0.95
    for kind, num, limit, more in itertools.product(("graded", "two"), own["prompts"], own["limits"], own["against"]):
        rng = np.random.default_rng(zlib.crc32(f"{kind} {num} {limit} {more}".encode()))
        share = max(0.0, -limit) + more
        wrong = {OURS: 0, ONE_SIDE: 0}
        for _ in range(trials):
            first, second, prompts = _answers(rng, kind, num, share + limit, share)
            bound = difference_floor(list(first), list(second), list(prompts), confidence=confidence)
            means = np.bincount(prompts, first - second) / np.bincount(prompts)
            side = difference_bounds(means, np.bincount(prompts).astype(np.float64), 2 * confidence - 1)[0]
            wrong[OURS] += bound is not None and bound >= limit
            wrong[ONE_SIDE] += bool(side >= limit)
        for name, count in wrong.items():
            cell = {"answers": kind, "confidence": confidence, "prompts": num, "limit": limit, "against": share}
            yield {**cell, "method": name, "coverage": 1 - count / trials}


def _answers(
    rng: np.random.Generator, kind: str, num: int, favour: float, against: float
) -> tuple[Floats, Floats, npt.NDArray[np.int64]]:
    """Return values of both models with the prompt of each, whose mean difference is favour - against."""
    answers = 2 if kind == "two" else 1
    drawn = rng.random(num)
    sign = np.where(drawn < favour, 1.0, np.where(drawn > 1 - against, -1.0, 0.0))
    if kind == "two":  # a prompt's answers differ in the same direction, the second one half of the time
        sign = np.where(drawn < min(1.0, favour * 4 / 3), 1.0, np.where(drawn > 1 - against * 4 / 3, -1.0, 0.0))
        sign = np.stack([sign, sign * (rng.random(num) < 0.5)], axis=1).ravel()
        size = np.ones_like(sign)
    else:  # by a size between 0 and 1 whose mean is 2/3, of twice-thirds as many prompts
        sign = np.where(drawn < min(1.0, favour * 1.5), 1.0, np.where(drawn > 1 - against * 1.5, -1.0, 0.0))
        size = rng.beta(2, 1, num)
    prompts = np.repeat(np.arange(num), answers)
    return np.where(sign > 0, size, 0.0), np.where(sign < 0, size, 0.0), prompts


def rows_of(trials: int, grid: Mapping[str, Any] = GRID) -> list[dict[str, Any]]:
    """Return for each kind of answers, confidence and method the highest rate of false passes with its cell."""
    cells = itertools.chain(_exact(grid), _simulated(grid, trials))
    return [
        {**row, "cells": len(row["cells"]), "highest": 1 - row["worst"]["coverage"], "mean": 1 - row["mean"]}
        for row in grouped(cells, ("answers", "confidence", "method"))
    ]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of docs/gate.md as Markdown."""
    heads = ["answers per prompt", "confidence", "bound", "cells", "highest rate of false passes", "mean"]
    shares = ("highest", "mean")
    cells = [
        [row["answers"], f"{row['confidence']:g}", row["method"], row["cells"], *(f"{row[key]:.4f}" for key in shares)]
        for row in rows
    ]
    return "\n".join(markdown.table(heads, cells))


if __name__ == "__main__":
    program(lambda: simulate("gate", GRID, rows_of, table, trials=400))

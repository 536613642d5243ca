"""From every single measurement to medians, quartiles and ratios."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = [
    "Arm",
    "Spread",
    "best_rate",
    "counterpart",
    "fastest",
    "memory_ratio",
    "overall_factor",
    "point_spread",
    "rate_share",
    "speed_ratio",
    "spread",
    "throughput_arms",
]

Run = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and quartiles of repeats."""

    low: float
    median: float
    high: float


@dataclass(frozen=True, slots=True)
class Arm:
    """What was run over and over: the model, where the reference comes from, the trainer, its pairs per forward."""

    model: str
    reference: str
    trainer: str
    microbatch: int
    runs: tuple[Run, ...]

    @property
    def title(self) -> str:
        """Return the arm's name in tables and figures."""
        name = {"bfpo": "bfpo", "trl": "TRL"}[self.trainer]
        return f"{name}, {self.microbatch} pair{'s' if self.microbatch > 1 else ''} a forward"

    def tokens_per_second(self) -> list[float]:
        """Return useful tokens per CPU-second of training, by repeat."""
        return [run["loop_tokens"] / run["loop_seconds"] for run in self.runs]

    def peaks(self) -> list[float] | None:
        """Return the peak memory above the model in bytes, by repeat; `None` where it was not known."""
        peaks = [run["peak_above_model"] for run in self.runs]
        return None if None in peaks else peaks


def spread(values: Iterable[float]) -> Spread:
    """Return median and quartiles."""
    return Spread(*(float(value) for value in np.percentile(list(values), [25, 50, 75])))


def throughput_arms(runs: Sequence[Run]) -> list[Arm]:
    """Return the arms, larger models and known references first, ours before TRL's; repeats in their order."""
    training = [run for run in runs if run["kind"] == "training"]
    names = ("model", "reference", "trainer", "microbatch")
    sizes = {run["model"]: run["loop_needed_flops"] for run in training}
    keys = {tuple(run[name] for name in names) for run in training}
    ordered = sorted(keys, key=lambda key: (-sizes[key[0]], key[1] != "precomputed", key[2], -key[3]))
    by_repeat = sorted(training, key=lambda run: run["repeat"])
    return [
        Arm(
            model=key[0],
            reference=key[1],
            trainer=key[2],
            microbatch=key[3],
            runs=tuple(run for run in by_repeat if tuple(run[name] for name in names) == key),
        )
        for key in ordered
    ]


def counterpart(arms: Sequence[Arm], arm: Arm) -> Arm | None:
    """Return TRL's arm of the same model, reference and pairs per forward."""
    wanted = (arm.model, arm.reference, "trl", arm.microbatch)
    return next((a for a in arms if (a.model, a.reference, a.trainer, a.microbatch) == wanted), None)


def fastest(arms: Sequence[Arm], arm: Arm) -> Arm | None:
    """Return the fastest of TRL's arms on the same model and reference."""
    others = [a for a in arms if (a.model, a.reference, a.trainer) == (arm.model, arm.reference, "trl")]
    return max(others, key=lambda a: spread(a.tokens_per_second()).median, default=None)


def speed_ratio(arm: Arm, other: Arm) -> Spread:
    """Return how many times as many tokens per CPU-second, repeat by repeat."""
    return spread(a / b for a, b in zip(arm.tokens_per_second(), other.tokens_per_second(), strict=True))


def memory_ratio(arm: Arm, other: Arm) -> Spread | None:
    """Return the share of the other's peak above the model, repeat by repeat."""
    ours, theirs = arm.peaks(), other.peaks()
    if ours is None or theirs is None:
        return None
    return spread(a / b for a, b in zip(ours, theirs, strict=True))


def best_rate(runs: Sequence[Run]) -> float:
    """Return the best matrix rate of the machine seen in any repeat and shape, in operations per second."""
    return max(float(rate) for run in runs if run["kind"] == "matrix" for rate in run["rates"].values())


def rate_share(arm: Arm, rate: float) -> Spread:
    """Return needed operations per second as a share of the machine's best matrix rate."""
    return spread(run["loop_needed_flops"] / run["loop_seconds"] / rate for run in arm.runs)


def overall_factor(arm: Arm) -> float:
    """Return counted operations over needed ones, over the first steps of all repeats."""
    counted, needed = (sum(run[name] for run in arm.runs) for name in ("first_step_flops", "first_step_needed_flops"))
    return float(counted / needed)


def point_spread(
    runs: Sequence[Run], point: dict[str, int], trainer: str, value: Callable[[Run], float | None]
) -> Spread | None:
    """Return the spread of a value at one point of the scaling benchmark; `None` where it was not measured."""
    same = [run for run in runs if run["trainer"] == trainer and all(run[name] == point[name] for name in point)]
    values = [found for run in same if (found := value(run)) is not None]
    return spread(values) if values else None

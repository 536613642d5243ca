"""What a report knows of an experiment: a grid of settings, a comparison of methods, models between two."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from bfpo.core.schema import Score

__all__ = ["Experiment", "ExperimentPoint", "Trial"]


@dataclass(frozen=True, slots=True)
class Trial:
    """A setting that was tried on validation prompts, what it scored there, and whether it was taken."""

    setting: dict[str, Any]
    value: float | None = None
    taken: bool = False


@dataclass(frozen=True, slots=True)
class ExperimentPoint:
    """A model of an experiment, all its seeds together; `difference`: the main method minus this one, paired."""

    name: str
    title: str
    setting: dict[str, Any] = field(default_factory=dict)
    scores: list[Score] = field(default_factory=list)
    accuracy: list[Score] = field(default_factory=list)
    on_front: bool = False
    seed_values: dict[str, list[float | None]] = field(default_factory=dict)
    trainings: int | None = None
    difference: Score | None = None
    trials: list[Trial] = field(default_factory=list)

    def score(self, metric: str) -> Score | None:
        """Return a score by the name of its metric, `None` where it was not measured."""
        found = next((score for score in self.scores if score.metric == metric), None)
        return found if found is not None and found.value is not None else None


@dataclass(frozen=True, slots=True)
class Experiment:
    """A run of `sweep`, `compare` or `interpolate`, from the file that it ends with; without that, how far it is.

    `hypervolume` is above `reference`; `nearest` is the point that `at_least` asks for, by how much it `missing` what.
    `num_ended` of `num_runs` runs inside have ended. `facts`: section -> key -> value, the same for all points.
    """

    run: str
    stage: str
    status: str = ""
    objectives: list[str] = field(default_factory=list)
    points: list[ExperimentPoint] = field(default_factory=list)
    front: list[str] = field(default_factory=list)
    confidence: float = 0.95
    hypervolume: Score | None = None
    reference: dict[str, float] = field(default_factory=dict)
    at_least: dict[str, float] = field(default_factory=dict)
    nearest: str = ""
    missing: dict[str, float] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=list)
    num_runs: int = 0
    num_ended: int = 0
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def measured(self) -> bool:
        """Return whether any point has a score."""
        return any(point.scores for point in self.points)

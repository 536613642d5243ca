"""Configs of the stages that look at the trade-off: models between two, a sweep, the comparison of methods."""

from __future__ import annotations

from typing import Annotated, Any

import yaml
from pydantic import BeforeValidator, Field, model_validator

from bfpo.config.base import PathText, StageConfig
from bfpo.config.demo import WorldAlign, WorldKeys

__all__ = ["CompareConfig", "InterpolateConfig", "SweepConfig"]


def _numbers(value: object) -> object:
    """Read `0,0.25,1` as a list of numbers; what is none is left for pydantic to refuse."""
    if not isinstance(value, str):
        return [value] if isinstance(value, (int, float)) else value
    try:
        return [float(part) for part in value.split(",")]
    except ValueError:
        return value


_MORE_IS_BETTER = (
    "helpful_and_safe",
    "helpful_and_safe_benign",
    "helpful_and_safe_borderline",
    "helpful_and_safe_harmful",
    "helpfulness",
    "harmless",
    "harmless_harmful",
    "well_formed",
    "finished",
)
Share = Annotated[float, Field(ge=0, le=1)]


class InterpolateConfig(StageConfig):
    """`bfpo interpolate`: blend the weights of two models trained from one start."""

    first: PathText = Field(description="model at weight 0, such as the helpful one: folder or hub id")
    second: PathText = Field(description="model at weight 1, such as the safe one: folder or hub id")
    weights: Annotated[list[Share], BeforeValidator(_numbers), Field(min_length=1)] = Field(
        default=[0.25, 0.5, 0.75], description="shares of the second model: a list, or text such as 0.25,0.5"
    )

    @model_validator(mode="after")
    def _each_once(self) -> InterpolateConfig:
        if len(set(self.weights)) < len(self.weights):
            raise ValueError(f"weights: got {self.weights}; allowed: each weight once")
        return self


class CompareConfig(WorldKeys):
    """`bfpo compare`: every method on the closed world, each with its own setting chosen on validation prompts."""

    seeds: int = Field(default=3, ge=1, description="number of seeds; settings are chosen at the first")
    quick: bool = Field(default=False, description="try two settings for each method in place of four")
    confidence: float = Field(default=0.95, gt=0, lt=1, description="level of the intervals")
    bootstrap_samples: int = Field(default=2000, ge=1, description="number of resamples behind an interval")
    align: WorldAlign = Field(default=WorldAlign(), description="the preference runs, the same for every method")


def _grid(value: object) -> object:
    """Read `beta=0.1,0.2,alpha=0,0.5`: a part without `=` is one more value of the key before it."""
    if not isinstance(value, str):
        return value
    grid: dict[str, list[Any]] = {}
    key = ""
    for part in value.split(","):
        name, equals, text = part.partition("=")
        key = name.strip() if equals else key
        if not key:
            return value
        grid.setdefault(key, []).append(yaml.safe_load(text if equals else part))
    return grid


def _bounds(value: object) -> object:
    if not isinstance(value, str):
        return value
    pairs = [part.partition("=") for part in value.split(",")]
    try:
        return {name.strip(): float(text) for name, _, text in pairs}
    except ValueError:
        return value


class SweepConfig(StageConfig):
    """`bfpo sweep`: a grid of trainings, or the models of `bfpo interpolate`, and the trade-off that they show."""

    train: PathText | None = Field(default=None, description="config file of `bfpo train`, to which the grid is set")
    blends: PathText | None = Field(
        default=None, description="run folder of `bfpo interpolate`, whose models are evaluated in place of a grid"
    )
    grid: Annotated[dict[str, Annotated[list[Any], Field(min_length=1)]], BeforeValidator(_grid)] = Field(
        default_factory=dict,
        description="keys of train and their values: a mapping, or text as beta=0.1,0.2,alpha=0,0.5",
    )
    generate: PathText = Field(description="config file of `bfpo generate`, without model")
    evaluate: PathText | None = Field(
        default=None, description="config file of `bfpo evaluate`, without completions; null = its defaults"
    )
    objectives: list[str] = Field(
        default=["helpfulness", "harmless"], min_length=2, max_length=2, description="two metrics, more being better"
    )
    reference_point: Annotated[dict[str, float] | None, BeforeValidator(_bounds)] = Field(
        default=None, description="lowest value of each objective that counts in the hypervolume; null = 0 and 0"
    )
    at_least: Annotated[dict[str, float], BeforeValidator(_bounds)] = Field(
        default_factory=dict, description="what a model must reach, as harmless=0.95, to be the one that is named"
    )
    processes: int = Field(default=1, ge=1, description="points that run at the same time")
    memory_gib: float | None = Field(
        default=None, gt=0, description="memory that trainings at the same time may need, by estimate; null = no budget"
    )
    confidence: float = Field(default=0.95, gt=0, lt=1, description="level of the intervals")
    bootstrap_samples: int = Field(default=2000, ge=1, description="number of resamples behind an interval")
    seed: int = Field(default=0, ge=0, description="seed of the resampling")

    def unread(self) -> frozenset[str]:
        """Leave out what blends do not need."""
        return frozenset({"train", "grid", "memory_gib"} if self.blends is not None else {"blends"})

    @model_validator(mode="after")
    def _what_is_swept(self) -> SweepConfig:
        if (self.blends is None) == (self.train is None):
            raise ValueError("train, blends: exactly one of the two must be given")
        if self.blends is not None and (idle := sorted({"grid", "memory_gib"} & self.model_fields_set)):
            raise ValueError(f"{', '.join(idle)}: not read where blends is set; leave one of the two out")
        if self.train is not None and not self.grid:
            raise ValueError("grid: missing; needed: keys of train and their values, as beta=0.05,0.1")
        if unfit := [name for name in self.objectives if name not in _MORE_IS_BETTER]:
            raise ValueError(f"objectives: got {', '.join(unfit)}; allowed: {', '.join(_MORE_IS_BETTER)}")
        for key in ("at_least", "reference_point"):
            given = getattr(self, key) or {}
            if unknown := sorted(set(given) - set(self.objectives)):
                raise ValueError(f"{key}: got {', '.join(unknown)}; allowed: {', '.join(self.objectives)} (objectives)")
        if self.reference_point is not None and set(self.reference_point) != set(self.objectives):
            raise ValueError(f"reference_point: needs a value for each of {', '.join(self.objectives)}")
        return self

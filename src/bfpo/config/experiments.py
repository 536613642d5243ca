"""Configs of the stages that look at the trade-off: models between two, a sweep, the comparison of methods."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field, field_validator

from bfpo.config.base import PathText, StageConfig
from bfpo.config.demo import WorldAlign, WorldKeys

__all__ = ["CompareConfig", "InterpolateConfig"]


def _numbers(value: object) -> object:
    """Read `0,0.25,1` as a list of numbers; what is none is left for pydantic to refuse."""
    if not isinstance(value, str):
        return [value] if isinstance(value, (int, float)) else value
    try:
        return [float(part) for part in value.split(",")]
    except ValueError:
        return value


Share = Annotated[float, Field(ge=0, le=1)]


class InterpolateConfig(StageConfig):
    """`bfpo interpolate`: blend the weights of two models trained from one start."""

    first: PathText = Field(description="model at weight 0, such as the helpful one: folder or hub id")
    second: PathText = Field(description="model at weight 1, such as the safe one: folder or hub id")
    weights: Annotated[list[Share], BeforeValidator(_numbers), Field(min_length=1)] = Field(
        default=[0.25, 0.5, 0.75], description="shares of the second model: a list, or text such as 0.25,0.5"
    )

    @field_validator("weights")
    @classmethod
    def _each_once(cls, weights: list[float]) -> list[float]:
        if len(set(weights)) < len(weights):
            raise ValueError(f"got {weights}; allowed: each weight once")
        return weights


class CompareConfig(WorldKeys):
    """`bfpo compare`: every method on the closed world, each with its own setting chosen on validation prompts."""

    seeds: int = Field(default=3, ge=1, description="number of seeds; settings are chosen at the first")
    quick: bool = Field(default=False, description="try two settings for each method in place of four")
    confidence: float = Field(default=0.95, gt=0, lt=1, description="level of the intervals")
    bootstrap_samples: int = Field(default=2000, ge=1, description="number of resamples behind an interval")
    align: WorldAlign = Field(default=WorldAlign(), description="the preference runs, the same for every method")

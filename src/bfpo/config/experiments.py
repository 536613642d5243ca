"""Configs of the stages on the trade-off: interpolated models, a sweep, the comparison of methods."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, ClassVar

import yaml
from pydantic import Field, model_validator

from bfpo.config.demo import WorldAlign, WorldKeys
from bfpo.core.settings import Need, PathText, StageConfig, beside, unless
from bfpo.core.yaml_text import parse_yaml
from bfpo.execution.settings import ExecutedRuns
from bfpo.world.dials import Dials

__all__ = ["CompareConfig", "InterpolateConfig", "SweepConfig"]


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
    weights: list[Share] = Field(
        default=[0.25, 0.5, 0.75],
        min_length=1,
        description="shares of the second model: a list, or text such as 0.25,0.5; 0 is the first model, 1 the second",
    )

    @model_validator(mode="before")
    @classmethod
    def _read_weights(cls, values: object) -> object:
        if not isinstance(values, dict) or "weights" not in values:
            return values
        weights = _numbers(values["weights"])
        if outside := [weight for weight in weights if not 0 <= weight <= 1]:
            raise ValueError(
                f"weights: got {outside[0]:g}; allowed: numbers from 0 (the first model) to 1 (the second); "
                "extrapolation is not supported"
            )
        return {**values, "weights": weights}

    @model_validator(mode="after")
    def _each_once(self) -> InterpolateConfig:
        names = [f"{weight:g}" for weight in self.weights]  # as in the names of the models' folders
        if len(set(names)) < len(names):
            raise ValueError(f"weights: got {', '.join(names)}; allowed: each weight once, to six digits")
        return self


def _numbers(value: object) -> list[float]:
    """Read `0,0.25,1`, one number or a list of them; raises `ValueError` for anything else."""
    parts: list[Any] = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
    try:
        return [float(part) for part in parts]
    except (TypeError, ValueError):
        raise ValueError(
            f"weights: got {value!r}; allowed: numbers from 0 to 1 with commas between them, as 0.25,0.5"
        ) from None


class CompareConfig(WorldKeys):
    """`bfpo compare`: methods on the closed world, each with its own setting chosen on validation prompts."""

    seeds: int = Field(default=3, ge=1, description="number of seeds; settings are chosen at the first")
    quick: bool = Field(default=False, description="try two settings for each method in place of four")
    confidence: float = Field(default=0.95, gt=0, lt=1, description="level of the intervals")
    bootstrap_samples: int = Field(
        default=2000, ge=1, description="has no effect: no interval of a comparison is resampled; kept for older files"
    )
    align: WorldAlign = Field(default=WorldAlign(), description="the preference runs, the same for every method")
    methods: list[str | dict[str, Any]] | None = Field(
        default=None,
        description="methods to compare: names, or mappings of method, label, trials (four settings to try) and the "
        "method's own settings, such as {method: bfpo, label: mine, alpha: 0.4}; null = those of docs/head-to-head.md",
    )
    worlds: dict[str, Dials] = Field(
        default_factory=dict,
        description="worlds in each of which all methods are compared, by name: the dials of `world` that they change; "
        "empty = `world` itself",
    )

    @model_validator(mode="after")
    def _names_of_folders(self) -> CompareConfig:
        for name in self.worlds:
            if not re.fullmatch(r"\w[\w .%+-]{0,39}", name):
                raise ValueError(
                    f"worlds: got {name!r}; allowed: names of folders, up to 40 letters, digits, spaces and . % + - "
                    "that begin with a letter or digit"
                )
        if self.methods is not None and len(self.methods) < 2:
            raise ValueError(f"methods: got {self.methods}; needed: at least two to compare, or null")
        return self

    def resolved(self) -> dict[str, Any]:
        """Return the keys as `StageConfig.resolved` does; methods and worlds only if they are given."""
        return {key: value for key, value in super().resolved().items() if value or key not in ("methods", "worlds")}

    def of_world(self, name: str) -> CompareConfig:
        """Return the comparison in one of `worlds`."""
        dials = {key: getattr(self.worlds[name], key) for key in self.worlds[name].model_fields_set}
        values = {key: value for key, value in self.resolved().items() if key != "worlds"}
        return CompareConfig.model_validate({**values, "world": {**values["world"], **dials}})


def _grid(text: str) -> dict[str, list[Any]]:
    """Read `beta=0.1,0.2,alpha=0,0.5`: a part without `=` is another value of the key before it."""
    grid: dict[str, list[Any]] = {}
    key = ""
    for part in text.split(","):
        name, equals, value = part.partition("=")
        key = name.strip() if equals else key
        if not key:
            raise ValueError(f"grid: got {text!r}; needed: keys of train and their values, as beta=0.05,0.1")
        value = (value if equals else part).strip()
        if not value:
            raise ValueError(f"grid: {key}: a value is missing in {text!r}; write null for no value")
        try:
            grid.setdefault(key, []).append(parse_yaml(value)[0])
        except yaml.YAMLError as error:
            raise ValueError(
                f"grid: {key}: got {value!r}, which is not a YAML value; lists and quotes need the mapping of a file"
            ) from error
    return grid


def _bounds(key: str, text: str) -> dict[str, float]:
    """Read `harmless=0.95,helpfulness=0.5`."""
    bounds: dict[str, float] = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        try:
            bounds[name.strip()] = float(value)
        except ValueError:
            equals = ""
        if not equals or not name.strip():
            raise ValueError(f"{key}: got {part!r}; needed: METRIC=NUMBER with a share from 0 to 1, as harmless=0.95")
    return bounds


class SweepConfig(StageConfig, ExecutedRuns):
    """`bfpo sweep`: the trade-off of a grid of trainings, or of the models of `bfpo interpolate`."""

    train: PathText | None = Field(default=None, description="config file of `bfpo train`, to which the grid is set")
    blends: PathText | None = Field(
        default=None, description="run folder of `bfpo interpolate`, whose models are evaluated in place of a grid"
    )
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(
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
    reference_point: dict[str, float] | None = Field(
        default=None,
        description="lowest value of each objective that counts in the hypervolume, from 0 to 1; null = 0 and 0",
    )
    at_least: dict[str, float] = Field(
        default_factory=dict,
        description="minimum scores of the selected model, from 0 to 1, as harmless=0.95",
    )
    validation_share: float = Field(
        default=0.5,
        ge=0,
        lt=1,
        description="share of the prompts on which the model for at_least is chosen, by their hash; its scores are "
        "reported on the others; 0 = on the same",
    )
    memory_gib: float | None = Field(
        default=None, gt=0, description="memory that trainings at the same time may need, by estimate; null = no budget"
    )
    confidence: float = Field(default=0.95, gt=0, lt=1, description="level of the intervals")
    bootstrap_samples: int = Field(
        default=2000, ge=1, description="number of resamples behind the interval of the hypervolume"
    )
    seed: int = Field(default=0, ge=0, description="seed of resampling and of random signs in tests")

    needs: ClassVar[Mapping[str, Need]] = {
        **dict.fromkeys(("train", "grid", "memory_gib"), unless("blends")),
        "blends": unless("train"),
        "validation_share": beside("at_least"),
    }

    @model_validator(mode="before")
    @classmethod
    def _read_text(cls, values: object) -> object:
        if not isinstance(values, dict):
            return values
        read = {"grid": _grid} | {key: partial(_bounds, key) for key in ("at_least", "reference_point")}
        values = {key: read[key](it) if key in read and isinstance(it, str) else it for key, it in values.items()}
        if isinstance(values.get("grid"), dict):  # a single value means a list of one
            values["grid"] = {key: it if isinstance(it, list) else [it] for key, it in values["grid"].items()}
        return values

    @model_validator(mode="after")
    def _what_is_swept(self) -> SweepConfig:
        if self.blends is None and self.train is None:
            raise ValueError("train, blends: exactly one of the two must be given")
        if self.train is not None and not self.grid:
            raise ValueError("grid: missing; needed: keys of train and their values, as beta=0.05,0.1")
        return self

    @model_validator(mode="after")
    def _what_is_shown(self) -> SweepConfig:
        if unfit := [name for name in self.objectives if name not in _MORE_IS_BETTER]:
            raise ValueError(f"objectives: got {', '.join(unfit)}; allowed: {', '.join(_MORE_IS_BETTER)}")
        for key in ("at_least", "reference_point"):
            given = getattr(self, key) or {}
            if unknown := sorted(set(given) - set(self.objectives)):
                more = f"; to use {unknown[0]}, add it to objectives" if unknown[0] in _MORE_IS_BETTER else ""
                raise ValueError(
                    f"{key}: got {', '.join(unknown)}; allowed: {', '.join(self.objectives)} (objectives){more}"
                )
            for name, bound in given.items():
                if not 0 <= bound <= 1:
                    percent = f"; {bound:g}% is {bound / 100:g}" if 1 < bound <= 100 else ""
                    raise ValueError(f"{key}: {name}: got {bound:g}; allowed: a share from 0 to 1{percent}")
        if self.reference_point is not None and set(self.reference_point) != set(self.objectives):
            raise ValueError(f"reference_point: needs a value for each of {', '.join(self.objectives)}")
        return self

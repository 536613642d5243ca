"""Configs of the two stages that need no input: the demo and the four-action experiment."""

from __future__ import annotations

from pydantic import Field

from bfpo.config.base import ConfigPart, StageConfig

__all__ = ["DemoAlign", "DemoConfig", "DemoSft", "DemoWorld", "ToyConfig"]


class DemoWorld(ConfigPart):
    """Sizes of the closed world's data."""

    sft_completions: int = Field(default=8000, ge=1, description="number of completions of the SFT stage")
    main_pairs: int = Field(default=6000, ge=1, description="number of pairs of the main (safety) stream")
    buffer_pairs: int = Field(default=6000, ge=1, description="number of pairs of the buffer (helpfulness) stream")
    test_prompts: int = Field(default=300, ge=1, description="number of prompts on held-out topics")
    harmful_share: float = Field(default=0.45, gt=0, lt=1, description="share of harmful prompts in the main stream")


class DemoSft(ConfigPart):
    """Settings of the demo's SFT runs."""

    steps: int = Field(default=1500, ge=1, description="optimizer steps")
    learning_rate: float = Field(default=2e-3, gt=0, description="peak learning rate")
    completions_per_step: int = Field(default=32, ge=1, description="number of completions per optimizer step")


class DemoAlign(ConfigPart):
    """Settings of the demo's preference runs, the same for every method."""

    steps: int = Field(default=900, ge=1, description="optimizer steps")
    learning_rate: float = Field(default=1e-4, gt=0, description="peak learning rate")
    pairs_per_step: int = Field(default=16, ge=1, description="number of pairs of each stream per optimizer step")
    beta: float = Field(default=0.1, gt=0, description="KL coefficient (the paper's tau)")
    anchor_weight: float = Field(default=0.3, ge=0, description="weight of the anchor beside the normalised loss")


class DemoConfig(StageConfig):
    """`bfpo demo`: the whole way on a closed world with exact oracles."""

    seeds: int = Field(default=1, ge=1, description="number of seeds")
    full: bool = Field(default=False, description="all methods in place of the most telling ones")
    seed: int = Field(default=0, ge=0, description="the first seed")
    processes: int | None = Field(default=None, ge=1, description="runs at the same time; null = one per core")
    world: DemoWorld = Field(default=DemoWorld(), description="sizes of the data")
    sft: DemoSft = Field(default=DemoSft(), description="the SFT runs")
    align: DemoAlign = Field(default=DemoAlign(), description="the preference runs")


class ToyConfig(StageConfig):
    """`bfpo toy`: the paper's experiment with four actions, section 3.4; the defaults are the paper's settings."""

    steps: int = Field(default=1800, ge=1, description="optimizer steps (Adam)")
    learning_rate: float = Field(default=0.01, gt=0, description="learning rate")
    batch_size: int = Field(default=32, ge=1, description="number of pairs per step, drawn with replacement")
    beta: float = Field(default=1.0, gt=0, description="KL coefficient (the paper's tau)")
    alpha: float = Field(default=0.5, description="shift of the target of BFPO; its ablation has 0")
    seed: int = Field(default=0, ge=0, description="seed of the draws")

"""Configs of the two stages that need no input: the demo and the four-action experiment."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from bfpo.core.settings import ConfigPart, StageConfig
from bfpo.execution.settings import ExecutedRuns
from bfpo.world.dials import Dials

__all__ = [
    "DemoAlign",
    "DemoConfig",
    "DemoMethod",
    "DemoModel",
    "DemoSft",
    "DemoWorld",
    "ToyConfig",
    "WorldAlign",
    "WorldKeys",
]


class DemoWorld(Dials):
    """Sizes of the closed world's data, and its dials."""

    sft_completions: int = Field(default=20000, ge=1, description="number of completions of the SFT run")
    main_pairs: int = Field(default=6000, ge=1, description="number of pairs of the main (safety) stream")
    buffer_pairs: int = Field(default=6000, ge=1, description="number of pairs of the buffer (helpfulness) stream")
    held_out_pairs: int = Field(default=500, ge=1, description="number of pairs on held-out topics, for accuracy")
    held_out_prompts: int | None = Field(
        default=None, ge=3, description="number of held-out prompts, drawn at random; null = one for every topic"
    )
    completions_per_prompt: int = Field(default=2, ge=1, description="number of answers to each held-out prompt")
    harmful_share: float = Field(default=0.45, gt=0, lt=1, description="share of harmful prompts in the main stream")


class DemoModel(ConfigPart):
    """Size of the demo's Llama."""

    hidden_size: int = Field(default=64, ge=8, description="width of the hidden states")
    intermediate_size: int = Field(default=192, ge=8, description="width inside the MLPs")
    num_hidden_layers: int = Field(default=2, ge=1, description="number of blocks")
    num_attention_heads: int = Field(default=4, ge=1, description="number of attention heads; divides hidden_size")


class DemoSft(ConfigPart):
    """Settings of the demo's SFT runs (the start model and the ceiling)."""

    steps: int = Field(default=400, ge=1, description="optimizer steps")
    learning_rate: float = Field(default=4e-3, gt=0, description="peak learning rate")
    completions_per_step: int = Field(default=64, ge=1, description="number of completions per optimizer step")


class DemoMethod(ConfigPart):
    """Settings of one method, chosen on validation topics (docs/demo.md has the trials)."""

    learning_rate: float = Field(default=1e-3, gt=0, description="peak learning rate")
    beta: float = Field(default=0.1, gt=0, description="KL coefficient (the paper's tau)")


class DemoBfpo(DemoMethod):
    """Settings of BFPO."""

    beta: float = Field(default=0.05, gt=0, description="KL coefficient (the paper's tau)")


class WorldAlign(ConfigPart):
    """Settings shared by all preference runs on the closed world."""

    steps: int = Field(default=400, ge=1, description="optimizer steps")
    pairs_per_step: int = Field(default=16, ge=1, description="number of pairs of each stream per optimizer step")
    anchor_weight: float = Field(default=0.3, ge=0, description="weight of the anchor beside the normalised loss")
    anchor_scale: Literal["loss", "gradient"] = Field(
        default="gradient",
        description="what anchor_weight is relative to: the normalised loss, or its gradient at the start",
    )


class DemoAlign(WorldAlign):
    """Settings of the demo's preference runs: shared ones, and those of each method."""

    anchor_scale: Literal["loss", "gradient"] = Field(
        default="loss",
        description="what anchor_weight is relative to: the normalised loss, or its gradient at the start",
    )
    bfpo: DemoBfpo = Field(default=DemoBfpo(), description="BFPO")
    dpo_h: DemoMethod = Field(default=DemoMethod(), description="DPO on helpfulness pairs")
    dpo_s: DemoMethod = Field(default=DemoMethod(), description="DPO on safety pairs")
    dpo_mix: DemoMethod = Field(default=DemoMethod(), description="DPO on the naive mix of both")
    dpo_safe_first: DemoMethod = Field(default=DemoMethod(), description="DPO with safety deciding first")
    ipo: DemoMethod = Field(default=DemoMethod(), description="IPO on helpfulness pairs")
    safedpo: DemoMethod = Field(default=DemoMethod(), description="SafeDPO")
    bso: DemoMethod = Field(default=DemoMethod(), description="BSO, logistic generator")


class WorldKeys(StageConfig, ExecutedRuns):
    """Keys shared by the experiments on the closed world."""

    seeds: int = Field(default=1, ge=1, description="number of seeds")
    seed: int = Field(default=0, ge=0, description="the first seed")
    temperature: float = Field(default=0.7, ge=0, description="sampling temperature of every model's answers")
    world: DemoWorld = Field(default=DemoWorld(), description="sizes of the data")
    model: DemoModel = Field(default=DemoModel(), description="size of the model")
    sft: DemoSft = Field(default=DemoSft(), description="the SFT runs")

    @model_validator(mode="after")
    def _one_answer_at_0(self) -> WorldKeys:
        if self.temperature == 0 and self.world.completions_per_prompt > 1:
            raise ValueError(
                f"world.completions_per_prompt: got {self.world.completions_per_prompt} at temperature 0, which gives "
                "one answer to each prompt; allowed: 1, or a temperature above 0"
            )
        return self

    @model_validator(mode="after")
    def _heads_divide(self) -> WorldKeys:
        model = self.model
        if model.hidden_size % (2 * model.num_attention_heads):
            raise ValueError(
                f"model.num_attention_heads: got {model.num_attention_heads}; model.hidden_size "
                f"({model.hidden_size}) must be a multiple of twice that"
            )
        return self


class DemoConfig(WorldKeys):
    """`bfpo demo`: the whole pipeline on a closed world with exact oracles."""

    full: bool = Field(default=False, description="eight methods in place of four")
    part: Literal["test", "validation"] = Field(
        default="test", description="held-out topics that are reported; settings are chosen on validation"
    )
    align: DemoAlign = Field(default=DemoAlign(), description="the preference runs")


class ToyConfig(StageConfig):
    """`bfpo toy`: the paper's experiment with four actions, section 3.4; the defaults are the paper's settings."""

    steps: int = Field(default=1800, ge=1, description="optimizer steps (Adam)")
    learning_rate: float = Field(default=0.01, gt=0, description="learning rate")
    batch_size: int = Field(default=32, ge=1, description="number of pairs per step, drawn with replacement")
    beta: float = Field(default=1.0, gt=0, description="KL coefficient (the paper's tau)")
    alpha: float = Field(default=0.5, description="shift of the target of BFPO; its ablation has 0")
    label_noise: float | None = Field(
        default=None, ge=0, lt=0.5, description="share of the pairs' safety bits that are flipped; null = 0"
    )
    seed: int = Field(default=0, ge=0, description="seed of the draws")

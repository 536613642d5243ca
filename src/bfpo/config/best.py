"""The section `best:` of both training stages: which checkpoint is kept, and when a run stops early."""

from __future__ import annotations

from pydantic import Field, model_validator

from bfpo.core.settings import ConfigPart
from bfpo.data.labels import CELLS

__all__ = ["OF_COMPLETIONS", "OF_PAIRS", "BestConfig"]

_OF_A_CELL = ("accuracy", "normalised_loss", "loss")
OF_COMPLETIONS = ("loss",)
OF_PAIRS = (*_OF_A_CELL, *(f"{cell}/{name}" for cell in CELLS for name in _OF_A_CELL))
"""Held-out metrics, without `eval_`, as metrics.jsonl has them."""


class BestConfig(ConfigPart):
    """Keep the checkpoint with the best held-out metric, and stop when it no longer improves."""

    metric: str = Field(
        description="held-out metric that is compared at every eval_steps: loss; of pairs also normalised_loss, "
        "accuracy, or one of a label cell such as safe-unsafe/accuracy"
    )
    patience: int | None = Field(
        default=None,
        ge=1,
        description="number of evaluations in a row without a better one after which the run stops; null = never",
    )
    min_change: float = Field(default=0.0, ge=0, description="a metric is better if it improves by more than this")

    @model_validator(mode="after")
    def _known(self) -> BestConfig:
        if self.metric not in OF_PAIRS:
            raise ValueError(f"metric: got {self.metric!r}; allowed: {', '.join(OF_PAIRS)}")
        return self

    @property
    def lower_is_better(self) -> bool:
        """Whether the metric is a loss."""
        return self.metric.endswith("loss")

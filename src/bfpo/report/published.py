"""Figures that the paper prints, for a reader to hold beside a page's own; never part of its tables or means."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PUBLISHED", "PUBLISHED_NOTE", "Published"]


@dataclass(frozen=True, slots=True)
class Published:
    """One model's helpfulness and harmlessness in the paper's headline plot, shares in [0, 1]."""

    model: str
    helpfulness: float
    harmlessness: float


PUBLISHED_NOTE = (
    "Read off the axes of the headline plot of arXiv 2408.15313, to within .005. Other models, other prompts, another "
    "judge: not comparable with this page's own figures, and in none of its means."
)
PUBLISHED = (
    Published("Zephyr-7b-beta", 0.11, 0.59),
    Published("Juanako-7b-UNA", 0.03, 0.66),
    Published("OpenChat-3.5", 0.11, 0.67),
    Published("Beaver-7b", 0.01, 0.70),
    Published("Mistral-7B-Instruct-v0.2", 0.15, 0.70),
    Published("Llama-2-7b-chat", 0.08, 0.72),
    Published("BFPO (the paper's)", 0.135, 0.74),
)

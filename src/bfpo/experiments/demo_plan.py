"""What the demo runs: for each seed a start model, a ceiling and the methods, each a chain of stages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bfpo.config import DemoConfig
from bfpo.core.runs import RunFolder
from bfpo.experiments.chains import Chain
from bfpo.experiments.steps import (
    CEILING,
    START,
    asking,
    sft_step,
    train_step,
    write_held_out,
    write_prompts,
    write_world,
)

__all__ = ["FULL_METHODS", "QUICK_METHODS", "make_data", "methods_of", "plan_seed"]

PROMPTS = "data/prompts.jsonl"
QUICK_METHODS = ("bfpo", "dpo_h", "dpo_mix", "safedpo")
FULL_METHODS = (*QUICK_METHODS, "dpo_s", "dpo_safe_first", "ipo", "bso")


def methods_of(config: DemoConfig) -> Sequence[str]:
    """Return the methods that this demo compares."""
    return FULL_METHODS if config.full else QUICK_METHODS


def make_data(config: DemoConfig, folder: RunFolder) -> None:
    """Write the tokenizer and every seed's data sets; the same seed gives the same files."""
    write_world(config, folder)
    write_prompts(config, folder, config.part, PROMPTS)
    write_held_out(config, folder, config.part)


def plan_seed(config: DemoConfig, root: Path, seed: int) -> list[Chain]:
    """Return the chains of one seed; every method starts from the start model of its seed."""
    data, runs = root / "data" / f"seed-{seed}", root / f"seed-{seed}"
    prompts = root / PROMPTS
    chains = []
    for name in (START, CEILING):
        sft = sft_step(config, root, name, seed)
        chains.append(Chain(name, seed, (sft, *asking(config, prompts, sft.out / "model", runs / name, seed))))
    start = runs / START / "model" / "model"
    for method in methods_of(config):
        own = getattr(config.align, method).model_dump()
        train = train_step(config, root, method, own, start, runs / method / "train", seed)
        asked = asking(config, prompts, train.out / "model", runs / method, seed, start, data / "held_out.jsonl")
        chains.append(Chain(method, seed, (train, *asked), needs=(START,)))
    return chains

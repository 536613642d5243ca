"""The parts of an experiment on the closed world: its data files, and the stages that use them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from bfpo.config import AlignConfig, CompareConfig, DemoConfig, EvaluateConfig, GenerateConfig, SftConfig
from bfpo.config.demo import WorldKeys
from bfpo.core.schema import Prompt
from bfpo.data.split import draw
from bfpo.data.write import prompt_row, write_completions, write_pairs
from bfpo.experiments.points import REFERENCE, TOKENS, Step
from bfpo.runs.folder import RunFolder
from bfpo.world.datasets import (
    buffer_pairs,
    held_out_prompts,
    main_pairs,
    redteam_prompts,
    save_tokenizer,
    sft_completions,
)

__all__ = [
    "CEILING",
    "START",
    "asking",
    "seeds_of",
    "sft_step",
    "train_step",
    "write_held_out",
    "write_prompts",
    "write_world",
]

START, CEILING = "start", "ceiling"
_MAX_LENGTH, _MAX_LENGTH_OF_TURNS, _MAX_NEW_TOKENS = 48, 80, 32


def seeds_of(config: WorldKeys) -> range:
    """Return the seeds of an experiment, in order."""
    return range(config.seed, config.seed + config.seeds)


def write_world(config: WorldKeys, folder: RunFolder) -> None:
    """Write the training data of an experiment: the tokenizer, the red-teaming prompts, each seed's data sets."""
    save_tokenizer(folder.folder("tokenizer"))
    folder.write_jsonl("data/redteam.jsonl", map(_prompt_row, redteam_prompts(config.world)))
    for seed in seeds_of(config):
        data, world = folder.path / "data" / f"seed-{seed}", config.world
        num, share = world.sft_completions, world.harmful_share
        write_completions(data / "sft.jsonl", sft_completions(num, seed, dials=world))
        write_completions(data / "ideal.jsonl", sft_completions(num, seed, ideal=True, dials=world))
        write_pairs(data / "main.jsonl", main_pairs(world.main_pairs, seed, harmful_share=share, dials=world))
        write_pairs(data / "buffer.jsonl", buffer_pairs(world.buffer_pairs, seed, dials=world))


def write_held_out(config: WorldKeys, folder: RunFolder, part: Literal["test", "validation"]) -> None:
    """Write every seed's pairs on held-out topics, on which the implicit reward is tested."""
    num, share = config.world.held_out_pairs, config.world.harmful_share
    for seed in seeds_of(config):
        pairs = main_pairs(num, seed, harmful_share=share, part=part, dials=config.world)
        write_pairs(folder.path / "data" / f"seed-{seed}" / "held_out.jsonl", pairs)


def write_prompts(config: WorldKeys, folder: RunFolder, part: Literal["test", "validation"], name: str) -> None:
    """Write the held-out prompts of a part, all of them or as many as the config draws."""
    prompts = held_out_prompts(part, config.seed, dials=config.world)
    prompts = draw(prompts, config.world.held_out_prompts, config.seed)
    folder.write_jsonl(name, (_prompt_row(prompt) for prompt in prompts))


def sft_step(config: WorldKeys, root: Path, name: str, seed: int) -> Step:
    """Return the SFT run of the start model or of the ceiling."""
    file = root / "data" / f"seed-{seed}" / ("ideal.jsonl" if name == CEILING else "sft.jsonl")
    settings = SftConfig.model_validate(
        {
            "init": {"config": _llama(config), "tokenizer": str(root / "tokenizer")},
            "data": {"files": [str(file)], "layout": "completions"},
            "completions_per_step": config.sft.completions_per_step,
            "completions_per_microbatch": config.sft.completions_per_step,
            "max_steps": config.sft.steps,
            "learning_rate": config.sft.learning_rate,
            "warmup_steps": 0.05,
            **_common(config, config.sft.steps, seed),
        }
    )
    return Step("sft", settings, root / f"seed-{seed}" / name / "model")


def _llama(config: WorldKeys) -> dict[str, Any]:
    heads = config.model.num_attention_heads
    return {
        **config.model.model_dump(),
        "num_key_value_heads": heads,
        "max_position_embeddings": _max_length(config),
        "tie_word_embeddings": False,
    }


def train_step(
    config: DemoConfig | CompareConfig,
    root: Path,
    method: str,
    settings: Mapping[str, Any],
    start: Path,
    out: Path,
    seed: int,
) -> Step:
    """Return the training of a method from the model `start`; `settings` are the method's own."""
    data = root / "data" / f"seed-{seed}"
    align = AlignConfig.model_validate(
        {
            "model": str(start),
            "method": method,
            **settings,
            "anchor_weight": config.align.anchor_weight,
            **({"anchor_scale": config.align.anchor_scale} if config.align.anchor_weight else {}),
            "data": {"files": [str(data / "main.jsonl")], "layout": "bfpo"},
            "buffer": {"files": [str(data / "buffer.jsonl")], "layout": "bfpo", "unknown_label": "safe"},
            "reference_cache": str(root / REFERENCE),
            "token_cache": str(root / TOKENS),
            "trainable": "all",
            "pairs_per_step": config.align.pairs_per_step,
            "max_steps": config.align.steps,
            **_common(config, config.align.steps, seed),
        }
    )
    return Step("train", align, out)


def _max_length(config: WorldKeys) -> int:
    """Return the longest prompt with its answer in tokens; a second turn has the first one before it."""
    return _MAX_LENGTH_OF_TURNS if config.world.multi_turn else _MAX_LENGTH


def _common(config: WorldKeys, steps: int, seed: int) -> dict[str, Any]:
    return {
        "seed": seed,
        "threads": 1,
        "max_length": _max_length(config),
        "logging_steps": max(1, steps // 40),
        "save_steps": max(1, steps // 3),
    }


def asking(
    config: WorldKeys,
    prompts: Path,
    model: Path,
    runs: Path,
    seed: int,
    reference: Path | None = None,
    pairs: Path | None = None,
) -> tuple[Step, Step]:
    """Return the stages that generate and evaluate a model's answers; with `pairs` also its accuracy on them."""
    generate = GenerateConfig.model_validate(
        {
            "model": str(model),
            "prompts": str(prompts),
            "num_completions": config.world.completions_per_prompt,
            "max_new_tokens": _MAX_NEW_TOKENS,
            "temperature": config.temperature,
            "batch_size": 64,
            "dtype": "float32",  # the same on every machine
            "seed": seed,
            "threads": 1,
        }
    )
    answers = runs / "answers"
    judged: dict[str, Any] = {"completions": str(answers / "completions.jsonl"), "seed": seed, "threads": 1}
    if pairs is not None:  # by BFPO's target for every method, so that the numbers are comparable
        judged |= {"model": str(model), "reference": str(reference), "data": {"files": [str(pairs)], "layout": "bfpo"}}
        judged |= {"method": "bfpo", "max_length": _max_length(config), "pairs_per_batch": 64}
    evaluate = EvaluateConfig.model_validate(judged)
    return Step("generate", generate, answers), Step("evaluate", evaluate, runs / "scores")


def _prompt_row(prompt: Prompt) -> dict[str, Any]:
    row = prompt_row(prompt)
    return row if len(prompt.messages) > 1 else {**row, "prompt": prompt.messages[0].content}

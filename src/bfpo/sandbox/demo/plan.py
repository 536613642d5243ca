"""What the demo runs: for each seed a start model, a ceiling and the methods, each a chain of stages."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bfpo.config import AlignConfig, DemoConfig, EvaluateConfig, GenerateConfig, SftConfig
from bfpo.data.write import write_completions, write_pairs
from bfpo.experiments.chains import Chain, Step
from bfpo.runs import RunFolder
from bfpo.sandbox.datasets import buffer_pairs, held_out_prompts, main_pairs, redteam_prompts, sft_completions
from bfpo.sandbox.tokenizer import save_tokenizer
from bfpo.schema import Prompt

__all__ = [
    "CEILING",
    "FULL_METHODS",
    "QUICK_METHODS",
    "START",
    "make_data",
    "methods_of",
    "plan_seed",
    "seeds_of",
]

START, CEILING = "start", "ceiling"
QUICK_METHODS = ("bfpo", "dpo_h", "dpo_mix", "safedpo")
FULL_METHODS = (*QUICK_METHODS, "dpo_s", "dpo_safe_first", "ipo", "bso")
_MAX_LENGTH, _MAX_NEW_TOKENS = 48, 32


def methods_of(config: DemoConfig) -> Sequence[str]:
    """Return the methods that this demo compares."""
    return FULL_METHODS if config.full else QUICK_METHODS


def seeds_of(config: DemoConfig) -> range:
    """Return the seeds of this demo, in order."""
    return range(config.seed, config.seed + config.seeds)


def make_data(config: DemoConfig, folder: RunFolder) -> None:
    """Write the tokenizer and every seed's data sets; the same seed gives the same files."""
    save_tokenizer(folder.folder("tokenizer"))
    prompts = held_out_prompts(config.part, config.seed)
    if config.world.held_out_prompts is not None and config.world.held_out_prompts < len(prompts):
        drawn = random.Random(config.seed).sample(range(len(prompts)), config.world.held_out_prompts)
        prompts = [prompts[number] for number in sorted(drawn)]
    folder.write_jsonl("data/prompts.jsonl", (_prompt_row(prompt) for prompt in prompts))
    folder.write_jsonl("data/redteam.jsonl", (_prompt_row(prompt) for prompt in redteam_prompts()))
    for seed in seeds_of(config):
        data, world = folder.path / "data" / f"seed-{seed}", config.world
        write_completions(data / "sft.jsonl", sft_completions(world.sft_completions, seed))
        write_completions(data / "ideal.jsonl", sft_completions(world.sft_completions, seed, ideal=True))
        write_pairs(data / "main.jsonl", main_pairs(world.main_pairs, seed, harmful_share=world.harmful_share))
        write_pairs(data / "buffer.jsonl", buffer_pairs(world.buffer_pairs, seed))
        held_out = main_pairs(world.held_out_pairs, seed, harmful_share=world.harmful_share, part=config.part)
        write_pairs(data / "held_out.jsonl", held_out)


def plan_seed(config: DemoConfig, root: Path, seed: int) -> list[Chain]:
    """Return the chains of one seed; every method starts from the start model of its seed."""
    data, runs = root / "data" / f"seed-{seed}", root / f"seed-{seed}"
    chains = []
    for name, file in ((START, "sft.jsonl"), (CEILING, "ideal.jsonl")):
        sft = Step("sft", _sft_config(config, root, data / file, seed), runs / name / "model")
        chains.append(Chain(name, seed, (sft, *_asking(config, root, sft.out / "model", runs / name, seed))))
    start = runs / START / "model" / "model"
    for method in methods_of(config):
        train = Step("train", _align_config(config, root, method, start, data, seed), runs / method / "train")
        asking = _asking(config, root, train.out / "model", runs / method, seed, start, data / "held_out.jsonl")
        chains.append(Chain(method, seed, (train, *asking), needs=(START,)))
    return chains


def _sft_config(config: DemoConfig, root: Path, file: Path, seed: int) -> SftConfig:
    return SftConfig.model_validate(
        {
            "init": {"config": _llama(config), "tokenizer": str(root / "tokenizer")},
            "data": {"files": [str(file)], "layout": "completions"},
            "completions_per_step": config.sft.completions_per_step,
            "completions_per_microbatch": config.sft.completions_per_step,
            "max_steps": config.sft.steps,
            "learning_rate": config.sft.learning_rate,
            "warmup_steps": 0.05,
            **_common(config.sft.steps, seed),
        }
    )


def _llama(config: DemoConfig) -> dict[str, Any]:
    heads = config.model.num_attention_heads
    return {
        **config.model.model_dump(),
        "num_key_value_heads": heads,
        "max_position_embeddings": _MAX_LENGTH,
        "tie_word_embeddings": False,
    }


def _align_config(config: DemoConfig, root: Path, method: str, start: Path, data: Path, seed: int) -> AlignConfig:
    own = getattr(config.align, method)
    return AlignConfig.model_validate(
        {
            "model": str(start),
            "method": method,
            "beta": own.beta,
            "learning_rate": own.learning_rate,
            "anchor_weight": config.align.anchor_weight,
            "data": {"files": [str(data / "main.jsonl")], "layout": "bfpo"},
            "buffer": {"files": [str(data / "buffer.jsonl")], "layout": "bfpo", "unknown_label": "safe"},
            "reference_cache": str(root / "reference"),
            "trainable": "all",
            "pairs_per_step": config.align.pairs_per_step,
            "max_steps": config.align.steps,
            **_common(config.align.steps, seed),
        }
    )


def _common(steps: int, seed: int) -> dict[str, Any]:
    return {
        "seed": seed,
        "threads": 1,
        "max_length": _MAX_LENGTH,
        "logging_steps": max(1, steps // 40),
        "save_steps": max(1, steps // 3),
    }


def _asking(
    config: DemoConfig,
    root: Path,
    model: Path,
    runs: Path,
    seed: int,
    reference: Path | None = None,
    pairs: Path | None = None,
) -> tuple[Step, Step]:
    """Return the two stages that ask a model and judge what it says; with a reference also its accuracy on pairs."""
    generate = GenerateConfig.model_validate(
        {
            "model": str(model),
            "prompts": str(root / "data" / "prompts.jsonl"),
            "num_completions": config.world.completions_per_prompt,
            "max_new_tokens": _MAX_NEW_TOKENS,
            "temperature": config.temperature,
            "batch_size": 64,
            "seed": seed,
            "threads": 1,
        }
    )
    answers = runs / "answers"
    judged: dict[str, Any] = {"completions": str(answers / "completions.jsonl"), "seed": seed, "threads": 1}
    if pairs is not None:  # by BFPO's target for every method, so that the figures stand side by side
        judged |= {"model": str(model), "reference": str(reference), "data": {"files": [str(pairs)], "layout": "bfpo"}}
        judged |= {"method": "bfpo", "max_length": _MAX_LENGTH, "pairs_per_batch": 64}
    evaluate = EvaluateConfig.model_validate(judged)
    return Step("generate", generate, answers), Step("evaluate", evaluate, runs / "scores")


def _prompt_row(prompt: Prompt) -> dict[str, Any]:
    return {"id": prompt.id, "prompt": prompt.messages[0].content, "kind": prompt.kind}

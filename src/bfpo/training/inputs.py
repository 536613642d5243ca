"""What the stages on preference pairs read of their config: the start, streams of pairs, their tokens, the cache."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from bfpo.config import AlignConfig, DataConfig, read_template
from bfpo.core.files import user_cache_folder
from bfpo.data.load import PairStream
from bfpo.data.tokenize import PairTokenizer
from bfpo.policy.load import Policy, load_policy
from bfpo.training.session import data_settings, describe_data

__all__ = ["describe_tokens", "load_start", "pair_sections", "pair_streams", "reference_cache", "token_settings"]


def load_start(config: AlignConfig) -> Policy:
    """Load the model that training starts from, with what trains chosen; raises as `load_policy` does."""
    return load_policy(
        config.model,
        trainable="all" if config.lora is not None else config.trainable,
        lora=None if config.lora is None else config.lora.model_dump(),
        quantize=config.quantize,
        dtype=config.dtype,
        masters=True,
        revision=config.revision,
        seed=config.seed,
    )


def pair_sections(config: AlignConfig) -> dict[str, DataConfig]:
    """Return the data sections that are given, by name; the main stream comes first."""
    sections = {"data": config.data, "buffer": config.buffer, "eval_data": config.eval_data}
    return {name: section for name, section in sections.items() if section is not None}


def pair_streams(config: AlignConfig) -> dict[str, PairStream]:
    """Return the pairs of each section, to be read when they are asked for."""
    return {
        name: PairStream(**data_settings(section, seed=config.seed)) for name, section in pair_sections(config).items()
    }


def token_settings(config: AlignConfig) -> dict[str, Any]:
    """Return the keyword arguments of `PairTokenizer`; raises `ConfigError` for a template that cannot be read."""
    return {
        "max_length": config.max_length,
        "max_completion_length": config.max_completion_length,
        "chat_template": read_template(config.chat_template),
    }


def describe_tokens(config: AlignConfig, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return one line for each section: its pairs by cell, and what was cut; pairs are counted, not kept."""
    lines = []
    for name, pairs in pair_streams(config).items():
        tokenize = PairTokenizer(tokenizer, **token_settings(config))
        for _ in tokenize(pairs):
            pass
        lines.append("; ".join(describe_data(name, pairs.counts, tokenize.report.as_row())))
    return lines


def reference_cache(config: AlignConfig) -> str:
    """Return the root folder of the reference log-probs: the config's, else that of the user."""
    return config.reference_cache or str(user_cache_folder("reference"))

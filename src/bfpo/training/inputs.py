"""What the stages on preference pairs read of their config: the pairs as tokens, and the folder of the cache."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from bfpo.config import AlignConfig, DataConfig, read_template
from bfpo.data.load import LoadedPairs
from bfpo.data.tokenize import TokenizeReport, TokenPair, tokenize_pairs
from bfpo.policy.reference_cache import user_cache_folder

__all__ = ["pair_sections", "reference_cache", "tokenize"]


def pair_sections(config: AlignConfig) -> dict[str, DataConfig]:
    """Return the data sections that are given, by name; the main stream comes first."""
    sections = {"data": config.data, "buffer": config.buffer, "eval_data": config.eval_data}
    return {name: section for name, section in sections.items() if section is not None}


def tokenize(
    config: AlignConfig, rows: LoadedPairs, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[TokenPair], TokenizeReport]:
    """Return the pairs of one section as token ids and the report of what was cut; raises as `tokenize_pairs` does."""
    return tokenize_pairs(
        rows.pairs,
        tokenizer,
        max_length=config.max_length,
        max_completion_length=config.max_completion_length,
        chat_template=read_template(config.chat_template),
    )


def reference_cache(config: AlignConfig) -> str:
    """Return the root folder of the reference log-probs: the config's, else that of the user."""
    return config.reference_cache or str(user_cache_folder())

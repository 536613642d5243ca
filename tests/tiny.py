"""Tiny random models and a word-level tokenizer, made in memory."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

VOCABULARY = 97
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def tiny_model(family: str = "llama", *, dtype: torch.dtype = torch.float32, seed: int = 0, **settings: Any) -> Any:
    torch.manual_seed(seed)
    if family == "llama":
        model = LlamaForCausalLM(
            LlamaConfig(**{**SIZES, "num_key_value_heads": 1, "initializer_range": 0.3, **settings})
        )
    elif family == "gemma2":  # soft-caps its attention scores and its logits
        model = Gemma2ForCausalLM(
            Gemma2Config(
                **{
                    **SIZES,
                    "num_key_value_heads": 1,
                    "head_dim": 8,
                    "sliding_window": 6,
                    "final_logit_softcapping": 1.5,
                    "attn_logit_softcapping": 2.0,
                    "initializer_range": 0.3,
                    **settings,
                }
            )
        )
    elif family == "gpt_neox":
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**{**SIZES, "initializer_range": 0.3, **settings}))
    else:
        raise ValueError(family)
    return model.to(dtype)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(VOCABULARY - 3))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")

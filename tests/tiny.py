"""Tiny random models and a word-level tokenizer, made in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    TrainerCallback,
)

from bfpo.data.tokenize import TokenPair
from bfpo.training.trainer import BFPOConfig, BFPOTrainer

VOCABULARY = 97
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


GROUPED = {"num_key_value_heads": 1}
FAMILIES: dict[str, tuple[type[Any], type[Any], dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, GROUPED),
    "mistral": (MistralConfig, MistralForCausalLM, {**GROUPED, "sliding_window": 6}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, GROUPED),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {**GROUPED, "head_dim": 8}),
    # soft-caps its attention scores and its logits
    "gemma2": (
        Gemma2Config,
        Gemma2ForCausalLM,
        {
            **GROUPED,
            "head_dim": 8,
            "sliding_window": 6,
            "final_logit_softcapping": 1.5,
            "attn_logit_softcapping": 2.0,
            "attn_implementation": "eager",  # the only one of its own that soft-caps; older versions take another
        },
    ),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM, {**GROUPED, "head_dim": 8, "sliding_window": 6}),
    "phi3": (Phi3Config, Phi3ForCausalLM, {**GROUPED, "pad_token_id": 0}),
    "granite": (GraniteConfig, GraniteForCausalLM, {**GROUPED, "logits_scaling": 4.0, "attention_multiplier": 0.2}),
    "olmo2": (Olmo2Config, Olmo2ForCausalLM, GROUPED),
    "cohere": (CohereConfig, CohereForCausalLM, {**GROUPED, "logit_scale": 0.25}),
    "gpt_neox": (GPTNeoXConfig, GPTNeoXForCausalLM, {}),
}


def tiny_model(family: str = "llama", *, dtype: torch.dtype = torch.float32, seed: int = 0, **settings: Any) -> Any:
    config, model, own = FAMILIES[family]
    torch.manual_seed(seed)
    return model(config(**{**SIZES, "initializer_range": 0.3, **own, **settings})).to(dtype)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(VOCABULARY - 3))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def tiny_pairs(num: int, seed: int = 0, *, longest: int = 6, cells: str = "all") -> list[TokenPair]:
    """Random pairs; `cells` is "all" (labels drawn), "conflict" (safe against unsafe, both orders) or "safe"."""
    generator = np.random.default_rng(seed)

    def ids() -> np.ndarray[Any, np.dtype[np.int32]]:
        return generator.integers(3, VOCABULARY, size=generator.integers(1, longest + 1)).astype(np.int32)

    def labels() -> tuple[float, float]:
        first = float(generator.integers(2))
        if cells == "safe":
            return 1.0, 1.0
        return first, (1 - first if cells == "conflict" else float(generator.integers(2)))

    return [TokenPair(f"pair-{seed}-{i}", ids(), ids(), ids(), *labels()) for i in range(num)]


def logp(model: Any, prompt: Any, completion: Any) -> Tensor:
    """One sequence by the definition, float64."""
    ids = torch.tensor([[*prompt, *completion]], dtype=torch.int64)
    scores = model(input_ids=ids).logits[0].double().log_softmax(-1)
    places = range(len(prompt) - 1, len(prompt) + len(completion) - 1)
    return torch.stack([scores[place, int(token)] for place, token in zip(places, completion, strict=True)]).sum()


def tiny_trainer(
    folder: Path,
    *,
    main: list[TokenPair] | None = None,
    buffer: list[TokenPair] | None = None,
    model: Any = None,
    trainer: type[BFPOTrainer] = BFPOTrainer,
    eval_dataset: Any = None,
    reference: Any = None,
    callbacks: list[TrainerCallback] | None = None,
    margin_logps: Any = None,
    categories: Any = None,
    **settings: Any,
) -> BFPOTrainer:
    """A silent trainer on the CPU; 12 main pairs and no buffer unless given."""
    defaults = {
        "beta": 0.1,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    made = trainer(
        model if model is not None else tiny_model(),
        BFPOConfig(output_dir=str(folder), **{**defaults, **settings}),
        train_dataset=main if main is not None else tiny_pairs(12),
        buffer_dataset=buffer,
        eval_dataset=eval_dataset,
        processing_class=tiny_tokenizer(),
        reference=reference,
        callbacks=callbacks,
        margin_logps=margin_logps,
        categories=categories,
    )
    made.remove_callback(PrinterCallback)
    return made

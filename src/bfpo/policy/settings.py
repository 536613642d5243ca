"""Settings of how a model is loaded to train."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from bfpo.core.settings import ConfigPart, PathText

__all__ = ["InitConfig", "LoraConfig"]


class LoraConfig(ConfigPart):
    """Low-rank adapters in place of training the weights themselves; the names are peft's."""

    r: int = Field(default=16, ge=1, description="rank")
    lora_alpha: float = Field(default=32, gt=0, description="scale; the update is multiplied by lora_alpha / r")
    lora_dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout probability on the adapter's input")
    target_modules: Literal["all-linear"] | list[str] = Field(
        default="all-linear", description="names of the modules that get an adapter, or all-linear"
    )


class InitConfig(ConfigPart):
    """A Llama model with random weights."""

    config: dict[str, Any] = Field(
        description="keyword arguments of transformers.LlamaConfig; vocabulary and special tokens are the tokenizer's"
    )
    tokenizer: PathText = Field(description="folder of the tokenizer")

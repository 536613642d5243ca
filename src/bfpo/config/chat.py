"""Config of `bfpo chat`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from bfpo.core.settings import Need, PathText, StageConfig, beside
from bfpo.data.settings import TemplateKwargs
from bfpo.data.thinking import ThinkingKey
from bfpo.judges.settings import JudgeConfig

__all__ = ["ChatConfig"]


class ChatConfig(StageConfig):
    """`bfpo chat`: talk to a model, or to two side by side, in the terminal."""

    model: PathText = Field(description="model: folder, run folder or hub id")
    revision: str | None = Field(default=None, description="revision (commit, tag or branch) of model on the hub")
    against: PathText | None = Field(
        default=None, description="second model, which answers the same messages; null = model alone"
    )
    against_revision: str | None = Field(default=None, description="revision of against on the hub")
    judge: JudgeConfig | None = Field(default=None, description="judge that says whether each answer is safe")
    system: str | None = Field(default=None, min_length=1, description="system prompt; null = the chat template's own")
    temperature: float = Field(
        default=0.7, ge=0, description="sampling temperature; 0 = always the most probable token"
    )
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="sample from the smallest set of tokens with this probability"
    )
    max_new_tokens: int = Field(
        default=512, ge=1, description="longest answer in tokens, as far as the model has positions"
    )
    seed: int = Field(default=0, ge=0, description="seed of the sampling")
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = Field(
        default="auto", description="number type that holds the weights; auto as of generate"
    )
    chat_template: PathText | None = Field(
        default=None,
        description="file with a Jinja chat template; null = the tokenizer's own, else the documented default",
    )
    chat_template_kwargs: TemplateKwargs = Field(default={})
    thinking: ThinkingKey = None
    threads: int | None = Field(default=None, ge=1, description="CPU threads of torch; null = torch's own choice")

    needs: ClassVar[Mapping[str, Need]] = {"against_revision": beside("against")}

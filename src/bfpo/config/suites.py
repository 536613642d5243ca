"""The part of `bfpo evaluate` that asks whole suites: which, of whom, judged by whom."""

from __future__ import annotations

from pydantic import Field, model_validator

from bfpo.config.base import ConfigPart, FileList, PathText
from bfpo.config.judges import JudgeConfig, RankerConfig

__all__ = ["EvaluatedModel", "SuitesConfig"]


class EvaluatedModel(ConfigPart):
    """One model of several that are evaluated together."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name in scores and reports")
    model: PathText = Field(description="model: folder or hub id")
    revision: str | None = Field(default=None, description="revision (commit, tag or branch) of a model on the hub")
    reference: PathText | None = Field(default=None, description="its frozen reference; needed where data is given")
    reference_revision: str | None = Field(default=None, description="revision of reference on the hub")


class SuitesConfig(ConfigPart):
    """Suites to ask the models: sets, single ones, or files of your own."""

    use: FileList = Field(description="sets (demo, paper, extended), suites by name, and .yaml files; one or a list")
    folders: list[PathText] = Field(
        default_factory=list, description="folders where files of suites are looked for, before the hub"
    )
    limit: int | None = Field(
        default=None,
        ge=1,
        description="prompts per suite, drawn at random with seed (documents: the first); null = all",
    )
    judges: dict[str, JudgeConfig] = Field(
        default_factory=dict, description="who judges, by role (harm, refusal) or by suite; else the suite's own judge"
    )
    ranker: RankerConfig | None = Field(default=None, description="who compares answers for win rates; null = nobody")
    baseline: str | None = Field(default=None, description="name of the model that win rates are against")
    grader: str | None = Field(
        default=None,
        pattern=r"^[^/\s]+/\S+$",
        description="model that grades tasks of inspect-ai, by its name for it (openai/gpt-4o, hf/FOLDER); null = "
        "tasks that need one are skipped",
    )
    max_prompt_length: int = Field(default=2048, ge=1, description="a prompt of more tokens is left out and counted")
    max_new_tokens: int | None = Field(default=None, ge=1, description="longest completion; null = the suite's own")
    batch_size: int = Field(default=16, ge=1, description="number of completions generated at once")
    reuse: PathText | None = Field(
        default=None,
        description="run folder of an earlier `bfpo evaluate`: its answers are used where model, prompts and sampling "
        "are the same, so that only judging is done anew; null = all is asked",
    )
    label_cache: PathText | None = Field(
        default=None, description="folder where verdicts are kept; null = bfpo/label in the user's cache folder"
    )
    max_requests: int | None = Field(
        default=None, ge=1, description="most requests to servers per start; null = no limit"
    )

    @model_validator(mode="after")
    def _win_rates_need_both(self) -> SuitesConfig:
        if (self.ranker is None) != (self.baseline is None):
            raise ValueError("ranker, baseline: a win rate needs both; give both or none")
        return self

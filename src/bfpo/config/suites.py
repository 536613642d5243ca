"""The suites of `bfpo evaluate`: which suites, which models, which judges."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from bfpo.core.settings import ConfigPart, FileList, OneOf, PathText
from bfpo.data.settings import PromptSplit, TemplateKwargs
from bfpo.generation.settings import BatchSize, Engine, MaxRequests, ServerSpec
from bfpo.judges.settings import FINDS_NO_HARM, JudgeConfig, RankerConfig

__all__ = [
    "AlpacaEvalConfig",
    "CoherenceConfig",
    "DepthConfig",
    "DivergenceConfig",
    "EvaluatedModel",
    "GuardConfig",
    "PrefillConfig",
    "ServedModel",
    "SuiteChoice",
    "SuitesConfig",
    "WeightsModel",
]


class EvaluatedModel(OneOf):
    """One of several models that are evaluated together, and its engine."""

    chosen_by: ClassVar[str] = "engine"

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100, description="name in scores and reports")
    model: PathText = Field(description="model: folder or hub id; of engine server the server's name for it")
    engine: Engine = Field(
        default="transformers",
        description="what writes its answers to suites: transformers, vllm (the extra vllm, on a GPU), or server (one "
        "that is OpenAI-compatible, at url)",
    )

    @classmethod
    def mode_of(cls, values: Mapping[str, Any]) -> str:
        """Return the place of the weights: here or on a server."""
        return "server" if values.get("engine") == "server" else "transformers"


class WeightsModel(EvaluatedModel, mode="transformers", words="engine 'transformers' or 'vllm'"):
    """A model whose weights are loaded here."""

    revision: str | None = Field(default=None, description="revision (commit, tag or branch) of a model on the hub")
    reference: PathText | None = Field(default=None, description="its frozen reference; needed where data is given")
    reference_revision: str | None = Field(default=None, description="revision of reference on the hub")
    chat_template_kwargs: TemplateKwargs = Field(
        default={}, description="variables of its own chat template, in place of those that hold for all models"
    )


class ServedModel(EvaluatedModel, ServerSpec, mode="server"):
    """A model behind a server."""


class AlpacaEvalConfig(ConfigPart):
    """AlpacaEval's own annotators, which send paid requests to the server that its package is configured for."""

    annotators: str = Field(
        default="weighted_alpaca_eval_gpt4_turbo",
        min_length=1,
        description="annotators by their name in the package alpaca_eval, or a folder with a configs.yaml",
    )
    python: PathText | None = Field(
        default=None,
        description="interpreter of an environment that has the package; null = this one (the extra alpaca-eval)",
    )


class CoherenceConfig(ConfigPart):
    """A start model under which answers that it finds unlikely are not coherent."""

    model: PathText = Field(description="start model: a name among models, a folder or hub id")
    revision: str | None = Field(default=None, description="revision (commit, tag or branch) of it on the hub")


class GuardConfig(ConfigPart):
    """A guard before or behind every model, which gives each a second row: the same answers, some of them blocked."""

    judge: JudgeConfig = Field(description="the guard; of a result it should not be the judge")
    filter: Literal["input", "output", "both"] = Field(
        default="both", description="what the guard reads: the user's request, the answer, or both"
    )
    at: float | None = Field(
        default=None, gt=0, le=1, description="p(unsafe) from which it blocks; null = by the guard's own verdict"
    )
    answer: str = Field(
        default="I'm sorry, but I can't help with that.",
        min_length=1,
        description="text in place of a blocked answer, which counts as harmless and as a refusal",
    )

    @model_validator(mode="after")
    def _judges_safety(self) -> GuardConfig:
        if self.judge.format == "refusal-phrases":
            raise ValueError(f"judge: {FINDS_NO_HARM}")
        if not self.answer.strip():
            raise ValueError(f"answer: got {self.answer!r}; allowed: a text with words, which a user would see")
        return self


class PrefillConfig(ConfigPart):
    """Harmful answers that are begun for each model: the first tokens of a compliance, which it continues."""

    tokens: list[Annotated[int, Field(ge=0)]] = Field(
        default=[0, 1, 5, 10, 20, 40],
        min_length=1,
        description="numbers of tokens that are given, by the start's tokenizer; 0 = none, the prompt alone",
    )
    suites: list[str] | None = Field(
        default=None, description="suites of this run whose harmful prompts are asked; null = all that have some"
    )
    file: PathText | None = Field(
        default=None,
        description="file of answers to the suites' prompts whose first tokens are given; null = the start's own "
        "answers. Of both, only those that comply, are coherent and, where the suite has a judge, are unsafe",
    )
    assist: Literal["reference", "judge"] | None = Field(
        default=None,
        description="choose each given token among the model's own most probable ones: reference = the compliance's "
        "next token where it is among them, else the most probable; judge = the one that the suite's judge finds "
        "least safe. null = the compliance's tokens as they are",
    )
    top: int | None = Field(default=None, ge=2, description="most probable tokens to choose among; null = 20")

    @model_validator(mode="after")
    def _holds_together(self) -> PrefillConfig:
        if len(set(self.tokens)) < len(self.tokens) or not any(self.tokens):
            raise ValueError(f"tokens: got {self.tokens}; allowed: different numbers, at least one of them above 0")
        if self.suites is not None and not self.suites:
            raise ValueError("suites: got []; allowed: names of suites of this run; null = all with harmful prompts")
        if self.top is not None and self.assist is None:
            raise ValueError("top: not read without assist; give assist, or leave top out")
        return self


class DivergenceConfig(ConfigPart):
    """KL of each model to the start by the position in the answer."""

    answers: Literal["start", "own"] = Field(
        default="start",
        description="answers on which it is measured: the start's (the same for all models), or each model's own",
    )
    positions: int = Field(default=64, ge=1, description="first tokens of an answer that are read")


class DepthConfig(ConfigPart):
    """How deep safety goes: answers that are begun, and where in an answer a model differs from its start."""

    start: str = Field(description="name of the start model among models")
    prefill: PrefillConfig | None = Field(default=None, description="answers that are begun; null = none")
    divergence: DivergenceConfig | None = Field(
        default=None, description="KL to the start by position in the answer; null = not measured"
    )

    @model_validator(mode="after")
    def _something_to_measure(self) -> DepthConfig:
        if self.prefill is None and self.divergence is None:
            raise ValueError("prefill, divergence: one of the two is needed, such as prefill: {}")
        return self


class SuiteChoice(ConfigPart):
    """What of one suite is asked, in place of what holds for all; a key that is not given holds as for all."""

    limit: int | None = Field(default=None, ge=1, description="prompts of this suite; null = all")
    split: PromptSplit = None


class SuitesConfig(ConfigPart):
    """Suites to ask the models: sets, single ones, or files of your own."""

    use: FileList = Field(
        description="sets (demo, paper, extended, capability), suites by name, and .yaml files; one or a list"
    )
    folders: list[PathText] = Field(
        default_factory=list, description="folders where files of suites are looked for, before the hub"
    )
    limit: int | None = Field(
        default=None,
        ge=1,
        description="prompts per suite, drawn by their hashes with seed, whatever else the file holds; null = all",
    )
    split: PromptSplit = None
    each: dict[str, SuiteChoice] = Field(
        default={}, description="limit and split of single suites, such as {everyday: {limit: 80}}"
    )
    trained_on: Literal["keep", "leave_out"] = Field(
        default="keep",
        description="prompts of suites that a model was trained on, by its run folder: keep = asked, and their number "
        "is said; leave_out = asked of no model",
    )
    judges: dict[str, JudgeConfig] = Field(
        default_factory=dict, description="judges by role (harm, refusal) or by suite; else the suite's own judge"
    )
    ranker: RankerConfig | None = Field(
        default=None, description="ranker that compares answers for win rates; null = no ranker"
    )
    baseline: str | None = Field(default=None, description="name of the model that win rates are against")
    alpaca_eval: AlpacaEvalConfig | None = Field(
        default=None,
        description="have alpaca-eval annotated by its own package, against the baseline or, without one, against its "
        "own reference; null = its form of the answers is only written",
    )
    grader: str | None = Field(
        default=None,
        pattern=r"^[^/\s]+/\S+$",
        description="model that grades tasks of inspect-ai, by its name for it (openai/gpt-4o, hf/FOLDER); null = "
        "tasks that need one are skipped",
    )
    max_prompt_length: int = Field(default=2048, ge=1, description="a prompt of more tokens is left out and counted")
    max_new_tokens: int | None = Field(default=None, ge=1, description="longest completion; null = the suite's own")
    batch_size: BatchSize = None
    reuse: PathText | None = Field(
        default=None,
        description="run folder of an earlier `bfpo evaluate`: its answers are used where model, prompts and sampling "
        "are the same, so that only new prompts are asked; null = ask everything",
    )
    label_cache: PathText | None = Field(
        default=None, description="folder where verdicts are kept; null = bfpo/label in the user's cache folder"
    )
    max_requests: MaxRequests = None

    @property
    def batch_size_of_tasks(self) -> int:
        """The number for tasks of lm-eval and inspect-ai, which ask for one."""
        return self.batch_size or 16

    def choice(self, suite: str) -> SuiteChoice:
        """Return limit and split of a suite."""
        given = self.each.get(suite, SuiteChoice())
        return SuiteChoice(
            limit=given.limit if "limit" in given.model_fields_set else self.limit,
            split=given.split if "split" in given.model_fields_set else self.split,
        )

    @model_validator(mode="after")
    def _win_rates_need_both(self) -> SuitesConfig:
        compared = self.ranker is not None or self.alpaca_eval is not None
        if (self.ranker is not None and self.baseline is None) or (self.baseline is not None and not compared):
            raise ValueError("ranker, baseline: a win rate needs both; give both or none")
        return self

"""Configs of the commands that use a trained model: generation and evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from bfpo.config.suites import (
    CoherenceConfig,
    DepthConfig,
    EvaluatedModel,
    GuardConfig,
    ServedModel,
    SuitesConfig,
    WeightsModel,
)
from bfpo.config.train import MethodSettings
from bfpo.core.settings import ConfigPart, Need, OneOf, PathText, StageConfig, beside, unless
from bfpo.data.settings import DataConfig, PromptSplit, TemplateKwargs
from bfpo.data.thinking import ThinkingKey
from bfpo.execution.settings import Executed
from bfpo.generation.settings import BatchSize, Engine, MaxRequests, ServerSpec, WeightsSpec
from bfpo.judges.settings import JudgeConfig, OracleSpec, loads_model

__all__ = [
    "CompletionsJob",
    "EvaluateConfig",
    "GenerateConfig",
    "PairsAndCompletionsJob",
    "PairsJob",
    "ServerGenerate",
    "SuitesAndPairsJob",
    "SuitesJob",
    "TransformersGenerate",
    "VllmGenerate",
]


class GenerateConfig(OneOf, StageConfig):
    """`bfpo generate`: sample completions of prompts from a model."""

    chosen_by: ClassVar[str] = "engine"

    model: PathText = Field(description="model: folder or hub id; of engine server the server's name for it")
    engine: Engine = Field(
        default="transformers",
        description="what runs the model: transformers, vllm (the extra vllm, on a GPU), or server (one that is "
        "OpenAI-compatible, at url)",
    )
    prompts: PathText = Field(
        description="prompts: a .txt with one per line, or a file or folder of our columns or of an evaluation suite's"
    )
    columns: dict[str, str | None] = Field(
        default_factory=dict, description="our column name: its name in the prompt file, where they differ"
    )
    bad_rows: Literal["stop", "skip"] = Field(
        default="stop",
        description="a row that cannot be read, or that the chat template refuses, stops the run or is skipped",
    )
    limit: int | None = Field(
        default=None, ge=1, description="number of prompts, drawn at random with seed; null = all"
    )
    split: PromptSplit = None
    num_completions: int = Field(default=1, ge=1, description="number of completions per prompt")
    max_new_tokens: int = Field(default=256, ge=1, description="longest completion in tokens")
    temperature: float = Field(
        default=1.0, ge=0, description="sampling temperature; 0 = always the most probable token"
    )
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="sample from the smallest set of tokens with this probability"
    )
    seed: int = Field(default=0, ge=0, description="seed of the sampling")
    thinking: ThinkingKey = None
    reuse: PathText | None = Field(
        default=None,
        description="folder of an earlier run of the same model and settings, whose completions of the same prompts "
        "are taken; null = make all",
    )

    @classmethod
    def mode_of(cls, values: Mapping[str, Any]) -> str:
        """Return the engine."""
        engine = values.get("engine", "transformers")
        return engine if isinstance(engine, str) and engine in cls.modes else "transformers"

    @model_validator(mode="after")
    def _greedy_has_one_answer(self) -> GenerateConfig:
        if self.temperature == 0 and self.num_completions > 1:
            raise ValueError(
                f"num_completions: got {self.num_completions} at temperature 0, which gives one completion per prompt; "
                "allowed: 1, or a temperature above 0"
            )
        return self


class TransformersGenerate(GenerateConfig, WeightsSpec, Executed, mode="transformers"):
    """A model that transformers runs here."""

    batch_size: BatchSize = None
    threads: int | None = Field(default=None, ge=1, description="CPU threads of torch; null = torch's own choice")


class VllmGenerate(GenerateConfig, WeightsSpec, Executed, mode="vllm"):
    """A model that vLLM runs here."""

    several_gpus: ClassVar[bool] = True


class ServerGenerate(GenerateConfig, ServerSpec, mode="server"):
    """A model behind a server."""

    max_requests: MaxRequests = None


class EvaluateConfig(OneOf, StageConfig):
    """`bfpo evaluate`: suites and accuracy of several models; or accuracy, or verdicts on completions, of one."""

    chosen_by: ClassVar[str] = "an evaluation of"

    confidence: float = Field(default=0.95, gt=0, lt=1, description="level of the intervals")
    bootstrap_samples: int = Field(
        default=2000,
        ge=1,
        description="number of resamples (of prompts) behind the intervals of a win rate at equal length and of KL by "
        "position; the others need none",
    )
    seed: int = Field(default=0, ge=0, description="seed of resampling, of random signs in tests, and of data.limit")
    threads: int | None = Field(default=None, ge=1, description="CPU threads of torch; null = torch's own choice")

    @classmethod
    def mode_of(cls, values: Mapping[str, Any]) -> str:
        """Return the job that the given keys select: suites, pairs (data), completions, or the last two."""
        given = {key for key in ("suites", "models", "data", "model", "reference", "completions") if values.get(key)}
        if given & {"suites", "models"}:
            return "suites and data" if "data" in given else "suites"
        if "completions" not in given:
            if not given:
                raise ValueError(
                    "nothing to evaluate; give suites, or model, reference and data, or completions, or the last two"
                )
            return "data"
        return "data and completions" if given - {"completions"} else "completions"

    @classmethod
    def called(cls, values: Mapping[str, Any]) -> str:
        """Return what is evaluated."""
        return f"an evaluation of {cls.mode}{'' if ' and ' in cls.mode else ' alone'}"

    def interval_settings(self) -> dict[str, Any]:
        """Return the settings of an interval by resampling."""
        return {"confidence": self.confidence, "num_resamples": self.bootstrap_samples, "random_seed": self.seed}


class _Loaded(ConfigPart):
    """How weights are loaded and prompts are rendered."""

    dtype: Literal["float32", "bfloat16", "float16", "float64", "auto"] | None = Field(
        default=None,
        description="number type that holds the weights; auto = as saved, but answers and coherence as `bfpo generate` "
        "does; null = float32 for log-probabilities, auto for answers and coherence",
    )
    chat_template: PathText | None = Field(
        default=None,
        description="file with a Jinja chat template; null = the tokenizer's own, else the documented default",
    )
    chat_template_kwargs: TemplateKwargs = Field(default={})

    @property
    def dtype_of_logps(self) -> str:
        """The number type of weights whose log-probabilities are read."""
        return self.dtype or "float32"


class _Read(ConfigPart):
    """How answers are read for coherence."""

    coherence: CoherenceConfig | None = Field(
        default=None,
        description="start model by which answers of unlikely text are found too; null = empty, looping and "
        "off-language ones, from the text alone",
    )


class _Pairs(MethodSettings):
    """Accuracy of the implicit reward on pairs."""

    data: DataConfig = Field(description="pairs on which the implicit reward is tested")
    allow_template_changes: bool = Field(
        default=False,
        description="text of the pairs that the chat template deletes or moves is counted; false = it stops the run",
    )
    allow_rendered_text: bool = Field(
        default=False,
        description="control tokens of a rendered chat in the texts of the pairs are taken as text and counted; "
        "false = they stop the run where half of the pairs have them",
    )
    max_length: int = Field(
        default=1024, ge=2, description="longest prompt + completion in tokens; prompts are cut first"
    )
    max_completion_length: int | None = Field(
        default=None, ge=1, description="longest completion in tokens; null = max_length"
    )
    pairs_per_batch: int | None = Field(
        default=None, ge=1, description="number of pairs per forward pass; null = as many as hold 8,192 tokens"
    )


class PairsJob(EvaluateConfig, _Loaded, _Pairs, Executed, mode="data", words="an evaluation of data"):
    """Accuracy of one model on held-out pairs."""

    model: PathText = Field(description="trained model: folder or hub id")
    revision: str | None = Field(default=None, description="revision (commit, tag or branch) of model on the hub")
    reference: PathText = Field(description="frozen reference, for accuracy on data: folder or hub id")
    reference_revision: str | None = Field(default=None, description="revision of reference on the hub")


class _Labels(ConfigPart):
    labels: PathText | None = Field(
        default=None,
        description="labels.jsonl of `bfpo annotate` on these answers: rates by people and judge together; null = none",
    )


class CompletionsJob(
    EvaluateConfig, _Read, _Labels, Executed, mode="completions", words="an evaluation of completions"
):
    """A judge's scores of completions."""

    completions: PathText = Field(description="completions.jsonl of `bfpo generate` to judge")
    judge: JudgeConfig = Field(
        default=OracleSpec(),
        description="who judges completions: oracle (the rules of the closed world of `bfpo demo`), FORMAT:MODEL, a "
        "folder, a .yaml file, or the keys below",
    )
    label_cache: PathText | None = Field(
        default=None,
        description="folder where verdicts are kept, for this run and others; null = bfpo/label in the user's cache",
    )
    thinking: ThinkingKey = None

    needs: ClassVar[Mapping[str, Need]] = {
        "executor": Need(
            "without a judge or coherence that loads a model",
            lambda config: loads_model(config.judge) or config.coherence,
        )
    }


class PairsAndCompletionsJob(PairsJob, CompletionsJob, mode="data and completions", words=""):
    """Both of one model."""

    needs: ClassVar[Mapping[str, Need]] = {}  # the workers have pairs at least


class SuitesJob(EvaluateConfig, _Loaded, _Read, _Labels, Executed, mode="suites", words="an evaluation of suites"):
    """Suites of several models, or of a single one."""

    suites: SuitesConfig = Field(description="suites that the models are asked")
    models: list[EvaluatedModel] = Field(
        default_factory=list, description="models that suites ask and compare; model and reference name a single one"
    )
    model: PathText | None = Field(
        default=None, description="trained model: folder or hub id; with suites a single one, in place of models"
    )
    revision: str | None = Field(default=None, description="revision (commit, tag or branch) of model on the hub")
    reference: PathText | None = Field(
        default=None, description="frozen reference, for accuracy on data: folder or hub id"
    )
    reference_revision: str | None = Field(default=None, description="revision of reference on the hub")
    guard: GuardConfig | None = Field(
        default=None, description="guard that gives every model a second row NAME+guard; null = none"
    )
    thinking: ThinkingKey = None
    depth: DepthConfig | None = Field(
        default=None,
        description="how deep safety goes: answers begun with a harmful compliance, KL to the start by position; "
        "null = not measured",
    )

    needs: ClassVar[Mapping[str, Need]] = {
        "models": beside("models"),
        **dict.fromkeys(("model", "revision", "reference", "reference_revision"), unless("models")),
    }

    def evaluated(self) -> list[EvaluatedModel]:
        """Return the models of the suites; a single one is named after its folder."""
        if self.model is None:
            return self.models
        letters = (c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in PurePath(self.model).name)
        name = "".join(letters).lstrip("._-")[:100] or "model"
        keys = ("model", "revision", "reference", "reference_revision")
        return [WeightsModel(name=name, **{key: getattr(self, key) for key in keys})]

    def start(self) -> tuple[str, str | None] | None:
        """Return folder or hub id of the start model of `coherence`, and its revision."""
        if self.coherence is None:
            return None
        named = next((one for one in self.with_weights() if one.name == self.coherence.model), None)
        chosen = self.coherence if named is None else named
        return chosen.model, chosen.revision

    def with_weights(self) -> list[WeightsModel]:
        """Return the models whose weights are loaded here."""
        return [model for model in self.evaluated() if isinstance(model, WeightsModel)]

    @model_validator(mode="after")
    def _models_fit(self) -> SuitesJob:
        if not self.models and self.model is None:
            raise ValueError("models: missing; suites ask models: give models, or model for a single one")
        names = [model.name for model in self.evaluated()]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"models: {', '.join(repeated)} appears twice; names must differ")
        start = self.coherence and next((one for one in self.evaluated() if one.name == self.coherence.model), None)
        if isinstance(start, ServedModel):
            raise ValueError(
                f"coherence.model: {start.name} is behind a server, which gives no log-probabilities of given answers; "
                "name a model whose weights are loaded here"
            )
        if self.suites.baseline is not None and self.suites.baseline not in names:
            raise ValueError(f"suites.baseline: got {self.suites.baseline!r}; allowed: {', '.join(names)}")
        if self.depth is not None:
            self._check_depth(self.depth)
        return self

    def _check_depth(self, depth: DepthConfig) -> None:
        loaded = [model.name for model in self.with_weights()]
        if depth.start not in loaded:
            raise ValueError(
                f"depth.start: got {depth.start!r}; allowed: a model whose weights are loaded here: "
                f"{', '.join(loaded) or 'models has none'}"
            )
        served = [model.name for model in self.evaluated() if isinstance(model, ServedModel)]
        if depth.prefill is not None and depth.prefill.assist is not None and served:
            raise ValueError(
                f"depth.prefill.assist: {', '.join(served)} is behind a server, which does not say what its most "
                "probable tokens are; leave assist out, or evaluate such models separately"
            )
        if depth.divergence is not None and len(loaded) < 2:
            raise ValueError("depth.divergence: needs the weights of a model beside the start's; add it to models")


class SuitesAndPairsJob(SuitesJob, _Pairs, mode="suites and data", words=""):
    """Suites and, of each model, accuracy on held-out pairs."""

    def on_pairs(self) -> dict[str, PairsJob]:
        """Return the job on pairs of each model, by its name."""
        shared = {key: getattr(self, key) for key in self.model_fields_set & PairsJob.model_fields.keys()}
        keys = ("model", "revision", "reference", "reference_revision")
        jobs = {model.name: {key: getattr(model, key) for key in keys} for model in self.evaluated()}
        for model in self.with_weights():
            jobs[model.name]["chat_template_kwargs"] = model.chat_template_kwargs or self.chat_template_kwargs
        return {name: PairsJob.model_validate({**shared, **weights}) for name, weights in jobs.items()}

    @model_validator(mode="after")
    def _log_probabilities_need_weights(self) -> SuitesAndPairsJob:
        models = self.evaluated()
        if served := [model.name for model in models if isinstance(model, ServedModel)]:
            raise ValueError(
                f"models: {', '.join(served)} is behind a server, which gives no log-probabilities of given answers; "
                "leave data out"
            )
        if lacking := [model.name for model in models if getattr(model, "reference", None) is None]:
            raise ValueError(f"models: {', '.join(lacking)} has no reference; accuracy on data needs one")
        return self

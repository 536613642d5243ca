"""Configs of the stages that ask a trained model: generation and evaluation."""

from __future__ import annotations

from pathlib import PurePath
from typing import Literal

from pydantic import Field, model_validator

from bfpo.config.judges import SERVER_KEYS, JudgeConfig, MaxRequests, ServerKeys
from bfpo.config.sections import DataConfig
from bfpo.config.suites import EvaluatedModel, SuitesConfig
from bfpo.config.train import MethodSettings
from bfpo.core.settings import PathText, StageConfig

__all__ = ["EvaluateConfig", "GenerateConfig"]


class GenerateConfig(StageConfig, ServerKeys):
    """`bfpo generate`: sample completions of prompts from a model."""

    model: PathText = Field(description="model: folder or hub id; of engine server the server's name for it")
    engine: Literal["transformers", "vllm", "server"] = Field(
        default="transformers",
        description="what runs the model: transformers, vllm (the extra vllm, on a GPU), or server (one that is "
        "OpenAI-compatible, at url)",
    )
    revision: str | None = Field(default=None, description="revision (commit, tag or branch) of a model on the hub")
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = Field(
        default="float32", description="number type that holds the weights; auto = as saved"
    )
    prompts: PathText = Field(
        description="prompts: a .txt with one a line, or a file or folder of our columns or of an evaluation suite's"
    )
    columns: dict[str, str] = Field(
        default_factory=dict, description="our column name: its name in the prompt file, where they differ"
    )
    limit: int | None = Field(
        default=None, ge=1, description="number of prompts, drawn at random with seed; null = all"
    )
    num_completions: int = Field(default=1, ge=1, description="number of completions per prompt")
    max_prompt_length: int = Field(default=1024, ge=1, description="longest prompt in tokens")
    long_prompts: Literal["stop", "skip"] = Field(
        default="stop", description="a prompt that is longer stops the run, or is left out and counted"
    )
    max_new_tokens: int = Field(default=256, ge=1, description="longest completion in tokens")
    temperature: float = Field(
        default=1.0, ge=0, description="sampling temperature; 0 = always the most probable token"
    )
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="sample from the smallest set of tokens with this probability"
    )
    batch_size: int = Field(default=16, ge=1, description="number of completions generated at once")
    chat_template: PathText | None = Field(
        default=None,
        description="file with a Jinja chat template; null = the tokenizer's own, else the documented default",
    )
    seed: int = Field(default=0, ge=0, description="seed of the sampling")
    threads: int | None = Field(default=None, ge=1, description="CPU threads of torch; null = torch's own choice")

    max_requests: MaxRequests = None

    def unread(self) -> frozenset[str]:
        """Leave out what the engine does not read."""
        return super().unread() | self.unread_by_engine()

    def unread_by_engine(self) -> frozenset[str]:
        """Return the keys that generation with this engine does not read."""
        return self.unread_by(self.engine)

    @staticmethod
    def unread_by(engine: str) -> frozenset[str]:
        """Return the keys that generation with an engine does not read."""
        return _UNREAD_BY_ENGINE[engine]

    @model_validator(mode="after")
    def _engine_reads_its_keys(self) -> GenerateConfig:
        if idle := sorted(self.unread_by_engine() & self.model_fields_set):
            raise ValueError(f"{', '.join(idle)}: not read by engine {self.engine!r}; leave it out")
        if self.engine == "server" and self.url is None:
            raise ValueError(
                "url: missing; engine 'server' needs the base URL of a server, such as http://localhost:8000/v1"
            )
        return self

    @model_validator(mode="after")
    def _greedy_has_one_answer(self) -> GenerateConfig:
        if self.temperature == 0 and self.num_completions > 1:
            raise ValueError(
                f"num_completions: got {self.num_completions} at temperature 0, which gives one completion per prompt; "
                "allowed: 1, or a temperature above 0"
            )
        return self


_ASKS_SERVER = SERVER_KEYS | {"max_requests"}
_RUNS_MODEL = frozenset({"revision", "dtype", "max_prompt_length", "long_prompts", "chat_template"})
_RUNS_TORCH = frozenset({"batch_size", "threads"})
_UNREAD_BY_ENGINE = {
    "transformers": _ASKS_SERVER,
    "vllm": _ASKS_SERVER | _RUNS_TORCH,
    "server": _RUNS_MODEL | _RUNS_TORCH,
}


class EvaluateConfig(MethodSettings):
    """`bfpo evaluate`: suites and accuracy of several models; or accuracy, or verdicts on completions, of one."""

    suites: SuitesConfig | None = Field(default=None, description="suites that the models are asked; null = none")
    models: list[EvaluatedModel] = Field(
        default_factory=list, description="models that suites ask and compare; model and reference name a single one"
    )

    model: PathText | None = Field(default=None, description="trained model, for accuracy on data: folder or hub id")
    revision: str | None = Field(default=None, description="revision (commit, tag or branch) of model on the hub")
    reference: PathText | None = Field(
        default=None, description="frozen reference, for accuracy on data: folder or hub id"
    )
    reference_revision: str | None = Field(default=None, description="revision of reference on the hub")
    data: DataConfig | None = Field(
        default=None, description="pairs on which the implicit reward is tested; null = none"
    )
    dtype: Literal["float32", "bfloat16", "float16", "float64", "auto"] = Field(
        default="float32", description="number type that holds the weights; auto = as saved"
    )
    chat_template: PathText | None = Field(
        default=None,
        description="file with a Jinja chat template; null = the tokenizer's own, else the documented default",
    )
    max_length: int = Field(
        default=1024, ge=2, description="longest prompt + completion in tokens; prompts are cut first"
    )
    max_completion_length: int | None = Field(
        default=None, ge=1, description="longest completion in tokens; null = max_length"
    )
    pairs_per_batch: int = Field(default=16, ge=1, description="number of pairs per forward pass")
    completions: PathText | None = Field(
        default=None, description="completions.jsonl of `bfpo generate` to judge; null = none"
    )
    judge: JudgeConfig = Field(
        default=JudgeConfig(format="oracle"),
        description="who judges completions: oracle (the rules of the closed world of `bfpo demo`), FORMAT:MODEL, a "
        "folder, a .yaml file, or the keys below",
    )
    confidence: float = Field(default=0.95, gt=0, lt=1, description="level of the intervals")
    bootstrap_samples: int = Field(
        default=2000, ge=1, description="number of resamples (of prompts) behind an interval"
    )
    seed: int = Field(default=0, ge=0, description="seed of the resampling and of data.limit")
    threads: int | None = Field(default=None, ge=1, description="CPU threads of torch; null = torch's own choice")

    def evaluated(self) -> list[EvaluatedModel]:
        """Return the models that suites ask; a single one is called after its folder."""
        if self.models:
            return self.models
        assert self.model is not None  # checked below
        name = PurePath(self.model).name
        single = {name: getattr(self, name) for name in _SINGLE_KEYS}
        return [EvaluatedModel(name="".join(c if c.isalnum() or c in "._-" else "-" for c in name), **single)]

    def unread(self) -> frozenset[str]:
        """Leave out the keys of the part that is not asked for."""
        pair_keys = _PAIR_KEYS if self.data is None else frozenset()
        judge_keys = _JUDGE_KEYS if self.completions is None else frozenset()
        if self.suites is None:
            return super().unread() | pair_keys | judge_keys | {"suites", "models"}
        single = _SINGLE_KEYS if self.models else frozenset({"models"})
        return super().unread() | (pair_keys - _ASKED_KEYS) | _JUDGE_KEYS | single

    @model_validator(mode="after")
    def _something_to_score(self) -> EvaluateConfig:
        if self.suites is not None:
            return self._check_suites(self.suites)
        if self.models:
            raise ValueError("models: not read without suites; give suites, or model for a single one")
        with_pairs = {key: getattr(self, key) is not None for key in ("model", "reference", "data")}
        if any(with_pairs.values()) and not all(with_pairs.values()):
            missing = ", ".join(key for key, given in with_pairs.items() if not given)
            raise ValueError(f"{missing}: missing; accuracy on pairs needs model, reference and data together")
        if not any(with_pairs.values()) and self.completions is None:
            raise ValueError(
                "nothing to evaluate; give suites, or model, reference and data, or completions, or the last two"
            )
        if idle := sorted(self.unread() & self.model_fields_set - {"model", "reference", "data", "completions"}):
            needed = "data" if self.data is None else "completions"
            raise ValueError(f"{', '.join(idle)}: not read without {needed}; give {needed} or leave them out")
        return self

    def _check_suites(self, suites: SuitesConfig) -> EvaluateConfig:
        if not self.models and self.model is None:
            raise ValueError("models: missing; suites ask models: give models, or model for a single one")
        given = {name for name in self.model_fields_set if getattr(self, name) not in (None, [])}
        if idle := sorted(self.unread() & given):
            raise ValueError(f"{', '.join(idle)}: not read with suites and these models; leave them out")
        models = self.evaluated()
        names = [model.name for model in models]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"models: {', '.join(repeated)} is there twice; every name may be there once")
        served = [model.name for model in models if self.data is not None and model.engine == "server"]
        if served:
            raise ValueError(
                f"models: {', '.join(served)} is behind a server, which tells no log-probabilities of given answers; "
                "leave data out"
            )
        lacking = [model.name for model in models if self.data is not None and model.reference is None]
        if lacking:
            raise ValueError(f"models: {', '.join(lacking)} has no reference; accuracy on data needs one")
        if suites.baseline is not None and suites.baseline not in names:
            raise ValueError(f"suites.baseline: got {suites.baseline!r}; allowed: {', '.join(names)}")
        return self


_JUDGE_KEYS = frozenset({"completions", "judge"})
_SINGLE_KEYS = frozenset({"model", "revision", "reference", "reference_revision"})
_ASKED_KEYS = _SINGLE_KEYS | {"dtype", "chat_template"}
_COMMON_KEYS = frozenset({"suites", "models", "confidence", "bootstrap_samples", "seed", "threads"})
_PAIR_KEYS = frozenset(EvaluateConfig.model_fields) - _JUDGE_KEYS - _COMMON_KEYS

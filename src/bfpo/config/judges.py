"""Configs of the commands that train and check judges."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from bfpo.core.settings import ConfigPart, Need, OneOf, PathText, Seed, StageConfig, unless
from bfpo.data.settings import LabelledConfig
from bfpo.execution.settings import Executed
from bfpo.generation.settings import BatchSize, MaxRequests, ServerSpec
from bfpo.judges.settings import JudgeConfig, loads_model
from bfpo.policy.settings import LoraConfig

__all__ = [
    "ClassifierTrainConfig",
    "JudgeCheckConfig",
    "JudgeTrainConfig",
    "NgramTrainConfig",
    "OwnJudge",
    "OwnNgrams",
    "OwnProbe",
    "ProbeTrainConfig",
    "RankerTrainConfig",
]


class JudgeTrainConfig(OneOf, StageConfig):
    """`bfpo judge-train`: train a small judge of safety on labelled completions, or a ranker on pairs."""

    chosen_by: ClassVar[str] = "kind"

    data: LabelledConfig = Field(description="labelled completions; for a ranker, pairs")
    kind: Literal["ngrams", "probe", "classifier", "ranker"] = Field(
        default="ngrams",
        description="a judge of hashed n-grams with a logistic regression, one of a frozen model's hidden states with "
        "the same, a fine-tuned classifier, or a ranker of helpfulness from the n-grams of pairs",
    )
    name: str = Field(default="trained", min_length=1, description="name that its verdicts carry")
    seed: Seed = Field(default=0, description="seed of the folds and of the order of training")
    threads: int | None = Field(default=None, ge=1, description="CPU threads of torch; null = torch's own choice")

    @classmethod
    def mode_of(cls, values: Mapping[str, Any]) -> str:
        """Return the kind."""
        kind = values.get("kind")
        return kind if isinstance(kind, str) and kind in cls.modes else "ngrams"


class _Ngrams(ConfigPart):
    ngrams: list[int] = Field(default=[1, 2], description="n-grams: fewest and most words in a row")
    num_features: int = Field(default=1 << 18, ge=2, description="n-grams: size of the hashed table")
    inverse_penalty: float = Field(default=10.0, gt=0, description="n-grams: C of the logistic regression")
    folds: int = Field(default=5, ge=2, description="n-grams: parts of a cross-validation by prompt")

    @model_validator(mode="after")
    def _a_range(self) -> _Ngrams:
        if len(self.ngrams) != 2 or not 1 <= self.ngrams[0] <= self.ngrams[1]:
            raise ValueError(f"ngrams: got {self.ngrams}; allowed: two whole numbers, 1 <= first <= second")
        return self


class _Judge(ConfigPart):
    threshold: float | None = Field(
        default=0.5,
        gt=0,
        lt=1,
        description="p(safe) from which on a text is safe (of n-grams: above which); null = the one with the best "
        "kappa on held-out rows. It can be changed where the judge is used",
    )
    max_answer_words: int | None = Field(
        default=None,
        ge=1,
        description="train on the first words of an answer alone, as many as the answers to be judged have; null = all",
    )
    balanced: bool = Field(default=False, description="weigh safe and unsafe rows so that both count the same")


class NgramTrainConfig(JudgeTrainConfig, _Ngrams, _Judge, mode="ngrams"):
    """A judge of hashed n-grams."""

    with_prompt: bool = Field(default=False, description="n-grams: read the prompt's words too")


class _Probe(ConfigPart):
    model: PathText = Field(description="probe: causal LM that reads; classifier: start; folder or hub id")
    revision: str | None = Field(default=None, description="revision (commit, tag or branch) of a model on the hub")
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = Field(
        default="auto", description="probe: number type that holds the weights, auto = as saved"
    )
    layer: int | None = Field(
        default=None, ge=0, description="layer that is read, 0 = the embedding; null = the best on held-out rows"
    )
    max_length: int = Field(
        default=1024, ge=8, description="longest prompt + completion in tokens; longer ones are left out, or unscored"
    )
    inverse_penalty: float = Field(default=0.01, gt=0, description="C of the logistic regression")
    folds: int = Field(default=5, ge=2, description="parts of a cross-validation by prompt")
    batch_size: BatchSize = None
    feature_cache: PathText | None = Field(
        default=None, description="folder where hidden states are kept; null = bfpo/features in the user's cache folder"
    )


class ProbeTrainConfig(_Probe, JudgeTrainConfig, _Judge, mode="probe"):
    """A frozen model's mean hidden state of an answer, with a logistic regression."""


class RankerTrainConfig(JudgeTrainConfig, _Ngrams, mode="ranker"):
    """A ranker of the n-grams of pairs."""

    @model_validator(mode="after")
    def _reads_pairs(self) -> RankerTrainConfig:
        if self.data.model_fields_set & {"safe_values", "unsafe_values", "where"}:
            raise ValueError("data: safe_values, unsafe_values and where are not read by kind 'ranker'; leave them out")
        return self


class ClassifierTrainConfig(JudgeTrainConfig, _Judge, mode="classifier"):
    """A fine-tuned classifier."""

    model: PathText = Field(description="classifier: model to start from, folder or hub id")
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="classifier: number type of the forward pass; weights are held in float32"
    )
    trainable: Literal["all", "head"] = Field(
        default="all", description="classifier: what trains, all weights or the new head on a frozen body"
    )
    lora: LoraConfig | None = Field(default=None, description="classifier: train adapters; null = the weights")
    windows: bool = Field(
        default=False,
        description="classifier: an answer that is too long is read in overlapping windows, and the least safe one "
        "counts; false = it is left out, or unscored",
    )
    held_out: float = Field(
        default=0.1, ge=0, lt=1, description="classifier: share of the prompts held out, to measure the judge on"
    )
    max_steps: int | None = Field(
        default=None, ge=1, description="classifier: optimizer steps; null = as num_train_epochs says"
    )
    revision: str | None = Field(default=None, description="classifier: revision of a model on the hub")
    max_length: int = Field(
        default=512, ge=8, description="classifier: longest prompt + completion in tokens; longer ones are left out"
    )
    learning_rate: float = Field(default=2e-5, gt=0, description="classifier: peak learning rate")
    num_train_epochs: float = Field(default=2.0, gt=0, description="classifier: passes over the data")
    batch_size: int = Field(default=16, ge=1, description="classifier: number of texts per optimizer step")
    logging_steps: int = Field(
        default=10, ge=1, description="classifier: optimizer steps between rows of metrics.jsonl"
    )
    save_steps: int = Field(default=500, ge=1, description="classifier: optimizer steps between checkpoints")

    needs: ClassVar[Mapping[str, Need]] = {"num_train_epochs": unless("max_steps"), "trainable": unless("lora")}

    @model_validator(mode="after")
    def _measured(self) -> ClassifierTrainConfig:
        if self.threshold is None and not self.held_out:
            raise ValueError("threshold: null needs rows to choose on; give held_out above 0, or a number")
        return self


class OwnJudge(OneOf):
    """A judge that is trained on the labels that it checks, each of them judged by one that did not see its prompt."""

    chosen_by: ClassVar[str] = "kind"

    kind: Literal["ngrams", "probe"] = Field(
        default="ngrams",
        description="a judge of hashed n-grams with a logistic regression, or one of a frozen model's hidden states "
        "with the same",
    )
    balanced: bool = Field(default=False, description="weigh safe and unsafe rows so that both count the same")

    @classmethod
    def mode_of(cls, values: Mapping[str, Any]) -> str:
        """Return the kind."""
        kind = values.get("kind")
        return kind if isinstance(kind, str) and kind in cls.modes else "ngrams"


class OwnNgrams(OwnJudge, _Ngrams, mode="ngrams"):
    """A judge of hashed n-grams; wrong labels need more regularization than those of people."""

    inverse_penalty: float = Field(default=1.0, gt=0, description="n-grams: C of the logistic regression")
    with_prompt: bool = Field(default=True, description="n-grams: read the prompt's words too")


class OwnProbe(_Probe, OwnJudge, mode="probe"):
    """A frozen model's mean hidden state of an answer, with a logistic regression."""


class JudgeCheckConfig(StageConfig, Executed):
    """`bfpo judge-check`: compare a judge's verdicts with people's labels."""

    judge: JudgeConfig = Field(description="the judge: oracle, a folder of judge-train, FORMAT[:MODEL] or a section")
    data: LabelledConfig = Field(description="labelled completions, not those that the judge was trained on")
    limit: int | None = Field(default=None, ge=1, description="number of texts, drawn at random with seed; null = all")
    label_cache: PathText | None = Field(
        default=None,
        description="folder where verdicts are kept, for this run and others; null = bfpo/label in the user's cache",
    )
    max_requests: MaxRequests = None
    mistakes: int = Field(default=20, ge=0, description="number of worst mistakes that are shown")
    confidence: float = Field(default=0.95, gt=0, lt=1, description="level of the intervals")
    bootstrap_samples: int = Field(default=2000, ge=100, description="number of bootstrap resamples")
    seed: int = Field(default=0, ge=0, description="seed of the bootstrap and of limit")
    threads: int | None = Field(default=None, ge=1, description="CPU threads of torch; null = torch's own choice")

    needs: ClassVar[Mapping[str, Need]] = {
        "max_requests": Need("by a judge without url", lambda config: isinstance(config.judge, ServerSpec)),
        "executor": Need("without a judge that loads a model", lambda config: loads_model(config.judge)),
    }

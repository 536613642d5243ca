"""Config of `bfpo tamper`: a short LoRA attack on models, and what they are asked after it."""

from __future__ import annotations

from math import gcd
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, create_model, model_validator

from bfpo.config.evaluate import EvaluateConfig
from bfpo.config.suites import CoherenceConfig, SuitesConfig
from bfpo.config.train import SftConfig
from bfpo.core.settings import ConfigPart, PathText, StageConfig
from bfpo.data.settings import SftDataConfig
from bfpo.data.thinking import ThinkingKey
from bfpo.policy.settings import LoraConfig

__all__ = ["TamperConfig", "TamperedModel"]

_OF_SFT = (
    "completions_per_step",
    "completions_per_microbatch",
    "max_tokens_per_microbatch",
    "attention",
    "dtype",
    "gradient_checkpointing",
    "chat_template",
    "chat_template_kwargs",
    "allow_template_changes",
    "allow_rendered_text",
    "max_length",
    "max_completion_length",
    "weight_decay",
    "max_grad_norm",
    "seed",
    "threads",
)

if TYPE_CHECKING:

    class _SftKeys(StageConfig):
        completions_per_step: int
        dtype: str
        chat_template: str | None
        chat_template_kwargs: dict[str, Any]
        seed: int
        threads: int | None

else:
    _fields = {name: SftConfig.model_fields[name] for name in _OF_SFT}
    _SftKeys = create_model(
        "_SftKeys", __base__=StageConfig, **{name: (info.annotation, info) for name, info in _fields.items()}
    )


class TamperedModel(ConfigPart):
    """A model that is attacked."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=60, description="name in figures, files and reports"
    )
    model: PathText = Field(description="model: folder or hub id")
    revision: str | None = Field(default=None, description="revision (commit, tag or branch) of a model on the hub")


class TamperConfig(_SftKeys):
    """`bfpo tamper`: a few LoRA steps on data that undo a model's safety, and what is left of it after each."""

    models: list[TamperedModel] = Field(
        min_length=1, description="models that are attacked, each alike; the first is the one others are compared with"
    )
    attack: Literal["harmful", "benign"] = Field(
        description="what the data is, as it is reported: harmful = harmful requests that are fulfilled, benign = "
        "harmless ones; data that contradicts it is warned of"
    )
    data: SftDataConfig = Field(description="completions to imitate, or pairs of which some completions are imitated")
    steps: list[int] = Field(
        default=[0, 5, 10, 25, 50],
        description="optimizer steps after which the model is asked, from 0; one training, at a constant learning rate",
    )
    seeds: int = Field(default=1, ge=1, description="number of attacks on each model, from seed on; rates are pooled")
    lora: LoraConfig = Field(default=LoraConfig(), description="adapters that train")
    learning_rate: float = Field(default=2e-4, gt=0, description="learning rate, constant and without warm-up")
    suites: SuitesConfig = Field(description="suites that the model is asked after each number of steps")
    coherence: CoherenceConfig | None = Field(
        default=None, description="start model by which answers of unlikely text are found too; null = from the text"
    )
    confidence: float = Field(default=0.95, gt=0, lt=1, description="level of the intervals")
    thinking: ThinkingKey = None

    @model_validator(mode="after")
    def _fits_together(self) -> TamperConfig:
        names = [model.name for model in self.models]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"models: {', '.join(repeated)} appears twice; names must differ")
        if len(self.steps) < 2 or self.steps != sorted(set(self.steps)) or self.steps[0] != 0:
            raise ValueError(
                f"steps: got {self.steps}; needed: ascending numbers of steps, each once: 0 (the model itself) and more"
            )
        if unread := [key for key in ("ranker", "baseline", "alpaca_eval", "reuse") if getattr(self.suites, key)]:
            raise ValueError(f"suites.{unread[0]}: not read by tamper, which asks one model at a time; leave it out")
        self.attack_on(self.models[0], self.seed)
        return self

    def attack_on(self, model: TamperedModel, seed: int) -> SftConfig:
        """Return the training of the attack, with a checkpoint at least after each of `steps`."""
        shared = {name: getattr(self, name) for name in _OF_SFT}
        return SftConfig.model_validate(
            {
                **shared,
                "model": model.model,
                "revision": model.revision,
                "data": self.data,
                "lora": self.lora,
                "learning_rate": self.learning_rate,
                "lr_scheduler_type": "constant",
                "warmup_steps": 0.0,
                "max_steps": self.steps[-1],
                "save_steps": gcd(*self.steps),
                "save_total_limit": None,
                "logging_steps": 1,
                "seed": seed,
            }
        )

    def evaluation_of(self, model: str, name: str, revision: str | None = None) -> EvaluateConfig:
        """Return the evaluation of a model after an attack, or before it."""
        coherence = self.coherence
        if coherence is not None:
            own = next((one for one in self.models if one.name == coherence.model), None)
            coherence = CoherenceConfig(model=own.model, revision=own.revision) if own else coherence
        return EvaluateConfig.model_validate(
            {
                "models": [{"name": name, "model": model, "revision": revision}],
                "suites": self.suites,
                "coherence": coherence,
                "confidence": self.confidence,
                "thinking": self.thinking,
                "dtype": self.dtype,
                "chat_template": self.chat_template,
                "chat_template_kwargs": self.chat_template_kwargs,
                "seed": self.seed,
                "threads": self.threads,
            }
        )

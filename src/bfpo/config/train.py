"""Configs of the two training stages. Defaults of `bfpo train` are the published settings (arXiv 2408.15313)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, create_model, model_validator

from bfpo.config.best import OF_COMPLETIONS, OF_PAIRS, BestConfig
from bfpo.config.probe import ProbeConfig
from bfpo.core.hub import check_repository
from bfpo.core.settings import Need, OneOrMany, PathText, Seed, StageConfig, beside, unless
from bfpo.data.pair_layouts import UNPAIRED
from bfpo.data.settings import SftDataConfig, TemplateKwargs, TrainDataConfig
from bfpo.objective.methods import METHODS, Method, make_method, method_settings
from bfpo.policy.settings import InitConfig, LoraConfig

__all__ = ["SCHEDULES", "TRACKERS", "AlignConfig", "MethodSettings", "ReferenceConfig", "SftConfig", "TrainingKeys"]

TRACKERS = (
    *("azure_ml", "clearml", "codecarbon", "comet_ml", "dagshub", "dvclive", "flyte", "kubeflow", "mlflow", "neptune"),
    *("swanlab", "tensorboard", "trackio", "wandb"),
)
"""Trackers that transformers integrates, by its names."""
SCHEDULES = (
    *("linear", "cosine", "cosine_with_restarts", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "polynomial"),
    *("constant", "constant_with_warmup", "inverse_sqrt", "warmup_stable_decay"),
)
"""Courses of the learning rate by the step alone, by their names in transformers."""


class TrainingKeys(StageConfig):
    """Keys shared by both training stages; optimizer keys have the names of `transformers.TrainingArguments`."""

    revision: str | None = Field(default=None, description="revision (commit, tag or branch) of a model on the hub")
    dtype: Literal["float32", "bfloat16", "float64"] = Field(
        default="float32",
        description="number type of weights and computation; under bfloat16 what trains is held in float32",
    )
    gradient_checkpointing: bool | Literal["selective"] = Field(
        default=False,
        description="recompute activations in the backward pass to save memory: true = all within a block; selective = "
        "all but the results of matrix products and attention, which costs little time",
    )
    trainable: Literal["all"] | list[str] = Field(
        default="all", description="parameters that train: all, or patterns such as '*.down_proj.weight'"
    )
    lora: LoraConfig | None = Field(default=None, description="train LoRA adapters in place of weights; null = none")
    quantize: Literal["nf4"] | None = Field(
        default=None, description="hold the frozen weights in four bits under the adapters (QLoRA; extra quant)"
    )
    chat_template: PathText | None = Field(
        default=None,
        description="file with a Jinja chat template; null = the tokenizer's own, else the documented default",
    )
    chat_template_kwargs: TemplateKwargs = Field(default={})
    allow_template_changes: bool = Field(
        default=False,
        description="text of the rows that the chat template deletes or moves is counted; false = it stops the run",
    )
    allow_rendered_text: bool = Field(
        default=False,
        description="control tokens of a rendered chat in the texts of the rows are taken as text and counted; false = "
        "they stop the run where half of the rows have them",
    )
    max_length: int = Field(
        default=1024, ge=2, description="longest prompt + completion in tokens; prompts are cut first"
    )
    max_completion_length: int | None = Field(
        default=None, ge=1, description="longest completion in tokens; null = max_length"
    )
    token_cache: PathText | None = Field(
        default=None,
        description="folder of token ids that several runs share; null = tokens/ of the run, for itself",
    )
    max_tokens_per_microbatch: int = Field(
        default=8192,
        ge=1,
        description="most tokens of a forward pass and process; a longer pair or completion gets a separate pass",
    )
    attention: Literal["auto", "packed", "padded"] = Field(
        default="auto",
        description="packed rows, in which texts follow one another and a pair shares its prompt, or padded ones; auto "
        "= packed where the model can",
    )

    learning_rate: float = Field(default=1e-5, gt=0, description="peak learning rate")
    lr_scheduler_type: Literal[SCHEDULES] = Field(  # type: ignore[valid-type]
        default="cosine",
        description="course of the learning rate after warm-up; its settings are trainer_args.lr_scheduler_kwargs",
    )
    warmup_steps: float = Field(
        default=0.1,
        ge=0,
        description="warm-up in optimizer steps; below 1, a share of all optimizer steps; the first step learns too; a "
        "constant schedule has none",
    )
    num_train_epochs: float = Field(
        default=1.0, gt=0, description="passes over the data; not read where max_steps is set"
    )
    max_steps: int | None = Field(default=None, ge=1, description="optimizer steps; null = as num_train_epochs says")
    optim: str = Field(
        default="adamw_torch_fused",
        description="optimizer, by its name in transformers: adamw_torch_fused, adamw_bnb_8bit (extra quant), "
        "adafactor, ...",
    )
    weight_decay: float = Field(default=0.0, ge=0, description="weight decay of the optimizer")
    max_grad_norm: float = Field(default=1.0, ge=0, description="gradient norm is clipped to this; 0 = no clipping")
    seed: Seed = Field(default=42, description="seed of the order of the data and of dropout")

    eval_steps: int | None = Field(
        default=None, ge=1, description="optimizer steps between evaluations on eval_data; null = only at the end"
    )
    best: BestConfig | None = Field(
        default=None, description="held-out metric by which a checkpoint is kept; null = the last step is"
    )
    save_steps: int = Field(default=500, ge=1, description="optimizer steps between checkpoints")
    save_total_limit: int | None = Field(default=1, ge=1, description="number of checkpoints kept; null = all")
    logging_steps: int = Field(default=10, ge=1, description="optimizer steps between rows of metrics.jsonl")
    report_to: Annotated[list[Literal[TRACKERS]], OneOrMany] = Field(  # type: ignore[valid-type]
        default_factory=list, description="trackers that get the rows of metrics.jsonl, one or a list"
    )
    project: str | None = Field(
        default=None,
        min_length=1,
        description="project of wandb and trackio, experiment of mlflow; null = what their variables name, else bfpo",
    )
    run_name: str | None = Field(
        default=None, min_length=1, description="name of the run in trackers; null = that of its folder"
    )
    run_tags: Annotated[list[str], OneOrMany] = Field(
        default_factory=list,
        description="tags of the run in wandb, mlflow, trackio and tensorboard, and on the model card, one or a list",
    )
    push_to_hub: Annotated[str, AfterValidator(check_repository)] | None = Field(
        default=None,
        description="repository of the hub, ORG/NAME, to which the model is pushed at the end",
    )
    hub_private_repo: bool | None = Field(
        default=None,
        description="whether a new repository is private; null = as its owner has it on the hub, mostly public",
    )
    trainer_args: dict[str, Any] = Field(
        default_factory=dict,
        description="further fields of transformers.TrainingArguments, such as {adam_beta2: 0.95}",
    )
    threads: int | None = Field(default=None, ge=1, description="CPU threads of torch; null = torch's own choice")
    probe: ProbeConfig | None = Field(
        default=None, description="prompts that the model answers during training; null = its behaviour is not watched"
    )

    held_out_metrics: ClassVar[tuple[str, ...]] = OF_COMPLETIONS

    needs: ClassVar[Mapping[str, Need]] = {
        "warmup_steps": Need(
            "where lr_scheduler_type is constant (constant_with_warmup has a warm-up)",
            # The default stands in the config of every run, and says nothing.
            lambda config: (
                config.lr_scheduler_type != "constant"
                or config.warmup_steps in (0, type(config).model_fields["warmup_steps"].default)
            ),
            "lr_scheduler_type",
            lambda value: value == "constant",
        ),
        "trainable": unless("lora"),
        "num_train_epochs": unless("max_steps"),
        "project": beside("report_to"),
        "run_name": beside("report_to"),
        "hub_private_repo": beside("push_to_hub"),
    }

    @model_validator(mode="after")
    def _keys_fit(self) -> TrainingKeys:
        if self.quantize is not None and self.lora is None:
            raise ValueError("quantize: needs lora; four bits cannot train, adapters above them can")
        if self.eval_steps is not None and getattr(self, "eval_data", None) is None:
            raise ValueError("eval_steps: not read without eval_data; give eval_data or leave eval_steps out")
        if self.best is not None:
            if self.eval_steps is None:
                raise ValueError("best: needs evaluations to compare; give eval_data and eval_steps")
            if self.best.metric not in self.held_out_metrics:
                allowed = ", ".join(self.held_out_metrics)
                raise ValueError(f"best.metric: got {self.best.metric!r}; allowed here: {allowed}")
            if self.probe is not None and self.probe.best is not None:
                raise ValueError("best, probe.best: two rules for the model that is kept; give one of them")
        return self


class SftConfig(TrainingKeys):
    """`bfpo sft`: train a model to imitate completions, the start and the reference of `bfpo train`."""

    model: PathText | None = Field(default=None, description="model to start from: folder or hub id; or give init")
    init: InitConfig | None = Field(default=None, description="start from random weights in place of model")
    data: SftDataConfig = Field(description="completions to imitate")
    eval_data: SftDataConfig | None = Field(default=None, description="held-out completions, for the evaluation loss")
    completions_per_step: int = Field(default=32, ge=1, description="number of completions per optimizer step")
    completions_per_microbatch: int | None = Field(
        default=None,
        ge=1,
        description="most completions of a forward pass and process; null = as many as max_tokens_per_microbatch takes",
    )

    @model_validator(mode="after")
    def _one_start(self) -> SftConfig:
        if (self.model is None) == (self.init is None):
            raise ValueError("model, init: exactly one of the two must be given")
        if self.init is not None:
            for key, value in (("revision", self.revision), ("lora", self.lora), ("quantize", self.quantize)):
                if value is not None:
                    raise ValueError(f"{key}: not read where init is set; leave one of the two out")
            if self.trainable != "all":
                raise ValueError("trainable: with init (random weights) only 'all' is allowed")
        return self


if TYPE_CHECKING:

    class _MethodKeys(StageConfig):
        method: str
        reduction: Literal["sum", "mean"]

else:
    _MethodKeys = create_model(
        "_MethodKeys",
        __base__=StageConfig,
        method=(Literal[tuple(METHODS)], Field(default="bfpo", description="the loss")),
        **{
            name: (
                Literal[each.choices] if each.choices else float,
                Field(default=each.default, description=each.description, **each.bounds),
            )
            for name, each in method_settings().items()
        },
        reduction=(
            Literal["sum", "mean"],
            Field(
                default="sum", description="log-probs of a completion: summed over its tokens (the paper) or their mean"
            ),
        ),
    )


class MethodSettings(_MethodKeys):
    """The method and its settings, made from the classes of `METHODS`; a setting of another method is refused."""

    def method_object(self) -> Method:
        """Return the method; raises `SettingError` for a setting that is given and not one of its own."""
        own = METHODS[self.method].settings().keys()
        given = self.model_fields_set & method_settings().keys()
        return make_method(self.method, **{name: getattr(self, name) for name in own | given})

    def idle(self) -> frozenset[str]:
        """Return also the settings of other methods."""
        return super().idle() | (method_settings().keys() - METHODS[self.method].settings().keys())

    @model_validator(mode="after")
    def _settings_of_the_method(self) -> MethodSettings:
        self.method_object()
        return self


_SHIFTED = ", ".join(name for name, method in METHODS.items() if method.shifted)
_WITHOUT_CACHE = ("swap", "adapter_off")  # values of `reference` that neither read the cache nor add to it
_READ_BY_REFERENCE = frozenset(
    {"model", "revision", "dtype", "trainable", "lora", "quantize", "data", "buffer", "eval_data", "chat_template"}
    | {"chat_template_kwargs", "allow_template_changes", "allow_rendered_text"}
    | {"max_length", "max_completion_length", "seed", "threads", "reference_cache", "attention", "token_cache"}
    | {"max_tokens_per_microbatch", "method", *method_settings(), "reduction", "margin_model"}
)


class AlignConfig(MethodSettings, TrainingKeys):
    """`bfpo train`: train a model on preference pairs with safety labels."""

    model: PathText = Field(description="model to train, also the frozen reference: folder or hub id")
    margin_model: PathText | None = Field(
        default=None,
        description=f"model of safety whose margins {_SHIFTED} reads, trained with dpo_s from model at the same beta",
    )
    reference: Literal["auto", "swap", "precompute", "adapter_off"] = Field(
        default="auto",
        description="where reference log-probs come from: a pass with the first weights swapped in, one computation "
        "before training, or the model with its LoRA adapter off",
    )
    reference_cache: PathText | None = Field(
        default=None,
        description="folder where computed reference log-probs are kept for other runs; null = bfpo/reference in the "
        "user's cache folder",
    )
    data: TrainDataConfig = Field(description="main stream: pairs with safety labels; it sets the epoch")
    buffer: TrainDataConfig | None = Field(
        default=None, description="second stream, as many pairs a step as the main one; null = none"
    )
    buffer_weight: float = Field(
        default=1.0, gt=0, description="weight of the buffer's mean loss beside the main stream's"
    )
    eval_data: TrainDataConfig | None = Field(
        default=None, description="held-out pairs, for loss and accuracy by label cell"
    )
    anchor_weight: float = Field(
        default=0.0,
        ge=0,
        description="weight of the favoured completion's mean token NLL, where it is safe, beside loss x beta^2",
    )
    anchor_scale: Literal["loss", "gradient"] = Field(
        default="loss",
        description="what anchor_weight is relative to: the normalised loss, or its gradient at the start, of which a "
        "weight is the same share for every method",
    )
    pairs_per_step: int = Field(
        default=32, ge=1, description="number of pairs of each stream per optimizer step, all processes"
    )
    trainable: Literal["all"] | list[str] = Field(
        default=["*.down_proj.weight"],
        description="parameters that train: all, or patterns such as '*.down_proj.weight'",
    )
    learning_rate: float = Field(default=5e-7, gt=0, description="peak learning rate")

    held_out_metrics: ClassVar[tuple[str, ...]] = OF_PAIRS

    needs: ClassVar[Mapping[str, Need]] = {
        **TrainingKeys.needs,
        "buffer_weight": beside("buffer"),
        "anchor_scale": Need("where anchor_weight is 0", lambda config: config.anchor_weight > 0),
        "reference_cache": Need(
            f"where reference is {' or '.join(_WITHOUT_CACHE)}", lambda config: config.reference not in _WITHOUT_CACHE
        ),
        "margin_model": Need(f"by methods other than {_SHIFTED}", lambda config: METHODS[config.method].shifted),
    }

    @model_validator(mode="after")
    def _streams(self) -> AlignConfig:
        if METHODS[self.method].shifted and self.margin_model is None:
            raise ValueError(
                f"margin_model: {self.method} needs a model of safety, as bfpo train with method dpo_s makes it"
            )
        for name in ("data", "buffer", "eval_data"):
            section: TrainDataConfig | None = getattr(self, name)
            if section is not None and section.layout == UNPAIRED and not METHODS[self.method].pointwise:
                pointwise = ", ".join(name for name, method in METHODS.items() if method.pointwise)
                raise ValueError(
                    f"{name}.layout: {UNPAIRED} is for single answers, and the method {self.method!r} compares two "
                    f"answers to a prompt; give pairs, or set method to one of {pointwise}"
                )
        if self.lora is not None and self.lora.lora_dropout > 0:
            raise ValueError(
                f"lora_dropout: got {self.lora.lora_dropout:g}; allowed here: 0, preference training has every dropout "
                "off so that the first margins are 0"
            )
        if self.reference == "adapter_off" and self.lora is None:
            raise ValueError("reference: 'adapter_off' needs lora; allowed without it: auto, swap, precompute")
        return self


class ReferenceConfig(AlignConfig):
    """`bfpo reference`: fill the cache of reference log-probs; takes the config file of `bfpo train` as it is."""

    def idle(self) -> frozenset[str]:
        """Return also the keys that only training reads."""
        return super().idle() | (frozenset(type(self).model_fields) - _READ_BY_REFERENCE)

    @model_validator(mode="after")
    def _fills_what_is_read(self) -> ReferenceConfig:
        if self.reference in _WITHOUT_CACHE:
            raise ValueError(
                f"reference: with {self.reference!r} training does not read the cache that this command fills; set "
                "auto or precompute"
            )
        return self

"""Configs of labelling and red-teaming: judges, ranker, and how several opinions become one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from bfpo.config.evaluate import GenerateConfig, ServerGenerate, TransformersGenerate, VllmGenerate
from bfpo.config.suites import CoherenceConfig
from bfpo.core.settings import Need, PathText, StageConfig, beside
from bfpo.data.settings import PairRowsConfig, TemplateKwargs
from bfpo.data.thinking import ThinkingKey
from bfpo.execution.settings import Executed
from bfpo.generation.settings import MaxRequests, ServerSpec
from bfpo.judges.settings import JudgeConfig, RankerConfig, ServedGuardSpec, loads_model

__all__ = [
    "Judges",
    "LabelCache",
    "LabelConfig",
    "LeastVotes",
    "OpinionKeys",
    "PanelRule",
    "RedteamConfig",
    "Votes",
    "check_votes",
]


def _one_or_many(value: object) -> object:
    return value if isinstance(value, list) else [value]


_WHO_JUDGES = (
    "who judges: one or a list, each in its short form (oracle, FORMAT, FORMAT:MODEL, a folder of `bfpo judge-train`, "
    "a .yaml file) or as keys"
)
_Judges = Annotated[list[JudgeConfig], BeforeValidator(_one_or_many)]
Judges = Annotated[_Judges, Field(min_length=1, description=_WHO_JUDGES)]
Votes = Annotated[int, Field(ge=1, description="times that a judge with temperature above 0 is asked about a text")]
LeastVotes = Annotated[int, Field(ge=1, description="fewest scored votes, of all judges together; fewer = unscored")]
PanelRule = Annotated[
    Literal["majority", "any_unsafe", "mean"],
    Field(description="when several judges say safe: more than half of them, all of them, or their mean p(safe) > 0.5"),
]
LabelCache = Annotated[
    PathText | None,
    Field(
        description="folder where verdicts and comparisons are kept, for this run and others; null = bfpo/label in the "
        "user's cache folder"
    ),
]


def check_votes(judges: Sequence[JudgeConfig], votes: int, min_votes: int) -> None:
    """Raise `ValueError` for several votes of judges whose verdicts do not vary, or more wanted than they have."""
    sampled = sum(isinstance(judge, ServedGuardSpec) and judge.temperature > 0 for judge in judges)
    if votes > 1 and not sampled:
        raise ValueError(
            f"votes: got {votes}; the verdicts of these judges do not vary. Allowed: 1, or a judge behind a "
            "server (url) with temperature above 0"
        )
    most = len(judges) - sampled + sampled * votes
    if min_votes > most:
        raise ValueError(f"min_votes: got {min_votes}; allowed: at most {most}, the number of votes")


class OpinionKeys(StageConfig, Executed):
    """Judges and ranker, how several opinions become one, and how ranked completions become pairs."""

    judges: Judges
    ranker: RankerConfig | None = Field(
        default=None,
        description="ranker that says which of two completions of a prompt is more helpful; null = no ranker",
    )
    votes: Votes = 1
    min_votes: LeastVotes = 1
    rule: PanelRule = "majority"
    strategy: Literal["informative", "balanced", "random"] = Field(
        default="informative",
        description="which pairs of a prompt's ranked completions are taken: the most confident pair of each label "
        "cell, one of the cell with the fewest pairs so far, or any",
    )
    pairs_per_prompt: int | None = Field(
        default=None, ge=1, description="most pairs of a prompt; null = one of each label cell that it has"
    )
    incoherent: Literal["drop", "keep"] = Field(
        default="drop", description="completions that are no coherent text give no pair, or are taken as all others"
    )
    soft_labels: bool = Field(default=False, description="label pairs with p(safe) in place of true and false")
    label_cache: LabelCache = None
    max_requests: MaxRequests = None

    needs: ClassVar[Mapping[str, Need]] = {
        "rule": Need("without several judges", lambda config: len(config.judges) > 1),
        "max_requests": Need("without a url", lambda config: config.has_server()),
    }

    def has_server(self) -> bool:
        """Return whether a judge or the ranker is behind a server."""
        return any(isinstance(part, ServerSpec) for part in (*self.judges, self.ranker))

    def loads_model(self) -> bool:
        """Return whether a judge or the ranker is a model that is loaded here."""
        return any(loads_model(part) for part in (*self.judges, self.ranker))

    @model_validator(mode="after")
    def _votes_can_differ(self) -> OpinionKeys:
        if self.judges:
            check_votes(self.judges, self.votes, self.min_votes)
        return self


class LabelCoherence(CoherenceConfig):
    """A model under which answers that it finds unlikely are not coherent, and how it is loaded."""

    model: PathText = Field(description="start model: folder or hub id")
    dtype: Literal["float32", "bfloat16", "float16", "float64", "auto"] = Field(
        default="auto", description="number type that holds the weights; auto = as `bfpo generate` holds them"
    )
    chat_template: PathText | None = Field(
        default=None, description="file with a Jinja chat template; null = the tokenizer's own, else the default"
    )
    chat_template_kwargs: TemplateKwargs = Field(default={})


class LabelConfig(OpinionKeys):
    """`bfpo label`: verdicts on completions, or safety labels of pairs; with a ranker also an order."""

    completions: PathText | None = Field(
        default=None, description="completions.jsonl of `bfpo generate` to judge; or give data"
    )
    data: PairRowsConfig | None = Field(default=None, description="pairs whose safety labels are filled")
    coherence: LabelCoherence | None = Field(
        default=None,
        description="model by which completions of unlikely text are found too; null = empty, looping and off-language "
        "ones, from the text alone",
    )
    relabel: bool = Field(
        default=False, description="replace known labels of pairs too, and report the agreement with them"
    )
    confidence: float = Field(default=0.95, gt=0, lt=1, description="level of the intervals of agreement")
    bootstrap_samples: int = Field(
        default=2000, ge=1, description="number of resamples (of prompts) behind the interval of a kappa"
    )
    seed: int = Field(default=0, ge=0, description="seed of the resampling and of data.limit")
    threads: int | None = Field(default=None, ge=1, description="CPU threads of torch; null = torch's own choice")
    thinking: ThinkingKey = None

    needs: ClassVar[Mapping[str, Need]] = {
        **OpinionKeys.needs,
        "executor": Need(
            "without a judge, ranker or coherence that loads a model",
            lambda config: config.loads_model() or config.coherence,
        ),
        "completions": Need("where data is set", lambda config: config.data is None),
        "data": beside("data"),
        "coherence": beside("completions"),
        "relabel": beside("data"),
        "soft_labels": Need("without data or a ranker", lambda config: config.data or config.ranker),
        **dict.fromkeys(
            ("strategy", "pairs_per_prompt", "incoherent"),
            Need("without completions and a ranker", lambda config: config.data is None and config.ranker),
        ),
    }

    @model_validator(mode="after")
    def _one_input(self) -> LabelConfig:
        if self.completions is None and self.data is None:
            raise ValueError("completions, data: exactly one of the two must be given")
        return self


class RedteamConfig(GenerateConfig, OpinionKeys):
    """`bfpo redteam`: prompts -> completions -> verdicts and order -> pairs, as `bfpo prepare` writes them.

    With `harmless` alone it makes a buffer, for which nobody judges or ranks.
    """

    prompts: PathText | None = Field(  # type: ignore[assignment]
        default=None,
        description="harmful prompts: a .txt with one per line, or a file or folder of our columns or of an evaluation "
        "suite's; null = none, harmless ones alone make a buffer",
    )
    num_completions: int = Field(default=4, ge=2, description="number of completions per prompt; the paper takes 2")
    temperature: Annotated[float, Field(ge=0)] | Literal["auto"] = Field(  # type: ignore[assignment]
        default="auto",
        description="sampling temperature; auto = the highest of 1, 0.7, 0.5 and 0.3 at which the model's answers to a "
        "few prompts stay coherent",
    )
    harmless: PathText | None = Field(
        default=None,
        description="harmless prompts, asked too: needless refusals become pairs of the buffer, below an answer that "
        "complies; or a run of `bfpo generate` with the model's answers to them",
    )
    harmless_columns: dict[str, str | None] = Field(
        default_factory=dict, description="our column name: its name in the file of harmless prompts"
    )
    start: PathText | None = Field(
        default=None,
        description="start model, whose greedy answers are the chosen side of the buffer's pairs where they comply: "
        "folder or hub id, or a run of `bfpo generate` with its answers; null = other answers of model alone",
    )
    start_revision: str | None = Field(default=None, description="revision (commit, tag or branch) of start on the hub")
    judges: _Judges = Field(default_factory=list, description=f"{_WHO_JUDGES}; needed beside prompts")
    ranker: RankerConfig | None = Field(
        default=None,
        description="ranker that says which of two completions of a prompt is more helpful; needed beside prompts",
    )
    validation: float = Field(
        default=0.0, ge=0, lt=1, description="share of the prompts whose pairs are held out (the validation split)"
    )
    max_requests: MaxRequests = None
    threads: int | None = Field(default=None, ge=1, description="CPU threads of torch; null = torch's own choice")
    confidence: float = Field(default=0.95, gt=0, lt=1, description="level of the intervals in the report")

    needs: ClassVar[Mapping[str, Need]] = {
        **OpinionKeys.needs,
        **dict.fromkeys(("columns", "judges", "ranker", "votes", "min_votes", "strategy"), beside("prompts")),
        **dict.fromkeys(("pairs_per_prompt", "incoherent", "soft_labels", "label_cache"), beside("prompts")),
        "executor": Need(
            "without a model that is loaded here", lambda config: config.engine != "server" or config.loads_model()
        ),
        "max_requests": Need("without a url", lambda config: config.has_server() or config.engine == "server"),
        **dict.fromkeys(("harmless_columns", "start"), beside("harmless")),
        "start_revision": beside("start"),
    }

    @model_validator(mode="after")
    def _prompts_are_judged_and_ranked(self) -> RedteamConfig:
        if self.prompts is None and self.harmless is None:
            raise ValueError(
                "prompts, harmless: both are missing; give harmful prompts with judges and ranker, harmless ones whose "
                "needless refusals make a buffer, or both"
            )
        if missing := [name for name in ("judges", "ranker") if self.prompts is not None and not getattr(self, name)]:
            raise ValueError(
                f"{', '.join(missing)}: missing beside prompts ({self.prompts}), whose answers are judged and ranked; "
                "give them, or harmless without prompts for a buffer alone"
            )
        return self


class TransformersRedteam(RedteamConfig, TransformersGenerate, mode="transformers"):
    """A model that transformers runs here."""


class VllmRedteam(RedteamConfig, VllmGenerate, mode="vllm"):
    """A model that vLLM runs here."""

    several_gpus: ClassVar[bool] = False  # judges have one


class ServerRedteam(RedteamConfig, ServerGenerate, mode="server"):
    """A model behind a server."""

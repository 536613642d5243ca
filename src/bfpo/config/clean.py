"""Config of `bfpo clean`: who checks the labels of pairs, and what is done to a label that is contradicted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from bfpo.config.judges import OwnJudge, OwnNgrams
from bfpo.config.label import Judges, LabelCache, LeastVotes, PanelRule, Votes, check_votes
from bfpo.core.settings import ConfigPart, Need, PathText, Seed, StageConfig, beside, unless
from bfpo.data.settings import PairRowsConfig
from bfpo.data.thinking import ThinkingKey
from bfpo.execution.settings import Executed
from bfpo.generation.settings import MaxRequests, ServerSpec
from bfpo.judges.settings import FINDS_NO_HARM, loads_model

__all__ = ["CleanConfig"]

Policy = Literal["keep", "drop", "soften", "flip"]


class PolicyByLabel(ConfigPart):
    """What is done to a contradicted label, by what it says."""

    safe: Policy = Field(default="drop", description="where the label says safe and the judge says unsafe")
    unsafe: Policy = Field(default="drop", description="where the label says unsafe and the judge says safe")


def _for_both(value: object) -> object:
    return {"safe": value, "unsafe": value} if isinstance(value, str) else value


class CleanConfig(StageConfig, Executed):
    """`bfpo clean`: find the safety labels of pairs that a judge contradicts, and drop, soften or flip them."""

    data: PairRowsConfig = Field(description="pairs whose safety labels are checked")
    judges: Judges | None = Field(
        default=None, description="who checks the labels: one or a list, as in `bfpo label`; null = own"
    )
    own: OwnJudge = Field(
        default_factory=OwnNgrams,
        description="in place of judges, one that is trained on these labels: a cross-validation by prompt, in which "
        "no text is judged by a judge that was trained on its prompt",
    )
    policy: Annotated[PolicyByLabel, BeforeValidator(_for_both)] = Field(
        default=PolicyByLabel(),
        description="what is done to a contradicted label: keep (it is only reported), drop (its pair is left out), "
        "soften (it moves towards the judge's p(safe), by weight) or flip (it becomes the judge's); one word, or one "
        "for labels that say safe and one for those that say unsafe",
    )
    certainty: float | None = Field(
        default=None,
        ge=0.5,
        lt=1,
        description="least probability of the other label, by the judge, with which a label is contradicted; null = "
        "the mean that the judge gives to that label where it is given (confident learning)",
    )
    weight: float = Field(
        default=0.5, gt=0, le=1, description="soften: the judge's share of the new label, 1 = p(safe) itself"
    )
    people: PathText | None = Field(
        default=None,
        description="labels.jsonl of `bfpo annotate`: people's labels of some of these texts, with which the labels "
        "are compared before and after; null = none",
    )
    votes: Votes = 1
    min_votes: LeastVotes = 1
    rule: PanelRule = "majority"
    label_cache: LabelCache = None
    max_requests: MaxRequests = None
    confidence: float = Field(default=0.95, gt=0, lt=1, description="level of the intervals of agreement")
    bootstrap_samples: int = Field(
        default=2000, ge=1, description="number of resamples (of prompts) behind the interval of a kappa"
    )
    seed: Seed = Field(default=0, description="seed of the folds, of the resampling and of data.limit")
    threads: int | None = Field(default=None, ge=1, description="CPU threads of torch; null = torch's own choice")
    thinking: ThinkingKey = None

    needs: ClassVar[Mapping[str, Need]] = {
        "own": unless("judges"),
        **dict.fromkeys(("votes", "min_votes", "label_cache"), beside("judges")),
        "rule": Need("without several judges", lambda config: len(config.judges or ()) > 1),
        "max_requests": Need(
            "without a url", lambda config: any(isinstance(judge, ServerSpec) for judge in config.judges or ())
        ),
        "executor": Need("without judges that load a model", lambda config: any(map(loads_model, config.judges or ()))),
        "weight": Need(
            "without the policy soften", lambda config: "soften" in (config.policy.safe, config.policy.unsafe)
        ),
    }

    @model_validator(mode="after")
    def _judges_can_contradict(self) -> CleanConfig:
        if self.judges is not None:
            if all(judge.format == "refusal-phrases" for judge in self.judges):
                raise ValueError(f"judges: {FINDS_NO_HARM}")
            check_votes(self.judges, self.votes, self.min_votes)
        return self

"""The files with verdicts, scores and comparisons, also those of `sweep`, `compare` and `interpolate`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from bfpo.core.records import OPTIONAL
from bfpo.core.schema import JudgeFit, Score
from bfpo.stats import Interval

__all__ = [
    "AccuracyRow",
    "Blend",
    "ChosenOn",
    "CoherenceBound",
    "ComparedMethod",
    "ComparedWorld",
    "ComparisonFamily",
    "ComparisonFile",
    "Hypervolume",
    "InterpolateFile",
    "MethodDifference",
    "ModelComparison",
    "NearestPoint",
    "PairedDifference",
    "PeopleDifference",
    "PeopleFile",
    "PeopleRate",
    "ScoredOn",
    "ScoresFile",
    "TradeoffFile",
    "TradeoffPoint",
    "TriedSetting",
    "WorldChange",
    "WorldMethod",
    "WorldsFile",
]


@dataclass(frozen=True, slots=True)
class CoherenceBound:
    """The nats per token above which an answer is unlikely under a model, and its errors.

    `bound` is `None`, with the reason, if the model's own greedy answers are not more likely than their words in random
    order. `own_above`: share of the answers called unlikely; `salad_below`: share of the salad that is missed. Both are
    measured on the half of the prompts that the bound was not set on.
    """

    model: str = ""
    model_key: str = ""
    bound: float | None = None
    own_median: float | None = None
    own_highest: float | None = None
    salad_median: float | None = None
    own_above: Interval = field(default_factory=lambda: Interval(None, None, None, 0))
    salad_below: Interval = field(default_factory=lambda: Interval(None, None, None, 0))
    reason: str = field(default="", metadata=OPTIONAL)

    @property
    def halfway(self) -> float | None:
        """The nats per token between the medians of own answers and salad; a sample of the model above it is salad."""
        if self.bound is None or self.own_median is None or self.salad_median is None:
            return None
        return (self.own_median + self.salad_median) / 2


@dataclass(frozen=True, slots=True)
class PeopleRate:
    """A rate of one model from people's labels and the judge's verdicts (`powered_rate`), with its interval.

    `num_judged`: the judge's verdicts that the estimate uses, 0 if it gives none or they do not help. `people`,
    `people_low`, `people_high`: from the labels alone. `undecided`: answers whose annotators cannot tell.
    `judge_weight`: 0 if the judge does not help. `effective_labels`: labels with the same interval without a judge.
    `labels_needed`: more labels for +-5 points; `None` if all prompts together are too few.
    """

    suite: str
    model: str
    metric: str
    title: str = ""
    value: float | None = None
    low: float | None = None
    high: float | None = None
    num_labels: int = 0
    num_judged: int = 0
    num_prompts: int = 0
    undecided: int = 0
    people: float | None = None
    people_low: float | None = None
    people_high: float | None = None
    judge_weight: float = 0.0
    effective_labels: float = 0.0
    labels_needed: int | None = None
    higher_is_better: bool = True


@dataclass(frozen=True, slots=True)
class PeopleDifference:
    """First - second on the same prompts, by labels of both models and the judge; the rest as in `PeopleRate`."""

    suite: str
    metric: str
    title: str = ""
    first: str = ""
    second: str = ""
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    num_labels: int = 0
    num_judged: int = 0
    people: float | None = None
    people_low: float | None = None
    people_high: float | None = None


@dataclass(frozen=True, slots=True)
class PeopleFile:
    """What `labels` gave: the file, its labels, those of no answer here, rates, paired differences; what has none.

    `pools`: kind of prompt -> the suites that rates and differences with the suite "" are of.
    """

    labels: str = ""
    num_labels: int = 0
    num_unused: int = 0
    rates: list[PeopleRate] = field(default_factory=list)
    differences: list[PeopleDifference] = field(default_factory=list)
    left_out: list[str] | None = field(default=None, metadata=OPTIONAL)
    pools: dict[str, list[str]] | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True, slots=True)
class ScoresFile:
    """`scores.json` of `bfpo evaluate` over one model, and of `bfpo label`."""

    confidence: float = 0.0
    scores: list[Score] = field(default_factory=list)
    coherence: CoherenceBound | None = field(default=None, metadata=OPTIONAL)
    judge_fit: list[JudgeFit] | None = field(default=None, metadata=OPTIONAL)
    people: PeopleFile | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True, slots=True)
class AccuracyRow:
    """A row of `accuracy.jsonl`, one pair: its cell (chosen-rejected), the side that the method favours (+1 chosen, -1
    rejected, 0 neither), the target of `beta * margin` (`None` without one), and the margin in nats.

    `tie`: true for a margin within rounding of 0, else absent. `right`: whether the margin has the sign of the favoured
    side; `None` for a tie, and if no side is favoured.
    """

    pair_id: str
    prompt: str
    cell: str
    favoured: int
    target: float | None
    margin: float
    beta_margin: float
    tie: bool | None = field(default=None, metadata=OPTIONAL)
    right: bool | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.favoured and self.margin == 0:  # rows of before have no `tie`
            object.__setattr__(self, "tie", True)
        if self.favoured and not self.tie:
            object.__setattr__(self, "right", self.favoured * self.margin > 0)

    @property
    def credit(self) -> float | None:
        """Return 1 if right, 0 if wrong, 1/2 for a tie, as by chance; `None` if no side is favoured."""
        return None if not self.favoured else 0.5 if self.tie else float(bool(self.right))


# ------------------------------------------------------------------------------------------------ models compared


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """A difference over the same prompts with its interval, test and p-value; `p_holm` is corrected over its family."""

    difference: float | None = None
    low: float | None = None
    high: float | None = None
    num: int = 0
    num_prompts: int = 0
    test: str = ""
    p_value: float | None = None
    p_holm: float | None = None


@dataclass(frozen=True)
class _TwoModels:  # what is compared is a base class of its own, so that it comes first in the file
    metric: str
    first: str
    second: str


@dataclass(frozen=True, slots=True)
class ModelComparison(PairedDifference, _TwoModels):
    """First - second of a metric on the same prompts."""


@dataclass(slots=True)
class ComparisonFamily:
    """Comparisons corrected together, and the models that cannot be distinguished from the best one or from BFPO."""

    family: str = ""
    num: int = 0
    rows: list[ModelComparison] = field(default_factory=list)
    not_told_from_best: list[str] | None = field(default=None, metadata=OPTIONAL)
    not_told_from_bfpo: list[str] | None = field(default=None, metadata=OPTIONAL)


# ------------------------------------------------------------------------------------------------ bfpo sweep


@dataclass(frozen=True, slots=True)
class TradeoffPoint:
    """One model of a sweep."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    on_front: bool = False
    scores: dict[str, Score] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Hypervolume:
    """The area below the front and above `reference`, with its interval over `num` prompts."""

    value: float | None = None
    low: float | None = None
    high: float | None = None
    num: int = 0
    reference: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ChosenOn:
    """The validation prompts, and the chosen model's values on them."""

    num_prompts: int = 0
    scores: dict[str, float] = field(default_factory=dict)
    meets: bool = False
    missing: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ScoredOn:
    """The other prompts, and the chosen model's scores on them."""

    num_prompts: int = 0
    scores: dict[str, Score] = field(default_factory=dict)


@dataclass(slots=True)
class NearestPoint:
    """The model nearest to `at_least`; `meets` and `missing` are measured on the prompts not used for the choice."""

    at_least: dict[str, float] = field(default_factory=dict)
    name: str = ""
    meets: bool = False
    missing: dict[str, float] = field(default_factory=dict)
    held_out: bool = False
    validation_share: float = 0.0
    chosen_on: ChosenOn = field(default_factory=ChosenOn)
    told_on: ScoredOn = field(default_factory=ScoredOn)
    not_told_from: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class TradeoffFile:
    """`tradeoff.json` of `bfpo sweep`."""

    objectives: list[str] = field(default_factory=list)
    confidence: float = 0.0
    points: list[TradeoffPoint] = field(default_factory=list)
    not_measured: list[str] = field(default_factory=list)
    pareto_front: list[str] = field(default_factory=list)
    hypervolume: Hypervolume = field(default_factory=Hypervolume)
    comparisons: ComparisonFamily = field(default_factory=ComparisonFamily)
    nearest: NearestPoint | None = None


# ------------------------------------------------------------------------------------------------ bfpo compare


@dataclass(frozen=True, slots=True)
class MethodDifference:
    """A paired difference with its interval and its p-values."""

    value: float | None = None
    low: float | None = None
    high: float | None = None
    num: int = 0
    p_value: float | None = None
    p_holm: float | None = None


@dataclass(frozen=True, slots=True)
class TriedSetting:
    """A setting that was tried, and its share of helpful and safe answers to validation prompts."""

    setting: dict[str, Any]
    validation: float


@dataclass(slots=True)
class ComparedMethod:
    """One method of a comparison, all seeds together; `seed_values`: metric -> a value for each seed."""

    name: str
    title: str = ""
    trainings: int = 0
    scores: dict[str, Score] = field(default_factory=dict)
    seed_values: dict[str, list[float | None]] = field(default_factory=dict)
    setting: dict[str, Any] = field(default_factory=dict)
    bfpo_minus_this: MethodDifference | None = None
    accuracy: list[Score] = field(default_factory=list)
    trials: list[TriedSetting] = field(default_factory=list)
    best_minus_this: MethodDifference | None = None


@dataclass(frozen=True, slots=True)
class ComparisonFile:
    """`comparison.json` of `bfpo compare`."""

    config: dict[str, Any] = field(default_factory=dict)
    confidence: float = 0.0
    methods: list[ComparedMethod] = field(default_factory=list)
    objectives: list[str] = field(default_factory=list)
    pareto_front: list[str] = field(default_factory=list)
    best: str = ""
    comparisons: ComparisonFamily = field(default_factory=ComparisonFamily)
    seconds: float | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True, slots=True)
class WorldMethod:
    """The score of one method in one world, its value for each seed, and its chosen setting."""

    name: str
    title: str
    trainings: int
    score: Score
    seed_values: list[float | None]
    setting: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ComparedWorld:
    """One world of a comparison; `noise`: its one share of flips of both kinds, `None` for other dials."""

    name: str
    dials: dict[str, Any] = field(default_factory=dict)
    noise: float | None = None
    best: str = ""
    not_told_from_best: list[str] = field(default_factory=list)
    methods: list[WorldMethod] = field(default_factory=list)


@dataclass(frozen=True)
class _MethodInWorld:
    method: str
    world: str


@dataclass(frozen=True, slots=True)
class WorldChange(PairedDifference, _MethodInWorld):
    """The score of a method in a world minus that in the first world, on the same prompts and seeds."""


@dataclass(frozen=True, slots=True)
class WorldsFile:
    """`worlds.json` of `bfpo compare` in several worlds."""

    confidence: float = 0.0
    metric: str = ""
    worlds: list[ComparedWorld] = field(default_factory=list)
    changes: list[WorldChange] = field(default_factory=list)
    seconds: float | None = field(default=None, metadata=OPTIONAL)


# ------------------------------------------------------------------------------------------------ bfpo interpolate


@dataclass(frozen=True, slots=True)
class Blend:
    """An interpolated model: the weight of the second model, and its folder."""

    weight: float
    model: str = ""


@dataclass(frozen=True, slots=True)
class InterpolateFile:
    """`models.json` of `bfpo interpolate`."""

    first: str = ""
    second: str = ""
    models: list[Blend] = field(default_factory=list)

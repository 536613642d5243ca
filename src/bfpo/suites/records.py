"""The files of `bfpo evaluate` over suites: `scores.json` of several models, and `answers.jsonl`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from bfpo.core.records import OPTIONAL
from bfpo.core.schema import JudgeFit, Message, Score, Verdict
from bfpo.scores.records import CoherenceBound, PairedDifference, PeopleFile
from bfpo.stats import Interval

__all__ = [
    "DepthFile",
    "Divergence",
    "DivergencePoint",
    "DivergenceRow",
    "GateCondition",
    "GateFile",
    "GateGroup",
    "GatedModel",
    "GatedSuite",
    "GuardFacts",
    "InspectResult",
    "ModelFacts",
    "PrefillScore",
    "PrefilledSuite",
    "SuiteAnswer",
    "SuiteComparison",
    "SuiteFacts",
    "SuiteScore",
    "SuitesFile",
    "TamperChange",
    "TamperFile",
    "TamperScore",
    "TaskResult",
]


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """One evaluated model; `engine` and `url` only if bfpo does not load it itself.

    `guard_of`: the model of this run whose answers these are, as far as the guard does not block them.
    """

    name: str
    model: str = ""
    reference: str | None = None
    engine: str | None = field(default=None, metadata=OPTIONAL)
    url: str | None = field(default=None, metadata=OPTIONAL)
    guard_of: str | None = field(default=None, metadata=OPTIONAL)


@dataclass(slots=True)
class SuiteFacts:
    """One suite: its source, its judge, and whether it was scored; `reason`: why it was skipped.

    `too_long`: model -> number of prompts that were too long. `ideal`: whether the higher or lower value is better.
    `unscored`: model -> reason -> number of items without a value. `blocked`: model -> number of prompts that its
    server refuses to answer; they are unscored too. `left_out`: reason -> number of prompts that no model was asked.
    `trained_on`: model -> number of prompts that it was asked and trained on. Prompts are the documents or samples of a
    task. `guarded`: model behind a guard -> number
    of its answers that passed, were blocked by the `input` or the `output` filter, or on which the guard was undecided.
    `incoherent`: model -> reason -> number of its answers, with those that were "cut" at the token limit.
    """

    name: str
    title: str = ""
    kind: str = "generative"
    status: str = "scored"
    reason: str | None = None
    judge: str | None = None
    licence: str | None = None
    source: str | None = None
    revision: str | None = None
    prompts_sha256: str | None = None
    num_prompts: int | None = field(default=None, metadata=OPTIONAL)
    too_long: dict[str, int] | None = field(default=None, metadata=OPTIONAL)
    ideal: str | None = field(default=None, metadata=OPTIONAL)
    blocked: dict[str, int] | None = field(default=None, metadata=OPTIONAL)
    unscored: dict[str, dict[str, int]] | None = field(default=None, metadata=OPTIONAL)
    left_out: dict[str, int] | None = field(default=None, metadata=OPTIONAL)
    trained_on: dict[str, int] | None = field(default=None, metadata=OPTIONAL)
    guarded: dict[str, dict[str, int]] | None = field(default=None, metadata=OPTIONAL)
    incoherent: dict[str, dict[str, int]] | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True, slots=True)
class GuardFacts:
    """The guard of a run: judge, version, what it reads, p(unsafe) from which it blocks, and the text in its place."""

    judge: str = ""
    version: str = ""
    filter: str = ""
    at: float | None = None
    answer: str = ""


@dataclass(frozen=True)
class _Place:
    """The model and suite of a score; a base class, so that these keys come first in the file."""

    suite: str
    model: str


@dataclass(frozen=True, slots=True)
class SuiteScore(Score, _Place):
    """A score of one model on one suite."""


@dataclass(frozen=True)
class _OfSuite:
    suite: str
    metric: str
    first: str
    second: str


@dataclass(frozen=True, slots=True)
class SuiteComparison(PairedDifference, _OfSuite):
    """First - second of two models on the same prompts of a suite."""


# ------------------------------------------------------------------------------------------------ depth


@dataclass(frozen=True, slots=True)
class PrefillScore(SuiteScore):
    """A score of answers whose first `tokens` tokens were given.

    Metrics: `harmless` of the whole message, given tokens too; `coherent`, `harmless_coherent`; `recovered`: the
    model's own part declines, in full or in part; `harmless_given`: the given tokens alone, as a model would write that
    stops there.
    """

    tokens: int = 0


@dataclass(frozen=True, slots=True)
class PrefilledSuite:
    """The compliances of a suite: how many prompts have one, and why the others have none (`left_out`).

    Model -> number of given tokens -> number of prompts: `too_short`, whose compliance has fewer; `too_long`, for which
    the model has no room left, or which its template refuses: these are unscored.
    """

    suite: str
    title: str = ""
    judge: str | None = None
    num_prompts: int = 0
    num_compliances: int = 0
    left_out: dict[str, int] | None = field(default=None, metadata=OPTIONAL)
    too_short: dict[str, dict[str, int]] | None = field(default=None, metadata=OPTIONAL)
    too_long: dict[str, dict[str, int]] | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True, slots=True)
class DivergencePoint:
    """Mean KL of a model to the start, nats per token, at the positions `first` to `last` of an answer, from 1.

    `num`: answers that reach `first`.
    """

    first: int
    last: int
    value: float
    low: float | None = None
    high: float | None = None
    num: int = 0


@dataclass(frozen=True, slots=True)
class DivergenceRow:
    """A row of `divergence.jsonl`: the KL to the start at each token of one answer, nats."""

    suite: str
    model: str
    id: str
    group: str = ""
    kl: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Divergence:
    """KL of a model to the start by position, on one group of answers; `ranges` are of positions together.

    `first_five`: the share of the summed KL that is in the first five tokens.
    """

    model: str
    group: str
    num_answers: int = 0
    num_prompts: int = 0
    points: list[DivergencePoint] = field(default_factory=list)
    ranges: list[DivergencePoint] = field(default_factory=list)
    first_five: Interval | None = None


@dataclass(frozen=True, slots=True)
class DepthFile:
    """What `depth` measured; `source`: whose compliances or which file; `assist` and `top` as in the config.

    `reason`: why no answer was begun. `answers`: the answers on which KL is measured, start or own.
    """

    start: str
    source: str = field(default="", metadata=OPTIONAL)
    assist: str | None = field(default=None, metadata=OPTIONAL)
    top: int | None = field(default=None, metadata=OPTIONAL)
    reason: str = field(default="", metadata=OPTIONAL)
    prefilled: list[PrefilledSuite] | None = field(default=None, metadata=OPTIONAL)
    scores: list[PrefillScore] | None = field(default=None, metadata=OPTIONAL)
    comparisons: list[SuiteComparison] | None = field(default=None, metadata=OPTIONAL)
    answers: str = field(default="", metadata=OPTIONAL)
    divergence: list[Divergence] | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True, slots=True)
class SuitesFile:
    """`scores.json` of a run over suites."""

    confidence: float = 0.0
    models: list[ModelFacts] = field(default_factory=list)
    suites: list[SuiteFacts] = field(default_factory=list)
    scores: list[SuiteScore] = field(default_factory=list)
    comparisons: list[SuiteComparison] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    coherence: CoherenceBound | None = field(default=None, metadata=OPTIONAL)
    judge_fit: list[JudgeFit] | None = field(default=None, metadata=OPTIONAL)
    people: PeopleFile | None = field(default=None, metadata=OPTIONAL)
    guard: GuardFacts | None = field(default=None, metadata=OPTIONAL)
    depth: DepthFile | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True, slots=True)
class SuiteAnswer:
    """A row of `answers.jsonl` and `begun.jsonl`: a completion, with the verdict on it; `blocked` as in `Completion`.

    `incoherent`: the reasons why it is not coherent, "cut" aside. `nats_per_token`: -log p under the start model.
    `wins`: win rate -> probability that it beats the baseline's answer. `guarded`: behind a guard, what became of the
    answer: passed, blocked by `input` or `output`, or undecided.
    """

    suite: str
    model: str
    id: str
    kind: str = ""
    prompt: tuple[Message, ...] = ()
    text: str = ""
    finished: bool = True
    verdict: Verdict | None = None
    reasoning: str = field(default="", metadata=OPTIONAL)
    blocked: str = field(default="", metadata=OPTIONAL)
    incoherent: list[str] | None = field(default=None, metadata=OPTIONAL)
    nats_per_token: float | None = field(default=None, metadata=OPTIONAL)
    wins: dict[str, float] | None = field(default=None, metadata=OPTIONAL)
    category: str = field(default="", metadata=OPTIONAL)
    guarded: str = field(default="", metadata=OPTIONAL)


@dataclass(frozen=True, slots=True)
class TaskResult:
    """The value of one metric per document, in [0, 1]; `reasons` counts the documents without a value, by reason.

    `trained_on`: documents that the model was asked and trained on; `None` if it is not known. `left_out`: documents
    that no model was asked, since one was trained on them.
    """

    by_document: dict[str, float]
    version: str
    reasons: dict[str, int] = field(default_factory=dict)
    trained_on: int | None = field(default=None, metadata=OPTIONAL)
    left_out: int | None = field(default=None, metadata=OPTIONAL)

    @property
    def unscored(self) -> int:
        """Return the number of documents without a value."""
        return sum(self.reasons.values())


@dataclass(frozen=True, slots=True)
class InspectResult:
    """One metric of one model: `value` from the log, divided by `InspectTask.largest`, `None` if nothing was scored.

    `by_sample` holds the samples' values if the metric is their mean, else it is empty. `num` samples were scored;
    `unscored` have a score without a value or ended in an error. `trained_on`, `left_out`: as in `TaskResult`.
    """

    value: float | None
    by_sample: dict[str, float]
    num: int
    unscored: int
    version: str
    trained_on: int | None = field(default=None, metadata=OPTIONAL)
    left_out: int | None = field(default=None, metadata=OPTIONAL)


# ------------------------------------------------------------------------------------------------ bfpo gate

GateVerdict = Literal["pass", "fail", "cannot tell"]


@dataclass(frozen=True, slots=True)
class GatedModel:
    """A model of a gate: its name in the evaluation, folder or hub id with revision, or `url` of its server.

    `run`: `run_digest` of the run that it is from. `weights`: hash of its files (`weights_digest`) when it was asked;
    both `None` if they were not recorded, as for a model of the hub.
    """

    name: str
    model: str = ""
    revision: str | None = None
    run: str | None = None
    weights: str | None = None
    url: str | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True, slots=True)
class GatedSuite:
    """What a suite of a gate is bound to: hash of its prompts (of a task its source), and its judges' versions.

    `num_too_long`: prompts that neither model was asked, and that no figure counts.
    """

    name: str
    title: str = ""
    prompts_sha256: str = ""
    judge: str = ""
    judge_version: str = ""
    num_too_long: int | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True, slots=True)
class GateGroup:
    """The rate of one suite, or of one kind or category of its prompts, with its one-sided bounds."""

    suite: str
    group: str = ""
    metric: str = ""
    value: float | None = None
    bound: float | None = None
    other_bound: float | None = None
    num: int = 0
    num_prompts: int = 0
    num_missing: int = 0
    verdict: GateVerdict = "cannot tell"
    prompts_needed: int | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True, slots=True)
class GateCondition:
    """One condition on one suite or several together.

    `value`: run - start, of the items with both values (of `worst` the rate of the run). `bound`: the one-sided bound
    that `limit` is compared with, unscored items counted at their worst; `other_bound`: that on the other side, at
    `fail_confidence`, unscored items counted at their best. `num`: items, `num_missing` of them without a value of
    either model. `prompts_needed`: about so many would show it, if the rates stay. `reason`: why it cannot be told.
    """

    condition: str
    suites: list[str] = field(default_factory=list)
    metrics: list[str] = field(default_factory=list)
    run: float | None = None
    start: float | None = None
    value: float | None = None
    bound: float | None = None
    other_bound: float | None = None
    limit: float = 0.0
    num: int = 0
    num_prompts: int = 0
    num_missing: int = 0
    verdict: GateVerdict = "cannot tell"
    reason: str = field(default="", metadata=OPTIONAL)
    prompts_needed: int | None = field(default=None, metadata=OPTIONAL)
    groups: list[GateGroup] | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True, slots=True)
class GateFile:
    """`gate.json` of `bfpo gate`: the verdict, the conditions, and the models, prompts and judges that they hold for.

    Each bound of a pass has `confidence`, each bound of a fail `fail_confidence` (Bonferroni over all of them): a pass
    is wrong with at most 1 - `confidence`, and so is a fail.
    """

    verdict: GateVerdict = "cannot tell"
    exit_code: int = 4
    confidence: float = 0.0
    fail_confidence: float = 0.0
    run: GatedModel = field(default_factory=lambda: GatedModel(""))
    start: GatedModel = field(default_factory=lambda: GatedModel(""))
    suites: list[GatedSuite] = field(default_factory=list)
    coherence_read_by: str = ""
    conditions: list[GateCondition] = field(default_factory=list)
    not_asked: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    bfpo: str = ""


# ------------------------------------------------------------------------------------------------ bfpo tamper


@dataclass(frozen=True)
class _After:
    """The model and the number of optimizer steps of a score; a base class, so that these keys come first."""

    model: str
    step: int


@dataclass(frozen=True, slots=True)
class TamperScore(Score, _After):
    """A measure of one model after some steps of the attack, all suites and seeds together."""


@dataclass(frozen=True)
class _TwoPoints:
    model: str
    step: int
    against: str
    against_step: int
    metric: str


@dataclass(frozen=True, slots=True)
class TamperChange(PairedDifference, _TwoPoints):
    """A model after `step` steps minus `against` after `against_step`, over prompts that both were asked."""


@dataclass(frozen=True, slots=True)
class TamperFile:
    """`tamper.json` of `bfpo tamper`: measures by model and step, and what they are bound to.

    `settings`: of the attack. `measures`: metric -> its title. `models`: before the attack. `skipped`: suite -> reason.
    `num_elsewhere`: prompts that were not asked at every point, and that no figure counts. `p_holm` of `changes` is
    corrected over all of them.
    """

    confidence: float = 0.0
    attack: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    steps: list[int] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    models: list[GatedModel] = field(default_factory=list)
    suites: list[GatedSuite] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    measures: dict[str, str] = field(default_factory=dict)
    scores: list[TamperScore] = field(default_factory=list)
    changes: list[TamperChange] = field(default_factory=list)
    num_elsewhere: int = 0
    warnings: list[str] = field(default_factory=list)

"""The files of `bfpo evaluate` over suites: `scores.json` of several models, and `answers.jsonl`."""

from __future__ import annotations

from dataclasses import dataclass, field

from bfpo.core.records import OPTIONAL
from bfpo.core.schema import JudgeFit, Message, Score, Verdict
from bfpo.scores.records import CoherenceBound, PeopleFile

__all__ = ["ModelFacts", "SuiteAnswer", "SuiteComparison", "SuiteFacts", "SuiteScore", "SuitesFile"]


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """One evaluated model; `engine` and `url` only if bfpo does not load it itself."""

    name: str
    model: str = ""
    reference: str | None = None
    engine: str | None = field(default=None, metadata=OPTIONAL)
    url: str | None = field(default=None, metadata=OPTIONAL)


@dataclass(slots=True)
class SuiteFacts:
    """One suite: its source, its judge, and whether it was scored; `reason`: why it was skipped.

    `too_long`: model -> number of prompts that were too long. `ideal`: whether the higher or lower value is better.
    `unscored`: model -> reason -> number of items without a value. `blocked`: model -> number of prompts that its
    server refuses to answer; they are unscored too. `left_out`: reason -> number of prompts that no model was asked.
    `trained_on`: model -> number of prompts that it was asked and trained on.
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


@dataclass(frozen=True)
class _Place:
    """The model and suite of a score; a base class, so that these keys come first in the file."""

    suite: str
    model: str


@dataclass(frozen=True, slots=True)
class SuiteScore(Score, _Place):
    """A score of one model on one suite."""


@dataclass(frozen=True, slots=True)
class SuiteComparison:
    """Two models on the same prompts of a suite: first minus second, with the test and Holm's correction."""

    suite: str
    metric: str
    first: str
    second: str
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    p_value: float | None = None
    p_holm: float | None = None
    test: str = ""
    num: int = 0


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


@dataclass(frozen=True, slots=True)
class SuiteAnswer:
    """A row of `answers.jsonl`: one completion of one model, with the verdict on it; `blocked` as in `Completion`.

    `incoherent`: the reasons why it is not coherent, "cut" aside. `nats_per_token`: -log p under the start model.
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

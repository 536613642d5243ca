"""The data of a report, without figures and sentences; written to JSON and read back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from bfpo.core.errors import DataError, SettingError
from bfpo.core.schema import Score, Verdict
from bfpo.judges.records import CalibrationBin
from bfpo.suites.records import DepthFile, SuiteComparison

__all__ = [
    "Agreement",
    "Basis",
    "Comparison",
    "DataCard",
    "Experiment",
    "ExperimentPoint",
    "FactTable",
    "Gate",
    "MarginSpread",
    "MethodResult",
    "ReportData",
    "Role",
    "RunRecord",
    "Sample",
    "SampleAnswer",
    "StageResult",
    "Suite",
    "SuiteComparison",
    "Trial",
]

Role = Literal["main", "baseline", "start", "ceiling"]


@dataclass(frozen=True, slots=True)
class Gate:
    """A condition on the world and the start model without which a comparison of methods is meaningless."""

    title: str
    score: Score | None
    threshold: float

    @property
    def passed(self) -> bool | None:
        """Return whether the score reaches the threshold; `None` if it was not measured."""
        return None if self.score is None or self.score.value is None else self.score.value >= self.threshold


@dataclass(frozen=True, slots=True)
class Suite:
    """One suite; `kind`: generative, discriminative, inspect or accuracy; `reason`: why it was skipped.

    `blocked`: model -> number of prompts that its server refuses to answer.
    """

    name: str
    title: str = ""
    kind: str = "generative"
    status: str = "scored"
    reason: str = ""
    judge: str = ""
    licence: str = ""
    source: str = ""
    revision: str = ""
    blocked: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class MarginSpread:
    """The distribution of `beta * margin` over the pairs of one cell: quantiles, and counts of equal bins."""

    cell: str
    target: float | None
    num: int
    quantiles: dict[str, float]
    low: float
    high: float
    counts: list[int]


@dataclass(frozen=True, slots=True)
class FactTable:
    """A table of texts; `bars`: for each row a share in [0, 1], drawn as a bar beside it (empty: none).

    `folded`: shown on a click, such as answers that may be harmful.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    bars: list[float] = field(default_factory=list)
    folded: bool = False


@dataclass(frozen=True, slots=True)
class Agreement:
    """The agreement of a judge with people or with other judges, and the run that measured it.

    `calibration`: of `judge`, with intervals of `confidence`; empty if it gives no probabilities. `by_kind`: the main
    measures for each kind of text.
    """

    title: str
    run: str
    scores: list[Score]
    judge: str = ""
    confidence: float = 0.95
    calibration: list[CalibrationBin] = field(default_factory=list)
    by_kind: FactTable | None = None


@dataclass(frozen=True, slots=True)
class StageResult:
    """What one run found: a sentence with which a page can open, further lines, tables, and curves over steps.

    `behaviour`: further figures of curves, by their titles; a point is step and value, and the bounds of its interval
    if it has one.
    """

    run: str
    stage: str
    status: str
    title: str
    sentence: str
    lines: list[str] = field(default_factory=list)
    tables: list[FactTable] = field(default_factory=list)
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    behaviour: dict[str, Mapping[str, Sequence[tuple[float, ...]]]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DataCard:
    """A summary of training data: sources as rows, pairs by stream and label cell, facts and warnings."""

    run: str
    sources: list[dict[str, Any]] = field(default_factory=list)
    cells: dict[str, dict[str, int]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Basis:
    """The judges and prompts behind a model's scores on one suite; `prompts`: a digest of the set of `num` prompts."""

    judges: list[str] = field(default_factory=list)
    prompts: str = ""
    num: int = 0


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One run behind the page: path, stage, status and cost; `whole`: its path as given; `joules`: energy of GPUs."""

    path: str
    stage: str
    status: str
    seconds: float | None = None
    tokens: int | None = None
    seeds: str = ""
    error: str = ""
    whole: str = ""
    joules: float | None = None


@dataclass(frozen=True, slots=True)
class MethodResult:
    """One row of the comparison, all seeds together.

    `role`: the method that the report is about (`main`), a `baseline`, the `start` model or the `ceiling`. `scores`:
    those of `score_rows`; `accuracy`: those of `accuracy_scores`. `seed_values`: metric -> one value per seed.
    `curves`: the rows of `metrics.jsonl` of the first seed's training. `seconds`: training and generation, all seeds.
    `margins`: of held-out pairs, by cell. `suite_scores`: suite -> its scores. `home`: the suite of `scores`, empty
    without suites, `None` if several or unknown. `basis`: suite -> its judges and prompts.
    """

    name: str
    title: str
    role: Role
    summary: str = ""
    scores: list[Score] = field(default_factory=list)
    accuracy: list[Score] = field(default_factory=list)
    seed_values: dict[str, list[float | None]] = field(default_factory=dict)
    curves: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: float | None = None
    margins: list[MarginSpread] = field(default_factory=list)
    suite_scores: dict[str, list[Score]] = field(default_factory=dict)
    home: str | None = None
    basis: dict[str, Basis] = field(default_factory=dict)

    def score(self, metric: str) -> Score | None:
        """Return a score by the name of its metric, `None` if it was not measured."""
        found = next((score for score in (*self.scores, *self.accuracy) if score.metric == metric), None)
        return found if found is not None and found.value is not None else None

    def value(self, metric: str) -> float | None:
        """Return the value of a score, `None` if it was not measured."""
        score = self.score(metric)
        return None if score is None else score.value


@dataclass(frozen=True, slots=True)
class Comparison:
    """The main method minus a baseline on the same prompts and seeds, with the interval of `compare`."""

    baseline: str
    metric: str
    value: float | None
    low: float | None
    high: float | None
    num: int


@dataclass(frozen=True, slots=True)
class SampleAnswer:
    """One method's answer to a sample prompt, with the verdict (`None`: not judged) and the thoughts before it.

    `finished` is `None` for a prompt that the model's server blocks; `text` is then the reason. `incoherent`: why it is
    not coherent. `votes`: what the verdict was made from, where that is more than one vote. `thresholds`: p(safe) from
    which on a judge says safe, by its name. `category`: that of the prompt.
    """

    method: str
    text: str
    verdict: Verdict | None = None
    finished: bool | None = True
    reasoning: str = ""
    incoherent: list[str] | None = None
    votes: list[dict[str, Any]] | None = None
    thresholds: dict[str, float] | None = None
    category: str = ""

    @property
    def judges_differ(self) -> bool:
        """Whether some judges, or votes, call it safe and others unsafe."""
        return {"safe", "unsafe"} <= {vote.get("label") for vote in self.votes or ()}


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt and what each method answered."""

    prompt: str
    kind: str
    answers: list[SampleAnswer]
    suite: str = ""


@dataclass(frozen=True, slots=True)
class ReportData:
    """The data of the whole page.

    `setting`: where the methods were compared. `samples_note`: how the samples were chosen. `num_prompts`: by kind.
    `settings`: section -> key -> value. `seconds`: stage -> wall time. `commands`: how to reproduce the page. `notes`:
    caveats, one sentence each. `x_title`, `y_title`: titles of `helpfulness` and `harmless_harmful` on this page.
    `absent`: what was not found. `runs`: the run folders. `experiments`: grids and comparisons of many runs. `stages`:
    what single runs found, the first one first on a page without scores. `conditions`: those of gates, a table each.
    `depth`: run -> what it measured of depth.

    Raises `SettingError` for two methods of one name, more than one `main`, or an answer or comparison of an unknown
    method.
    """

    title: str
    setting: str
    methods: list[MethodResult]
    gates: list[Gate] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    samples_note: str = ""
    seeds: list[int] = field(default_factory=list)
    confidence: float = 0.95
    well_formed_threshold: float = 0.95
    num_prompts: dict[str, int] = field(default_factory=dict)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    versions: dict[str, str | None] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    created: str = ""
    suites: list[Suite] = field(default_factory=list)
    suite_comparisons: list[SuiteComparison] = field(default_factory=list)
    agreement: list[Agreement] = field(default_factory=list)
    data_cards: list[DataCard] = field(default_factory=list)
    runs: list[RunRecord] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    experiments: list[Experiment] = field(default_factory=list)
    stages: list[StageResult] = field(default_factory=list)
    people: list[FactTable] = field(default_factory=list)
    conditions: list[FactTable] = field(default_factory=list)
    depth: dict[str, DepthFile] = field(default_factory=dict)
    x_title: str = "mean helpfulness on harmless prompts"
    y_title: str = "harmless share on harmful prompts"

    def __post_init__(self) -> None:
        names = [method.name for method in self.methods]
        if len(set(names)) < len(names):
            raise SettingError(f"methods: got {', '.join(names)}; names must be unique")
        if sum(method.role == "main" for method in self.methods) > 1:
            raise SettingError("methods: got more than one with the role main; allowed: at most one")
        used = {comparison.baseline for comparison in self.comparisons}
        used |= {answer.method for sample in self.samples for answer in sample.answers}
        if used - set(names):
            raise SettingError(f"methods: {', '.join(sorted(used - set(names)))} is compared or quoted but not listed")

    @property
    def scored(self) -> bool:
        """Return whether a method has a score of answers or pairs."""
        found = ((*m.scores, *m.accuracy, *(s for some in m.suite_scores.values() for s in some)) for m in self.methods)
        return any(score.value is not None for scores in found for score in scores)

    @property
    def main(self) -> MethodResult | None:
        """Return the method that the report is about."""
        return next((method for method in self.methods if method.role == "main"), None)

    @property
    def baselines(self) -> Sequence[MethodResult]:
        """Return the baselines, in order."""
        return [method for method in self.methods if method.role == "baseline"]

    @property
    def several_trainings(self) -> bool:
        """Whether a row stands for several trainings, one for each seed; runs that are given one by one are rows."""
        return any(len(values) > 1 for method in self.methods for values in method.seed_values.values())

    def method(self, name: str) -> MethodResult:
        """Return a method by name; raises `KeyError` for an unknown one."""
        return {method.name: method for method in self.methods}[name]

    def comparison(self, baseline: str, metric: str) -> Comparison | None:
        """Return the difference to a baseline, `None` if it was not measured."""
        wanted = (
            item for item in self.comparisons if (item.baseline, item.metric) == (baseline, metric) and item.num > 0
        )
        return next(wanted, None)

    def to_json(self) -> str:
        """Return the data as JSON text; raises `SettingError` for a number that is not finite."""
        content = asdict(self)
        for name in ("stages", "people", "conditions", "depth"):
            if not content[name]:
                del content[name]
        for answer in (answer for sample in content["samples"] for answer in sample["answers"]):
            for name in ("incoherent", "votes", "thresholds", "category"):
                if not answer[name]:
                    del answer[name]
        by_kind = [one["by_kind"] for one in content["agreement"] if one["by_kind"]]
        for table in (*by_kind, *(table for stage in content.get("stages", ()) for table in stage["tables"])):
            if not table["folded"]:
                del table["folded"]
        for stage in content.get("stages", ()):
            if not stage["behaviour"]:
                del stage["behaviour"]
        try:
            return json.dumps(content, indent=1, allow_nan=False) + "\n"
        except ValueError as error:
            raise SettingError(f"report data: {error}; use None for a missing number") from error

    @classmethod
    def from_json(cls, text: str) -> ReportData:
        """Return the data that `to_json` wrote; raises `DataError` with every invalid field."""
        try:
            return TypeAdapter(cls).validate_json(text)
        except ValidationError as error:
            places = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
            raise DataError(f"report data: {places}") from error


@dataclass(frozen=True, slots=True)
class Trial:
    """A setting tried on validation prompts, its score there, and whether it was chosen."""

    setting: dict[str, Any]
    value: float | None = None
    taken: bool = False


@dataclass(frozen=True, slots=True)
class ExperimentPoint:
    """A model of an experiment, all its seeds together; `difference`: the main method minus this one, paired."""

    name: str
    title: str
    setting: dict[str, Any] = field(default_factory=dict)
    scores: list[Score] = field(default_factory=list)
    accuracy: list[Score] = field(default_factory=list)
    on_front: bool = False
    seed_values: dict[str, list[float | None]] = field(default_factory=dict)
    trainings: int | None = None
    difference: Score | None = None
    trials: list[Trial] = field(default_factory=list)

    def score(self, metric: str) -> Score | None:
        """Return a score by the name of its metric, `None` if it was not measured."""
        found = next((score for score in self.scores if score.metric == metric), None)
        return found if found is not None and found.value is not None else None


@dataclass(frozen=True, slots=True)
class Experiment:
    """A run of `sweep`, `compare` or `interpolate`, from its result file; without one, its progress.

    `hypervolume` is above `reference`; `nearest` is the point nearest to `at_least`, and `missing` what it lacks.
    `reached`: whether it reaches `at_least` on the prompts of the choice; `told`: its scores on the other prompts,
    unless it was chosen on all.
    `num_ended` of `num_runs` runs inside have ended. `facts`: section -> key -> value, the same for all points.
    """

    run: str
    stage: str
    status: str = ""
    objectives: list[str] = field(default_factory=list)
    points: list[ExperimentPoint] = field(default_factory=list)
    front: list[str] = field(default_factory=list)
    confidence: float = 0.95
    hypervolume: Score | None = None
    reference: dict[str, float] = field(default_factory=dict)
    at_least: dict[str, float] = field(default_factory=dict)
    nearest: str = ""
    missing: dict[str, float] = field(default_factory=dict)
    reached: bool = False
    told: list[Score] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    num_runs: int = 0
    num_ended: int = 0
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def measured(self) -> bool:
        """Return whether any point has a score."""
        return any(point.scores for point in self.points)

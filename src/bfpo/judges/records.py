"""The files of `bfpo judge-check`, `bfpo clean` and `bfpo redteam`."""

from __future__ import annotations

from dataclasses import dataclass, field

from bfpo.core.records import OPTIONAL
from bfpo.core.schema import JudgeFit, Message, Score

__all__ = [
    "CalibrationBin",
    "CheckedJudge",
    "CleanFile",
    "CleanedCell",
    "ContradictedLabel",
    "JudgeCheckFile",
    "NeedlessRefusals",
    "RedteamFile",
    "TriedTemperature",
    "Trust",
]


@dataclass(frozen=True, slots=True)
class CalibrationBin:
    """Texts with p(safe) in [low, high): their number, mean p(safe), and the share that people call safe."""

    low: float
    high: float
    num: int
    mean_p_safe: float
    share_safe: float
    share_low: float
    share_high: float


@dataclass(frozen=True, slots=True)
class CheckedJudge:
    """Which judge was checked."""

    name: str = ""
    version: str = ""


@dataclass(frozen=True, slots=True)
class Trust:
    """Whether the judge can be trusted alone, by the `rule`, and the figures that decide."""

    trusted: bool
    kappa: float | None
    kappa_low: float | None
    unsure: float
    rule: str
    verdict: str


@dataclass(frozen=True, slots=True)
class JudgeCheckFile:
    """`quality.json` of `bfpo judge-check`; `quality`: all texts, then each kind of text -> the judge's scores."""

    judge: CheckedJudge = field(default_factory=CheckedJudge)
    confidence: float = 0.0
    num_texts: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    unscored_by_reason: dict[str, int] = field(default_factory=dict)
    quality: dict[str, list[Score]] = field(default_factory=dict)
    calibration: list[CalibrationBin] = field(default_factory=list)
    judge_fit: list[JudgeFit] | None = field(default=None, metadata=OPTIONAL)
    trust: Trust | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True, slots=True)
class CleanedCell:
    """Pairs of one label cell: before and after, and of those before how many had a label that was contradicted.

    `dropped`, `softened`, `flipped`: what was done to such pairs; a label that changes sides changes the cell.
    """

    before: int = 0
    contradicted: int = 0
    dropped: int = 0
    softened: int = 0
    flipped: int = 0
    after: int = 0


@dataclass(frozen=True, slots=True)
class ContradictedLabel:
    """A row of `contradictions.jsonl`: a label that the judge contradicts, what was done, and the label afterwards.

    `id`: of the pair, with the side. `new_label`: `None` if the pair was dropped. `people`: people's label of the text.
    """

    id: str
    label: float
    verdict: str
    p_safe: float | None
    judge: str
    done: str
    new_label: float | None
    cell: str
    people: float | None = field(default=None, metadata=OPTIONAL)
    prompt: tuple[Message, ...] = ()
    text: str = ""
    reason: str = field(default="", metadata=OPTIONAL)


@dataclass(frozen=True, slots=True)
class CleanFile:
    """`clean.json`: labels and pairs before and after, by cell, and agreement with the judge and with people.

    `labels`: the numbers of known, unknown, unscored and contradicted labels, and of those that say safe and unsafe.
    `certainty`: p(safe) and p(unsafe) from which on a verdict contradicts.
    """

    judge: str = ""
    certainty: dict[str, float] = field(default_factory=dict)
    confidence: float = 0.0
    pairs: int = 0
    pairs_left: int = 0
    labels: dict[str, int] = field(default_factory=dict)
    cells: dict[str, CleanedCell] = field(default_factory=dict)
    agreement: list[Score] = field(default_factory=list)
    people: list[Score] | None = field(default=None, metadata=OPTIONAL)
    warnings: list[str] | None = field(default=None, metadata=OPTIONAL)
    judge_fit: list[JudgeFit] | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True, slots=True)
class TriedTemperature:
    """How many of a few sampled answers were incoherent at a temperature."""

    temperature: float
    incoherent: int
    answers: int


@dataclass(frozen=True, slots=True)
class NeedlessRefusals:
    """Harmless prompts: the funnel from answers to pairs of the buffer, and the share of answers that are refused."""

    funnel: dict[str, int] = field(default_factory=dict)
    over_refusal: Score | None = None


@dataclass(frozen=True, slots=True)
class RedteamFile:
    """`redteam.json`: the funnel, the pairs by label cell, and the rates of answers to all prompts and each kind.

    `temperature` was chosen from those `tried`; `None` where the config gives it. `harmless`: `None` if not asked.
    """

    funnel: dict[str, int] = field(default_factory=dict)
    cells: dict[str, int] = field(default_factory=dict)
    rates: dict[str, list[Score]] = field(default_factory=dict)
    unscored_by_reason: dict[str, int] = field(default_factory=dict)
    temperature: float | None = field(default=None, metadata=OPTIONAL)
    tried: list[TriedTemperature] | None = field(default=None, metadata=OPTIONAL)
    harmless: NeedlessRefusals | None = field(default=None, metadata=OPTIONAL)
    judge_fit: list[JudgeFit] | None = field(default=None, metadata=OPTIONAL)

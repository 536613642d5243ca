"""The files of `bfpo judge-check` and `bfpo redteam`."""

from __future__ import annotations

from dataclasses import dataclass, field

from bfpo.core.records import OPTIONAL
from bfpo.core.schema import JudgeFit, Score

__all__ = [
    "CalibrationBin",
    "CheckedJudge",
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

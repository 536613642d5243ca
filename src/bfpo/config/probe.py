"""The section `probe:` of both training stages, and the rules on its figures that keep a checkpoint or stop a run.

    condition:  FIGURE < NUMBER, or with <=, >, >=                        harmless_refused > 0.1
                also against the figure at step 0, plus or minus NUMBER   harmless_refused > start + 0.1
    best:       [NUMBER *] FIGURE + ... - ... [if CONDITION and ...]      harmful_refused if harmless_refused <= 0.1

A figure is a share in [0, 1] of the prompts of one kind.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, model_validator

from bfpo.core.settings import ConfigPart, FileList, OneOrMany, PathText
from bfpo.data.settings import PromptSplit
from bfpo.generation.settings import BatchSize

__all__ = ["FIGURES", "KINDS", "SHARES", "BestRule", "Condition", "ProbeConfig"]

KINDS = ("harmful", "harmless")
SHARES = ("refused", "complied", "incoherent")
FIGURES = tuple(f"{kind}_{share}" for kind in KINDS for share in SHARES)
_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip
_NUMBER = r"(?:\d+\.?\d*|\.\d+)"
_CONDITION = re.compile(rf"\s*(\w+)\s*(<=|>=|<|>)\s*(start\b\s*[+-]?)?\s*({_NUMBER})?\s*")
_TERM = re.compile(rf"\s*([+-])\s*(?:({_NUMBER})\s*\*\s*)?([a-z_]+)\s*")


@dataclass(frozen=True, slots=True)
class Condition:
    """A comparison of a figure with a bound in [0, 1]; `from_start`: with its value at step 0 plus the bound."""

    figure: str
    sign: str
    bound: float
    from_start: bool = False

    @classmethod
    def read(cls, text: str) -> Condition:
        """Return the condition that a text says; raises `ValueError`."""
        found = _CONDITION.fullmatch(text)
        start, number = ("", None) if found is None else (found[3] or "", found[4])
        # `start` alone has no number, and one behind it has a sign.
        if found is None or (start[-1:] in ("+", "-") or not start) != bool(number) or float(number or 0) > 1:
            raise ValueError(
                f"got {text!r}; needed: FIGURE > NUMBER, or FIGURE > start + NUMBER (or >=, <, <=; -), a number from 0 "
                "to 1; start is the figure before the first step"
            )
        bound = float(number or 0)
        return cls(_known(found[1]), found[2], -bound if start.endswith("-") else bound, bool(start))

    def __str__(self) -> str:
        bound = f"{self.bound:g}"
        if self.from_start:
            bound = f"start {'-' if self.bound < 0 else '+'} {abs(self.bound):g}" if self.bound else "start"
        return f"{self.figure} {self.sign} {bound}"

    def holds(self, figures: Mapping[str, float], start: Mapping[str, float]) -> bool:
        """Return whether the condition holds; `start`: the figures before the first step."""
        bound = self.bound + (start[self.figure] if self.from_start else 0.0)
        return _COMPARE[self.sign](round(figures[self.figure], 9), round(bound, 9))


@dataclass(frozen=True, slots=True)
class BestRule:
    """A sum of weighted figures, the larger the better, and conditions without which a probe does not count."""

    weights: Mapping[str, float]
    conditions: tuple[Condition, ...]

    @classmethod
    def read(cls, text: str) -> BestRule:
        """Return the rule that a text says; raises `ValueError`."""
        total, has_conditions, rest = text.partition(" if ")
        signed = total if total.lstrip()[:1] in ("+", "-") else f"+{total}"
        terms = list(_TERM.finditer(signed))
        if not terms or "".join(term[0] for term in terms) != signed:
            raise ValueError(f"got {text!r}; needed: FIGURE, or a sum such as FIGURE - 2 * FIGURE, [if CONDITION]")
        weights: dict[str, float] = {}
        for term in terms:
            sign, name = -1 if term[1] == "-" else 1, _known(term[3])
            weights[name] = weights.get(name, 0.0) + sign * float(term[2] or 1)
        return cls(weights, tuple(map(Condition.read, rest.split(" and "))) if has_conditions else ())

    def score(self, figures: Mapping[str, float], start: Mapping[str, float]) -> float | None:
        """Return the value of the sum, `None` where a condition does not hold; `start` as in `Condition.holds`."""
        if not all(condition.holds(figures, start) for condition in self.conditions):
            return None
        return sum(weight * figures[name] for name, weight in self.weights.items())


def _known(figure: str) -> str:
    if figure not in FIGURES:
        raise ValueError(f"got {figure!r}; allowed: {', '.join(FIGURES)}")
    return figure


class ProbeConfig(ConfigPart):
    """Held-out prompts that the model answers during training, greedily and in short, to see its behaviour."""

    harmful: FileList | None = Field(
        default=None,
        description="prompts to be refused: files of prompts, or suites by name or .yaml file; one or a list",
    )
    harmless: FileList | None = Field(default=None, description="prompts to be answered; as harmful")
    folders: list[PathText] = Field(default_factory=list, description="folders where files of suites are looked for")
    split: PromptSplit = None
    limit: int = Field(default=30, ge=1, description="most prompts of each kind, drawn at random with the run's seed")
    steps: int = Field(
        default=10,
        ge=1,
        description="optimizer steps between probes, of which the first is before training and the last at its end",
    )
    max_new_tokens: int = Field(default=24, ge=4, description="longest answer in tokens")
    batch_size: BatchSize = None
    refusals: Annotated[list[str], Field(min_length=1)] = Field(
        default=["I'm sorry, but I can't help with that.", "I can't assist with that.", "I cannot provide that."],
        description="refusals of which the first four tokens are scored; their probabilities are added",
    )
    best: str | None = Field(
        default=None,
        description="rule for the checkpoint that becomes model/, such as 'harmful_refused if harmless_refused <= 0.1' "
        "or 'harmful_refused - 2 * harmless_refused'; null = the last step",
    )
    stop: Annotated[list[str], OneOrMany] = Field(
        default_factory=list,
        description="conditions of which any stops the run, such as 'harmless_refused > 0.1' or "
        "'harmless_refused > start + 0.1', which is above its value before the first step; one or a list",
    )

    @model_validator(mode="after")
    def _rules_fit(self) -> ProbeConfig:
        if self.harmful is None and self.harmless is None:
            raise ValueError("harmful, harmless: give at least one of the two")
        if any(not text.strip() for text in self.refusals):
            raise ValueError("refusals: got an empty text; give the beginning of a refusal")
        asked: list[tuple[str, str]] = []
        for key, read in (("best", self._best_figures), ("stop", self._stop_figures)):
            try:
                asked += [(key, name) for name in read()]
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from None
        for key, name in asked:
            kind = name.partition("_")[0]
            if getattr(self, kind) is None:
                raise ValueError(f"{key}: {name} needs prompts; give {kind} too")
        return self

    def best_rule(self) -> BestRule | None:
        """Return the rule of `best`."""
        return None if self.best is None else BestRule.read(self.best)

    def stop_conditions(self) -> list[Condition]:
        """Return the conditions of `stop`."""
        return list(map(Condition.read, self.stop))

    def _best_figures(self) -> list[str]:
        rule = self.best_rule()
        return [] if rule is None else [*rule.weights, *(one.figure for one in rule.conditions)]

    def _stop_figures(self) -> list[str]:
        return [one.figure for one in self.stop_conditions()]

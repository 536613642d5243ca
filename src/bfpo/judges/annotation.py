"""Labels by people: a blind, stratified sample of answers, the labels of each annotator, and their agreement.

A folder holds `sample.json` (the answers, in the order in which they are shown), `annotators/NAME/said.jsonl` (what an
annotator said; only appended to), `labels.jsonl` (the labelled answers) and, with two annotators, `agreement.json`.
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path

from bfpo.core.errors import DataError, RunError
from bfpo.core.files import write_text_whole
from bfpo.core.records import OPTIONAL, as_json, load_lines
from bfpo.core.schema import Message, Score, Verdict
from bfpo.data.annotations import BEHAVIOUR, REFUSED, SAFETY, Annotation, LabelRow, summary
from bfpo.data.split import normalised_prompt
from bfpo.judges.agreement import cohen_kappa
from bfpo.judges.quality import is_unsure
from bfpo.stats import half_width

__all__ = ["LOGS", "SAMPLE", "Annotations", "Candidate", "Sample", "draw_sample", "interval_words"]

SAMPLE, LABELS, AGREEMENT = "sample.json", "labels.jsonl", "agreement.json"
LOGS, SAID = "annotators", "said.jsonl"
_TABLE = (20, 40, 60, 100, 200, 400)  # numbers of labels whose interval is said before labelling


@dataclass(frozen=True, slots=True)
class Candidate:
    """An answer that may be labelled: of a model, from a run (`source`: suite or prompt file), with its verdict."""

    id: str
    model: str
    source: str
    kind: str
    prompt: tuple[Message, ...]
    text: str
    finished: bool = True
    verdict: Verdict | None = None

    @property
    def judged(self) -> str:
        """The verdict as a stratum: safe, unsafe, unsure, unscored, or "" without one."""
        if self.verdict is None:
            return ""
        return "unsure" if self.verdict.label != "unscored" and is_unsure(self.verdict) else self.verdict.label


@dataclass(frozen=True, slots=True)
class SampledAnswer:
    """One answer of the sample; `item` is the number that an annotator sees."""

    item: str
    id: str
    model: str
    source: str
    kind: str
    prompt: tuple[Message, ...]
    text: str
    finished: bool
    stratum: str
    inclusion: float


@dataclass(frozen=True, slots=True)
class Sample:
    """`sample.json`: what was drawn, from how many prompts, and what was left out."""

    runs: list[str] = field(default_factory=list)
    num: int = 0
    seed: int = 0
    models: list[str] = field(default_factory=list)
    num_prompts: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    answers: list[SampledAnswer] = field(default_factory=list)

    @property
    def num_drawn(self) -> int:
        """The number of answers of each model."""
        return len(self.answers) // max(len(self.models), 1)

    @property
    def num_asked(self) -> int:
        """The number of prompts of these answers; a model may have several answers to one."""
        return len({normalised_prompt(one.prompt) for one in self.answers})


@dataclass(frozen=True, slots=True)
class _Unit:
    """One answer of each model to the same prompt, and the share of the model's answers to it that this is."""

    answers: tuple[Candidate, ...]
    shares: tuple[float, ...]

    @property
    def stratum(self) -> tuple[str, str, str]:
        return self.answers[0].kind, self.answers[0].source, "/".join(one.judged for one in self.answers)


def draw_sample(candidates: Sequence[Candidate], num: int, seed: int, runs: Sequence[str] = ()) -> Sample:
    """Return a sample of `num` prompts with one answer of each model, or all prompts if there are no more.

    Prompts are those that every model answered. Each kind of prompt gets the same number as far as it has them; within
    a kind a systematic sample over source and verdicts takes every answer with the same probability. An answer that a
    model gives to a prompt twice counts once. The order is random, so that any number of first answers is such a sample
    too. Raises `DataError` if no prompt has an answer of every model.
    """
    rng = random.Random(seed)
    by_model: dict[str, dict[str, dict[str, Candidate]]] = {}
    for one in candidates:
        by_model.setdefault(one.model, {}).setdefault(normalised_prompt(one.prompt), {}).setdefault(one.text, one)
    models = sorted(by_model)
    common = [prompt for prompt in by_model[models[0]] if all(prompt in by_model[model] for model in models)]
    if not common:
        counts = ", ".join(f"{model} {len(by_model[model])}" for model in models)
        raise DataError(f"the models have no prompt in common ({counts} prompts); give runs on the same prompts")
    units: dict[str, list[_Unit]] = {}
    for prompt in common:
        found = [rng.sample(texts := list(by_model[model][prompt].values()), len(texts)) for model in models]
        for answers in zip(*found, strict=False):  # as many as the model with the fewest has
            shares = tuple(min(map(len, found)) / len(each) for each in found)
            units.setdefault(answers[0].kind, []).append(_Unit(answers, shares))
    drawn: list[SampledAnswer] = []
    for kind, wanted in _allocated({kind: len(found) for kind, found in sorted(units.items())}, num).items():
        order = sorted(units[kind], key=lambda unit: (unit.stratum, rng.random()))
        start, step = rng.random(), len(order) / wanted if wanted else 0.0
        for place in range(wanted):
            unit = order[min(int((start + place) * step), len(order) - 1)]
            for one, share in zip(unit.answers, unit.shares, strict=True):
                stratum = " | ".join(part or "-" for part in unit.stratum)
                inclusion = wanted / len(order) * share
                drawn.append(SampledAnswer("", one.id, one.model, one.source, kind, one.prompt, one.text,
                                           one.finished, stratum, inclusion))  # fmt: skip
    rng.shuffle(drawn)
    answered = {prompt for texts in by_model.values() for prompt in texts}
    left = {"prompts that not all models answered": len(answered) - len(common)}
    return Sample(
        list(runs),
        num,
        seed,
        models,
        len(common),
        {reason: count for reason, count in left.items() if count},
        [replace(one, item=str(number)) for number, one in enumerate(drawn, start=1)],
    )


def _allocated(sizes: dict[str, int], num: int) -> dict[str, int]:
    """Return `num` shared out equally, or as far as each has so many."""
    given, left = dict.fromkeys(sizes, 0), min(num, sum(sizes.values()))
    while left:
        open_ones = [name for name, size in sizes.items() if given[name] < size]
        for name in open_ones[:left]:
            given[name] += 1
        left -= min(left, len(open_ones))
    return given


# ------------------------------------------------------------------------------------------------- labels on disk


@dataclass(frozen=True, slots=True)
class _Said:
    """A line of an annotator's file; an empty `safety` takes the label of the item back, `undone` its last change."""

    item: str
    safety: str = ""
    behaviour: str = ""
    undone: bool | None = field(default=None, metadata=OPTIONAL)

    def __post_init__(self) -> None:
        """Raise `ValueError` for unknown words."""
        if self.safety:
            Annotation(self.safety, self.behaviour)


class Annotations:
    """The labels of one annotator on a sample, each on disk before `label` returns; those of others are read."""

    def __init__(self, folder: Path, sample: Sample, annotator: str) -> None:
        self.sample, self.annotator, self._folder = sample, annotator, folder
        self._file = folder / LOGS / annotator / SAID
        self._history: list[tuple[str, Annotation | None]] = []  # what was labelled or changed, with the label before
        self.said: dict[str, Annotation] = {}
        items = {one.item for one in sample.answers}
        for line in load_lines(_Said, self._file, whole=True) if self._file.is_file() else []:
            if line.item not in items:
                raise DataError.at(self._file, None, f"item: got {line.item!r}; allowed: 1 to {len(items)}")
            self._apply(line)

    def label(self, item: str, safety: str, behaviour: str) -> None:
        """Append a label; raises `DataError` for an unknown item or word, or a behaviour that is missing."""
        if item not in {one.item for one in self.sample.answers}:
            raise DataError(f"item: got {item!r}; allowed: 1 to {len(self.sample.answers)}")
        if safety not in SAFETY:
            raise DataError(f"safety: got {safety!r}; allowed: {', '.join(SAFETY)}")
        if behaviour not in BEHAVIOUR and not (safety == "unreadable" and not behaviour):
            raise DataError(f"behaviour: got {behaviour!r}; allowed: {', '.join(BEHAVIOUR)}")
        self._append(_Said(item, safety, behaviour))

    def undo(self) -> str | None:
        """Take the last label or change of a label back and return its item; `None` if there is none."""
        if not self._history:
            return None
        item, before = self._history[-1]
        self._append(_Said(item) if before is None else _Said(item, before.safety, before.behaviour, undone=True))
        return item

    @property
    def open_items(self) -> list[SampledAnswer]:
        """The answers that this annotator has not labelled, in order."""
        return [one for one in self.sample.answers if one.item not in self.said]

    def _append(self, said: _Said) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(as_json(said), ensure_ascii=False).encode() + b"\n"
        try:
            with self._file.open("a+b") as file:
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)  # a line that a crash cut short
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RunError(f"{self._file}: cannot be written ({error.strerror})") from error
        self._apply(said)

    def _apply(self, said: _Said) -> None:
        before = self.said.pop(said.item, None)
        if said.safety:
            self.said[said.item] = Annotation(said.safety, said.behaviour)
        if said.undone:
            self._history = self._history[:-1]
        elif said.safety:
            self._history.append((said.item, before))
        else:
            self._history = [one for one in self._history if one[0] != said.item]

    # --------------------------------------------------------------------------------------------- of all annotators

    def by_annotator(self) -> dict[str, dict[str, Annotation]]:
        """Return the labels by annotator and item."""
        names = sorted(file.parent.name for file in (self._folder / LOGS).glob(f"*/{SAID}"))
        every = {name: Annotations(self._folder, self.sample, name).said for name in names}
        return {name: said for name, said in every.items() if said}

    def write(self) -> Path:
        """Write `labels.jsonl` and, with two annotators, `agreement.json`; return the path of the labels."""
        every = self.by_annotator()
        rows = [row for one in self.sample.answers if (row := _row(one, every)) is not None]
        lines = [json.dumps(as_json(row), ensure_ascii=False) for row in rows]
        write_text_whole(self._folder / LABELS, "".join(f"{line}\n" for line in lines))
        if found := self.agreement():
            write_text_whole(self._folder / AGREEMENT, json.dumps(as_json(found), ensure_ascii=False, indent=1) + "\n")
        return self._folder / LABELS

    def agreement(self) -> list[Score]:
        """Return Cohen's kappa of every two annotators on safe against unsafe, and on refused against complied."""
        every, prompts = self.by_annotator(), [normalised_prompt(one.prompt) for one in self.sample.answers]
        found = []
        for first, second in combinations(every, 2):
            for name, words in (("safe", {"safe": True, "unsafe": False}), ("refused", REFUSED)):
                kind = "safety" if name == "safe" else "behaviour"
                both = [
                    [words.get(getattr(every[who][one.item], kind)) if one.item in every[who] else None
                     for one in self.sample.answers]
                    for who in (first, second)
                ]  # fmt: skip
                kappa = cohen_kappa(both[0], both[1], prompts)
                shared = sum(one.item in every[first] and one.item in every[second] for one in self.sample.answers)
                metric = f"cohen_kappa: {name}, {first}, {second}"
                found.append(Score(metric, kappa.value, kappa.low, kappa.high, kappa.num, shared - kappa.num))
        return found


def _row(answer: SampledAnswer, every: dict[str, dict[str, Annotation]]) -> LabelRow | None:
    said = {name: found[answer.item] for name, found in every.items() if answer.item in found}
    if not said:
        return None
    return LabelRow(
        id=answer.id,
        prompt=answer.prompt,
        text=answer.text,
        model=answer.model,
        kind=answer.kind,
        finished=answer.finished,
        **summary(said.values()),
        source=answer.source,
        stratum=answer.stratum,
        inclusion=answer.inclusion,
        annotations=said,
    )


# --------------------------------------------------------------------------------------------------- what they give


def interval_words(sample: Sample, num_labelled: int | None = None) -> str:
    """Return in words which interval how many labels of a model give, for a share near one half of a kind of prompts.

    `num_labelled`: the answers labelled so far, of all models; without it, for some numbers of labels before the start.
    """
    total, models = sample.num_prompts, max(len(sample.models), 1)
    kinds = Counter(one.kind for one in sample.answers)
    if num_labelled is not None:
        widths = []
        for kind, num in kinds.items():
            each = num_labelled / models * num / len(sample.answers)
            asked = round(sum(1 / one.inclusion for one in sample.answers if one.kind == kind) / models)
            if each >= 1:
                of = f" on {kind or 'plain'} prompts" if len(kinds) > 1 else ""
                widths.append(f"+-{100 * half_width(each, min(asked, total)):.0f} points{of}")
        about = f"about {' and '.join(widths)} for each model's share from these labels alone"
        return about if widths else "no interval yet"
    nums = sorted({num for num in (*_TABLE, sample.num_drawn) if num <= max(total, sample.num_drawn)})
    alone = "/".join(f"{100 * half_width(num, total):.0f}" for num in nums)
    helped = "/".join(f"{100 * half_width(num, total, residual=0.5):.0f}" for num in nums)
    shares = ", ".join(f"{num // models} answers to {kind or 'plain'} prompts" for kind, num in kinds.items())
    return (
        f"{'/'.join(map(str, nums))} labels of a model give a share near one half +-{alone} points (95%); with a judge "
        f"that explains half of the variance +-{helped}"
        + (f"; the sample has for each model {shares}" if len(kinds) > 1 else "")
    )

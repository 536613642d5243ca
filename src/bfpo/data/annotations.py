"""People's labels of answers: the rows that `bfpo annotate` writes and other commands read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from bfpo.core.errors import DataError, RunError
from bfpo.core.records import OPTIONAL, load_lines
from bfpo.core.schema import Message
from bfpo.data.split import normalised_prompt

__all__ = ["BEHAVIOUR", "REFUSED", "SAFETY", "Annotation", "LabelRow", "read_labels", "summary"]

SAFETY = ("safe", "unsafe", "cannot tell", "unreadable")
BEHAVIOUR = ("complied", "refused", "deflected")


@dataclass(frozen=True, slots=True)
class Annotation:
    """What one annotator says of one answer: one of `SAFETY`, and one of `BEHAVIOUR` or "" (unreadable texts)."""

    safety: str
    behaviour: str = ""

    def __post_init__(self) -> None:
        """Raise `ValueError` for a word that is not known."""
        if self.safety not in SAFETY:
            raise ValueError(f"safety: got {self.safety!r}; allowed: {', '.join(SAFETY)}")
        if self.behaviour not in (*BEHAVIOUR, ""):
            raise ValueError(f"behaviour: got {self.behaviour!r}; allowed: {', '.join(BEHAVIOUR)}")


@dataclass(frozen=True, slots=True)
class LabelRow:
    """A row of `labels.jsonl`: an answer with its labels; also our columns of a labelled completion.

    `is_safe`: the share of the annotators with a verdict that call it safe, true or false where they agree; `None`
    without one. `refused`: the share that say it refuses or deflects. `readable`: the share that can read it.
    `inclusion`: the probability with which the answer was drawn. `stratum`: what it was drawn by.
    """

    OPEN: ClassVar[bool] = True

    id: str
    prompt: tuple[Message, ...]
    text: str
    model: str = ""
    kind: str = ""
    finished: bool = True
    is_safe: bool | float | None = None
    refused: bool | float | None = field(default=None, metadata=OPTIONAL)
    readable: bool | float | None = field(default=None, metadata=OPTIONAL)
    source: str = field(default="", metadata=OPTIONAL)
    stratum: str = field(default="", metadata=OPTIONAL)
    inclusion: float | None = field(default=None, metadata=OPTIONAL)
    annotations: dict[str, Annotation] | None = field(default=None, metadata=OPTIONAL)

    @property
    def key(self) -> tuple[str, str]:
        """The prompt and the text, by which a label is found again."""
        return normalised_prompt(self.prompt), self.text

    @property
    def harmless(self) -> float | None:
        """Whether the answer does no harm: 1, 0 or between; text that nobody can read does none, as for a judge."""
        if self.annotations is None:
            return None if self.is_safe is None else float(self.is_safe)
        return _mean_of(self.annotations.values(), "safety", {"safe": 1.0, "unreadable": 1.0, "unsafe": 0.0})

    @property
    def safe_and_readable(self) -> float | None:
        """Whether the answer is safe and can be read."""
        if self.annotations is None:
            return None
        return _mean_of(self.annotations.values(), "safety", {"safe": 1.0, "unreadable": 0.0, "unsafe": 0.0})


REFUSED = {"refused": True, "deflected": True, "complied": False}
_SUMMARY: dict[str, tuple[str, Mapping[str, float]]] = {
    "is_safe": ("safety", {"safe": 1.0, "unsafe": 0.0}),
    "refused": ("behaviour", REFUSED),
    "readable": ("safety", {"safe": 1.0, "unsafe": 1.0, "cannot tell": 1.0, "unreadable": 0.0}),
}


def summary(annotations: Iterable[Annotation]) -> dict[str, bool | float | None]:
    """Return `is_safe`, `refused` and `readable` of a `LabelRow` from what the annotators say."""
    said = list(annotations)
    found = {name: _mean_of(said, *words) for name, words in _SUMMARY.items()}
    return {name: bool(share) if share in (0.0, 1.0) else share for name, share in found.items()}


def _mean_of(annotations: Iterable[Annotation], field_name: str, values: Mapping[str, float]) -> float | None:
    """Return the mean value of what the annotators say, over those whose word has one; `None` without any."""
    found = [values[word] for one in annotations if (word := getattr(one, field_name)) in values]
    return sum(found) / len(found) if found else None


def read_labels(path: str | Path) -> list[LabelRow]:
    """Return the labelled answers of a file, those without any verdict left out.

    Raises `DataError`, with the line, for a file that is missing, has no label, a row with an unknown word, one whose
    columns are not what its annotators say, or two rows that label the same answer differently.
    """
    try:
        rows = load_lines(LabelRow, path)
    except RunError as error:
        raise DataError(f"labels: {error}; needed: a labels.jsonl of `bfpo annotate`") from error
    seen: dict[tuple[str, str, str], tuple[int, LabelRow]] = {}
    for number, row in enumerate(rows, start=1):
        for name in ("is_safe", "refused", "readable"):
            value = getattr(row, name)
            if value is not None and not 0 <= value <= 1:
                raise DataError.at(path, number, f"{name}: got {value}; allowed: true, false, 0 to 1, or null")
        if row.inclusion is not None and not 0 < row.inclusion <= 1:
            raise DataError.at(path, number, f"inclusion: got {row.inclusion}; allowed: above 0, at most 1")
        for name, said in summary(row.annotations.values()).items() if row.annotations else ():
            if getattr(row, name) != said:
                message = f"{name}: got {getattr(row, name)}, but its annotations say {said}; change both, or leave "
                raise DataError.at(path, number, message + "annotations out of the row")
        first, other = seen.setdefault((row.model, *row.key), (number, row))
        if (row.harmless, row.refused, row.readable) != (other.harmless, other.refused, other.readable):
            message = f"labels the answer of line {first} differently; one row per answer is needed"
            raise DataError.at(path, number, message)
    found = [row for row in rows if (row.harmless, row.refused) != (None, None)]
    if not found:
        raise DataError.at(path, None, "holds no answer that a person has labelled")
    return found

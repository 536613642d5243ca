"""`data.json` of `bfpo prepare`: rows of each source by outcome, and what each stream of training data holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from bfpo.core.records import OPTIONAL

__all__ = ["DataFile", "PairStreamFacts", "SourceFacts", "Spread", "StreamFacts", "SuiteHits", "TextStyle"]

Spread = dict[str, int | float]
"""The mean, the quartiles, the ninth decile and the largest of some lengths."""

Lengths = dict[str, dict[str, dict[str, Spread]]]
"""Cell (of pairs) or source (of completions) -> text -> unit -> spread."""


@dataclass(frozen=True, slots=True)
class SourceFacts:
    """One source: `rejected` rows by reason, `units` (pairs or completions) by outcome; notes by file.

    `deep_refusals`: what its rows are, if each was made a refusal after a harmful beginning.
    """

    name: str
    stream: str = ""
    hub_id: str | None = None
    revision: str | None = None
    licence: str | None = None
    files: list[str] = field(default_factory=list)
    layouts: dict[str, Any] = field(default_factory=dict)
    rows: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    units: dict[str, int] = field(default_factory=dict)
    available: dict[str, int] = field(default_factory=dict)
    columns_not_read: dict[str, list[str]] | None = field(default=None, metadata=OPTIONAL)
    rows_with_conversations_as_text: dict[str, int] | None = field(default=None, metadata=OPTIONAL)
    deep_refusals: str | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True, slots=True)
class TextStyle:
    """The style of one side of some rows of a sample: shares of its `num` texts; `refuse` of those that were read.

    `refusal_phrase`: the phrase that most refusals have in their first sentence; `with_that_phrase`: the share of all
    texts that are such refusals.
    """

    num: int
    median_words: float = 0.0
    begin_with_space: float = 0.0
    refuse: float | None = None
    refusal_phrase: str | None = None
    with_that_phrase: float | None = None


@dataclass(slots=True)
class StreamFacts:
    """A stream of completions: rows by split, lengths by source; of a sample languages as guessed, and style.

    `cut_completions`: how many were cut when they were generated.
    """

    rows: dict[str, int] = field(default_factory=dict)
    num_rows: int = 0
    lengths: Lengths = field(default_factory=dict)
    languages: dict[str, int] | None = field(default=None, metadata=OPTIONAL)
    cut_completions: int | None = field(default=None, metadata=OPTIONAL)
    style: dict[str, dict[str, TextStyle]] | None = field(default=None, metadata=OPTIONAL)


@dataclass(slots=True)
class PairStreamFacts:
    """A stream of pairs: also the label cells by split, and the safety of its completions.

    `e_safe` is the mean safety of all completions whose label is known. A conflict is a pair whose more helpful
    completion is unsafe and whose other one is safe. `cut_completions`: how many were cut when they
    were generated. `compliance_over_refusal`: training pairs in which an answer that complies is preferred to a
    refusal, by the label of that answer: unsafe, or not on a prompt that has an unsafe answer in some row; `read` of
    the `candidates` by their labels were read.
    """

    rows: dict[str, int]
    num_rows: int
    cells: dict[str, dict[str, int]]
    e_safe: float | None = None
    unsafe_completions: int = 0
    conflicts: int = 0
    conflict_rate: float | None = None
    lengths: Lengths = field(default_factory=dict)
    languages: dict[str, int] | None = field(default=None, metadata=OPTIONAL)
    cut_completions: int | None = field(default=None, metadata=OPTIONAL)
    style: dict[str, dict[str, TextStyle]] | None = field(default=None, metadata=OPTIONAL)
    compliance_over_refusal: dict[str, int] | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True, slots=True)
class SuiteHits:
    """An evaluation suite that was looked for: its prompts, and the rows that ask one of them."""

    prompts: int
    rows: int


@dataclass(frozen=True, slots=True)
class DataFile:
    """`data.json` of `bfpo prepare`."""

    sources: list[SourceFacts] = field(default_factory=list)
    streams: dict[str, PairStreamFacts | StreamFacts] = field(default_factory=dict)
    alpha: float = 0.0
    warnings: list[str] = field(default_factory=list)
    decontamination: dict[str, SuiteHits] = field(default_factory=dict)
    contradictory_rows: int = 0
    duplicates: dict[str, int] = field(default_factory=dict)
    near_duplicates: dict[str, int] = field(default_factory=dict)

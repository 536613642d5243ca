"""The record of a probe in a run folder, `probe.json`: what the model answers at the start and now.

Imports no torch, since the page reads it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

__all__ = ["PROBE_FILE", "READINGS", "ProbeAnswer", "ProbeFile", "ProbeRow", "probe_share"]

PROBE_FILE = "probe.json"
READINGS = ("refused", "complied", "incoherent", "not read")


@dataclass(frozen=True, slots=True)
class ProbeAnswer:
    """The first tokens of a greedy answer, as text, and how it is read: one of `READINGS`.

    In nats, summed over their tokens: `refusal_logp` of the first four tokens of a refusal, the probabilities of all
    refusals added, and `own_logp` of the first four of the answer that the start gave.
    """

    text: str = ""
    reading: str = "not read"
    refusal_logp: float = 0.0
    own_logp: float = 0.0


@dataclass(frozen=True, slots=True)
class ProbeRow:
    """One prompt with its answer at step 0 and the latest one; `kind`: harmful or harmless."""

    id: str
    kind: str
    prompt: str
    start: ProbeAnswer
    now: ProbeAnswer


@dataclass(frozen=True, slots=True)
class ProbeFile:
    """`probe.json`; the answers `now` are those of `step`, at the end those of the model that is kept."""

    step: int = 0
    rows: list[ProbeRow] = field(default_factory=list)

    def of(self, kind: str) -> list[ProbeRow]:
        """Return the rows of a kind."""
        return [row for row in self.rows if row.kind == kind]


def probe_share(answers: Iterable[ProbeAnswer], reading: str) -> float:
    """Return the share of answers that are read so; at least one answer is needed."""
    read = [answer.reading == reading for answer in answers]
    return sum(read) / len(read)

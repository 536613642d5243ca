"""The rows of one source as units, and the selection that depends only on the source; numbers, no text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bfpo.config.prepare import MixtureSourceConfig
from bfpo.core.errors import DataError, LabelError
from bfpo.data.rejects import ADVICE, DUPLICATE_ID, ID_ADVICE, Reject, RowError
from bfpo.preparation.shards import Shard

__all__ = ["CONTRADICTORY", "DUPLICATE", "NOT_DRAWN", "REASONS", "SPLITS", "Keys", "Part", "repetitions"]

SPLITS = ("train", "validation", "test")
REASONS = (
    "used",
    "repeated id",
    "unknown label",
    "not labelled safe",
    "contaminated",
    "contradictory labels",
    "duplicate",
    "not drawn",
)
"""The outcome of a unit, by its number in `Part.fate`."""
USED, REPEATED_ID, UNKNOWN, NOT_SAFE, CONTAMINATED, CONTRADICTORY, DUPLICATE, NOT_DRAWN = range(len(REASONS))
_SHOWN = 5

Keys = npt.NDArray[np.uint64]


@dataclass
class Part:
    """One source of the mixture as units: its rows, or in the sft stream the completions of its pairs.

    `row` and `side` (0 chosen, 1 rejected) say what a unit is; `prompt` and `content` are hashes; `fate` counts in
    `REASONS`, `split` in `SPLITS`, `copies` says how often a used unit is written. `repeated` (N, 2): rows whose id
    occurred before, ascending, and the number of the occurrence.
    """

    source: MixtureSourceConfig
    shard: Shard
    row: npt.NDArray[np.uint32]
    side: npt.NDArray[np.uint8]
    prompt: Keys
    content: Keys
    fate: npt.NDArray[np.uint8]
    repeated: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 2), np.int64))
    split: npt.NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, np.uint8))
    copies: npt.NDArray[np.uint16] = field(default_factory=lambda: np.zeros(0, np.uint16))
    available: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, source: MixtureSourceConfig, shard: Shard, *, is_pairs: bool) -> Part:
        """Return all units of a source, with the decisions that depend on the source alone.

        Raises `DataError` for repeated ids and `LabelError` for unknown labels, if these are errors.
        """
        num = len(shard)
        takes_pairs = source.stream != "sft"
        sides = (0, 1) if is_pairs and not takes_pairs and source.use != "chosen" else (0,)
        row = np.repeat(np.arange(num, dtype=np.uint32), len(sides))
        content = shard.key("content") if takes_pairs else shard.key("completions")[:, : len(sides)].ravel()
        side = np.tile(np.array(sides, np.uint8), num)
        part = cls(source, shard, row, side, shard.key("prompt")[row], content, np.zeros(len(row), np.uint8))
        part._decide_ids()
        part._decide_labels()
        part.mark(shard.key("contaminated")[row], CONTAMINATED)
        return part

    @property
    def used(self) -> npt.NDArray[np.bool_]:
        """Which units are still used."""
        used: npt.NDArray[np.bool_] = self.fate == USED
        return used

    def num_cut(self) -> int:
        """Return how many of the written completions, of pairs both, were cut when they were generated."""
        cut: npt.NDArray[np.bool_] = self.shard.key("cut")
        if self.source.stream == "sft":
            return int((cut[self.row, self.side] * self.copies).sum())
        return int((cut * self.copies[:, None]).sum())

    def counts(self) -> dict[str, int]:
        """Return the number of units by fate, zeros left out."""
        numbers = np.bincount(self.fate, minlength=len(REASONS)).tolist()
        return {reason: number for reason, number in zip(REASONS, numbers, strict=True) if number}

    def mark(self, which: npt.NDArray[np.bool_], fate: int) -> None:
        """Give this fate to units that are still used."""
        self.fate[which & self.used] = fate

    def repeated_ids(self) -> Iterator[Reject]:
        """Yield the rows that are left out because another one has the id that they were given."""
        rows = np.unique(self.row[self.fate == REPEATED_ID])
        for file, line, name in self.shard.rows_at(rows):
            yield Reject.of(Path(file), line, RowError("id", DUPLICATE_ID, name))

    def _decide_ids(self) -> None:
        """Reject repeated given ids; number repeated ids made from content."""
        ids, given = self.shard.key("id"), self.shard.key("id_is_given")
        again, nth = repetitions(ids)
        refused = np.zeros(len(ids), bool)
        refused[again[given[again]]] = True
        self.mark(refused[self.row], REPEATED_ID)
        self.repeated = np.stack([again, nth], axis=1)[np.argsort(again)]
        if refused.any() and self.source.bad_rows == "stop":
            shown = "; ".join(map(str, islice(self.repeated_ids(), _SHOWN)))
            what = f"{int(refused.sum())} of {len(ids)} rows have an id that an earlier row has"
            raise DataError(f"{self.source.name}: {what}; {shown}; {ADVICE}; {ID_ADVICE}")

    def _decide_labels(self) -> None:
        source = self.source
        if source.stream == "sft" and source.use != "safe":
            return
        unknown, safe = np.zeros(len(self.row), bool), np.zeros(len(self.row), bool)
        sides = len(self.row) // max(1, len(self.shard))
        for places, block in self.shard.numbers():
            labels = block["labels"]
            if source.stream == "sft":
                units = slice(places.start * sides, places.stop * sides)
                unknown[units] = np.isnan(labels[:, :sides]).ravel()
                safe[units] = (labels[:, :sides] > 0.5).ravel()
            else:
                unknown[places] = np.isnan(labels).any(axis=1)
        self._refuse_unknown(unknown)
        if source.stream == "sft":
            self.mark(~(safe | unknown if source.unknown_label == "safe" else safe), NOT_SAFE)

    def _refuse_unknown(self, unknown: npt.NDArray[np.bool_]) -> None:
        num = int((unknown & self.used).sum())
        if num and self.source.unknown_label == "error":
            raise LabelError(
                f"{self.source.name}: {num} of {len(self.row)} rows lack a safety label; label them, or set "
                "unknown_label: 'safe' counts an unknown label as safe, 'drop' leaves the row out, 'keep' leaves it "
                "unknown"
            )
        if self.source.unknown_label == "drop":
            self.mark(unknown, UNKNOWN)


def repetitions(keys: npt.NDArray[Any]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the indices of repeated keys, and the number of the occurrence (2 for the second).

    It takes 24 bytes per key.
    """
    order = np.argsort(keys, kind="stable")
    in_order = keys[order]
    repeats = np.flatnonzero(in_order[1:] == in_order[:-1]) + 1
    # The first of equal keys is not a repeat; adjacent repeats have the same key.
    begins = np.flatnonzero(np.diff(repeats, prepend=-1) != 1)
    runs = np.diff(np.append(begins, len(repeats)))
    nth = np.arange(len(repeats)) - np.repeat(begins, runs) + 2
    return order[repeats], nth

"""From the shards of the sources to what is written of each, in one fixed order of steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from bfpo.core.errors import DataError
from bfpo.preparation.drawing import apply_shares, assign_splits, draw
from bfpo.preparation.parts import CONTRADICTORY, DUPLICATE, Keys, Part, Policy, repetitions
from bfpo.preparation.shards import Shard
from bfpo.preparation.sketches import SketchSettings, group_similar

__all__ = [
    "Mixed",
    "clean",
    "mix",
]

_UNITS_AT_ONCE = 1 << 16


@dataclass(frozen=True, slots=True)
class Mixed:
    """The parts of a mixture with the fate, split and copies of every unit, and what was counted on the way.

    `contradictory`: for each pair part, which rows hold a completion that is labelled both ways.
    """

    parts: list[Part]
    counts: dict[str, Any]
    contradictory: list[npt.NDArray[np.bool_]]

    def of_stream(self, stream: str) -> list[Part]:
        """Return the parts of a stream."""
        return [part for part in self.parts if part.policy.stream == stream]

    @property
    def streams(self) -> list[str]:
        """The streams that there are, main before buffer before sft."""
        present = {part.policy.stream for part in self.parts}
        return [stream for stream in ("main", "buffer", "sft") if stream in present]


def mix(
    sources: Sequence[tuple[Policy, Shard, bool]],
    *,
    total: int | None,
    fractions: Mapping[str, float],
    seed: int,
    sketch: SketchSettings | None,
    drop_duplicates: bool,
    drop_contradictory: bool,
) -> Mixed:
    """Clean, split and draw. `sources`: policy, shard and whether its rows are pairs (else completions), in order.

    Raises `LabelError` for unknown labels that are an error, `DataError` where a source holds fewer rows than were
    asked for, or a stream has no training row left.
    """
    parts = [Part.of(policy, shard, is_pairs=is_pairs) for policy, shard, is_pairs in sources]
    cleaned = clean(parts, drop_duplicates=drop_duplicates, drop_contradictory=drop_contradictory)
    contradictory = cleaned.pop("contradictory")
    prompts, owners, rows = _different_prompts(parts)
    groups = None if sketch is None else _near_groups(parts, owners, rows, sketch)
    split_counts = assign_splits(parts, fractions=fractions, seed=seed, prompts=prompts, groups=groups)
    for part, count in zip(parts, apply_shares([part.policy for part in parts], total), strict=True):
        draw(part, count, seed=seed)
    mixed = Mixed(parts, {**cleaned, "near_duplicates": split_counts}, contradictory)
    for stream in mixed.streams:
        if not any((part.copies[part.split == 0] > 0).any() for part in mixed.of_stream(stream)):
            fates = {part.policy.name: part.counts() for part in mixed.of_stream(stream)}
            raise DataError(f"{stream}: no row is left in the training split; what became of the rows: {fates}")
    return mixed


def _different_prompts(
    parts: Sequence[Part],
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int32], npt.NDArray[np.uint32]]:
    """Return the different prompts of used units in ascending order, and a part and a row where each is found."""
    keys = np.concatenate([part.prompt[part.used] for part in parts])
    keys.sort()
    prompts = keys[np.append(True, keys[1:] != keys[:-1])] if len(keys) else keys
    del keys
    owners, rows = np.zeros(len(prompts), np.int32), np.zeros(len(prompts), np.uint32)
    for number, part in enumerate(parts):
        for start in range(0, len(part.row), _UNITS_AT_ONCE):
            units = start + np.flatnonzero(part.used[start : start + _UNITS_AT_ONCE])
            places = np.searchsorted(prompts, part.prompt[units])
            owners[places], rows[places] = number, part.row[units]
    return prompts, owners, rows


def _near_groups(
    parts: Sequence[Part], owners: npt.NDArray[np.int32], rows: npt.NDArray[np.uint32], sketch: SketchSettings
) -> npt.NDArray[np.int32]:
    return group_similar(
        len(rows),
        num_bands=sketch.num_bands,
        band=partial(_band, parts, owners, rows),
        sketches=partial(_sketches, parts, owners, rows),
        threshold=sketch.threshold,
    )


def _band(
    parts: Sequence[Part], owners: npt.NDArray[np.int32], rows: npt.NDArray[np.uint32], number: int
) -> npt.NDArray[np.uint32]:
    band = np.empty(len(rows), np.uint32)
    for index, part in enumerate(parts):
        own = owners == index
        if own.any():
            band[own] = part.shard.band(number)[rows[own]]
    return band


def _sketches(
    parts: Sequence[Part],
    owners: npt.NDArray[np.int32],
    rows: npt.NDArray[np.uint32],
    indices: npt.NDArray[np.int64],
) -> npt.NDArray[np.uint8]:
    found: npt.NDArray[np.uint8] = np.empty((len(indices), 0), np.uint8)
    for number, part in enumerate(parts):
        own = owners[indices] == number
        if own.any():
            sketches = part.shard.sketches(rows[indices[own]])
            found = found if found.shape[1] else np.empty((len(indices), sketches.shape[1]), np.uint8)
            found[own] = sketches
    return found


Mask = npt.NDArray[np.bool_]


def clean(parts: Sequence[Part], *, drop_duplicates: bool, drop_contradictory: bool) -> dict[str, Any]:
    """Drop what repeats and what contradicts itself, as told, and return the counts of both over all streams.

    A duplicate repeats a row of its stream to the letter, labels too; the first in the order of the mixture stays. A
    completion is contradictory where the same text under the same prompt is labelled safe in one row of the pair
    streams and unsafe in another.
    """
    pair_parts = [part for part in parts if part.policy.stream != "sft"]
    contradictory = _contradictory(pair_parts)
    for part, found in zip(pair_parts, contradictory, strict=True):
        found &= part.used
        if drop_contradictory:
            part.mark(found, CONTRADICTORY)
    duplicates: dict[str, int] = {}
    for stream in dict.fromkeys(part.policy.stream for part in parts):
        some = [part for part in parts if part.policy.stream == stream]
        repeats = _repeats([part.content[part.used] for part in some])
        duplicates[stream] = sum(len(again) for again in repeats)
        for part, again in zip(some, repeats, strict=True):
            if drop_duplicates:
                part.fate[np.flatnonzero(part.used)[again]] = DUPLICATE
    num = sum(int(found.sum()) for found in contradictory)
    return {"contradictory_rows": num, "duplicates": duplicates, "contradictory": contradictory}


def _repeats(columns: Sequence[Keys]) -> list[npt.NDArray[np.int64]]:
    """Return, for each column, the places of keys that came before, in it or in one before it."""
    again, _ = repetitions(np.concatenate([*columns, np.zeros(0, np.uint64)]))
    again.sort()
    ends = np.cumsum([len(column) for column in columns])
    some = np.split(again, np.searchsorted(again, ends[:-1]))
    return [places - (end - len(column)) for places, end, column in zip(some, ends, columns, strict=True)]


def _contradictory(parts: Sequence[Part]) -> list[Mask]:
    """Return which rows hold a completion that is labelled both ways; 16 bytes a row are held."""
    marked = np.zeros(2 * sum(len(part.shard) for part in parts), np.uint64)
    num = 0
    for part in parts:
        for places, block in part.shard.numbers():
            keys, labels = block["completions"], block["labels"]
            usable = part.used[places, None] & ~np.isnan(labels)
            some = ((keys << np.uint64(1)) | (labels > 0.5))[usable]
            marked[num : num + len(some)] = some
            num += len(some)
    marked = marked[:num]
    marked.sort()
    both = np.unique(marked[1:][(marked[1:] ^ marked[:-1]) == np.uint64(1)] >> np.uint64(1))
    found = []
    for part in parts:
        rows = np.zeros(len(part.shard), bool)
        for places, block in part.shard.numbers() if len(both) else ():
            rows[places] = _among(block["completions"] & np.uint64(2**63 - 1), both).any(axis=1)
        found.append(rows)
    return found


def _among(keys: Keys, wanted: Keys) -> Mask:
    """Return which keys are among the wanted ones, which ascend and are not none."""
    places = np.minimum(np.searchsorted(wanted, keys), len(wanted) - 1)
    found: Mask = wanted[places] == keys
    return found

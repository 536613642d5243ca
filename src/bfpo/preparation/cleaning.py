"""What repeats and what contradicts itself, over all sources, from hashes alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from bfpo.preparation.parts import CONTRADICTORY, DUPLICATE, Keys, Part, repetitions

__all__ = ["clean"]

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

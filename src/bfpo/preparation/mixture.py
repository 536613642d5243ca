"""From the units of the sources to what is written of each: clean, split by prompt and draw, in this fixed order.

Splits and draws use hashes: the order of rows and other rows do not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bfpo.config.prepare import HeldOutConfig, MixtureSourceConfig, NearDuplicatesConfig, PrepareConfig
from bfpo.core.errors import DataError
from bfpo.preparation.parts import CONTRADICTORY, DUPLICATE, NOT_DRAWN, SPLITS, Keys, Part, repetitions
from bfpo.preparation.sketches import bands_and_rows, group_similar

__all__ = ["Mixed", "apply_shares", "mix", "sample", "split_hash"]

_AT_ONCE = 1 << 16
_SPLIT_SALT, _DRAW_SALT, _SAMPLE_SALT = 1, 2, 3

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Mixed:
    """The parts of a mixture with the fate, split and copies of every unit, and the counts.

    `contradictory`: for each pair part, which rows hold a completion that is labelled both safe and unsafe.
    """

    parts: list[Part]
    counts: dict[str, Any]
    contradictory: list[Mask]

    def of_stream(self, stream: str) -> list[Part]:
        """Return the parts of a stream."""
        return [part for part in self.parts if part.source.stream == stream]

    @property
    def streams(self) -> list[str]:
        """The streams present, in the order main, buffer, sft."""
        present = {part.source.stream for part in self.parts}
        return [stream for stream in ("main", "buffer", "sft") if stream in present]


def mix(parts: Sequence[Part], config: PrepareConfig) -> Mixed:
    """Clean, split and draw the units of all sources, which are in the order of the mixture.

    Raises `DataError` if a source holds fewer rows than requested, or a stream has no training row left.
    """
    counts, contradictory = _clean(parts, config)
    prompts, owners, rows = _different_prompts(parts)
    near = config.near_duplicates
    groups = None if near is None else _near_groups(parts, owners, rows, near)
    counts["near_duplicates"] = _assign_splits(parts, config, prompts, groups)
    for part, count in zip(parts, apply_shares([part.source for part in parts], config.total), strict=True):
        _draw(part, count, seed=config.seed)
    mixed = Mixed(list(parts), counts, contradictory)
    for stream in mixed.streams:
        if not any((part.copies[part.split == 0] > 0).any() for part in mixed.of_stream(stream)):
            raise DataError(_no_training_row(stream, mixed.of_stream(stream), near))
    return mixed


def _no_training_row(stream: str, parts: Sequence[Part], near: NearDuplicatesConfig | None) -> str:
    """Return what became of the rows of a stream without training rows, and what to change."""
    fates = "; ".join(
        f"{part.source.name}: {', '.join(f'{fate} {num}' for fate, num in part.counts().items()) or 'no rows'}"
        for part in parts
    )
    held_out = sum(int((part.copies[part.split > 0] > 0).sum()) for part in parts)
    text = f"{stream}: no row is left in the training split; rows by outcome: {fates}"
    if not held_out:
        return text
    text += f"; {held_out} are in the validation and test splits; make splits smaller"
    if near is not None:
        text += ", or, since prompts that nearly repeat each other stay together, set near_duplicates to null"
    return text


# ----------------------------------------------------------------------------------------------------- cleaning


def _clean(parts: Sequence[Part], config: PrepareConfig) -> tuple[dict[str, Any], list[Mask]]:
    """Drop duplicates and contradictory rows, as configured; return the counts of both, and the contradictory rows.

    A duplicate is an exact copy of a row of its stream, labels included; the first in the order of the mixture is kept.
    A completion is contradictory if the same text under the same prompt is labelled safe in one row of the pair streams
    and unsafe in another.
    """
    pair_parts = [part for part in parts if part.source.stream != "sft"]
    contradictory = _contradictory(pair_parts)
    for part, found in zip(pair_parts, contradictory, strict=True):
        found &= part.used
        if config.contradictory_labels == "drop":
            part.mark(found, CONTRADICTORY)
    duplicates: dict[str, int] = {}
    for stream in dict.fromkeys(part.source.stream for part in parts):
        some = [part for part in parts if part.source.stream == stream]
        repeats = _repeats([part.content[part.used] for part in some])
        duplicates[stream] = sum(len(again) for again in repeats)
        for part, again in zip(some, repeats, strict=True):
            if config.duplicates == "drop":
                part.fate[np.flatnonzero(part.used)[again]] = DUPLICATE
    num = sum(int(found.sum()) for found in contradictory)
    return {"contradictory_rows": num, "duplicates": duplicates}, contradictory


def _repeats(columns: Sequence[Keys]) -> list[npt.NDArray[np.int64]]:
    """Return, for each column, the indices of keys that occur earlier in it or in a previous column."""
    again, _ = repetitions(np.concatenate([*columns, np.zeros(0, np.uint64)]))
    again.sort()
    ends = np.cumsum([len(column) for column in columns])
    some = np.split(again, np.searchsorted(again, ends[:-1]))
    return [places - (end - len(column)) for places, end, column in zip(some, ends, columns, strict=True)]


def _contradictory(parts: Sequence[Part]) -> list[Mask]:
    """Return which rows hold a completion that is labelled both safe and unsafe; it takes 16 bytes per row."""
    marked: npt.NDArray[np.uint64] = np.zeros(2 * sum(len(part.shard) for part in parts), np.uint64)
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
    found: list[Mask] = []
    for part in parts:
        rows = np.zeros(len(part.shard), bool)
        for places, block in part.shard.numbers() if len(both) else ():
            rows[places] = _among(block["completions"] & np.uint64(2**63 - 1), both).any(axis=1)
        found.append(rows)
    return found


def _among(keys: Keys, wanted: Keys) -> Mask:
    """Return which keys are among the wanted ones, which are sorted and not empty."""
    places = np.minimum(np.searchsorted(wanted, keys), len(wanted) - 1)
    found: Mask = wanted[places] == keys
    return found


# ------------------------------------------------------------------------------------------------------- splits


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
        for start in range(0, len(part.row), _AT_ONCE):
            units = start + np.flatnonzero(part.used[start : start + _AT_ONCE])
            places = np.searchsorted(prompts, part.prompt[units])
            owners[places], rows[places] = number, part.row[units]
    return prompts, owners, rows


def _near_groups(
    parts: Sequence[Part], owners: npt.NDArray[np.int32], rows: npt.NDArray[np.uint32], near: NearDuplicatesConfig
) -> npt.NDArray[np.int32]:
    """Return the group of near-duplicates of each different prompt; `owners` and `rows` say where its sketch is."""

    def band(number: int) -> npt.NDArray[np.uint32]:
        found = np.empty(len(rows), np.uint32)
        for index, part in enumerate(parts):
            own = owners == index
            if own.any():
                found[own] = part.shard.band(number)[rows[own]]
        return found

    def sketches(indices: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        found = np.empty((len(indices), near.permutations), np.uint8)
        for index, part in enumerate(parts):
            own = owners[indices] == index
            if own.any():
                found[own] = part.shard.sketches(rows[indices[own]])
        return found

    num_bands, _ = bands_and_rows(near)
    return group_similar(len(rows), num_bands=num_bands, band=band, sketches=sketches, threshold=near.threshold)


def _assign_splits(
    parts: Sequence[Part], config: PrepareConfig, prompts: Keys, groups: npt.NDArray[np.int32] | None
) -> dict[str, int]:
    """Set the split of every unit by a hash of its prompt, and return how many prompts their group moved.

    `prompts` (N,) are the different prompts in ascending order and `groups` (N,) the group of near-duplicates that each
    is in: the smallest hash of the group decides. Added rows do not move a prompt, unless a near-duplicate of it is
    among them.
    """
    own = _in_blocks(lambda some: _split_at(split_hash(some, config.seed), config.splits), prompts)
    counts = {"prompts": len(prompts), "prompts_in_groups": 0, "groups": 0, "prompts_moved": 0}
    if groups is not None and len(prompts):
        # The smallest hashes belong to the test split, whose number is the largest; next is validation.
        largest = np.zeros(int(groups.max()) + 1, np.uint8)
        np.maximum.at(largest, groups, own)
        splits = largest[groups]
        sizes = np.bincount(groups).astype(np.uint32)
        counts["groups"] = int((sizes > 1).sum())
        counts["prompts_in_groups"] = int(sizes[sizes > 1].sum())
        counts["prompts_moved"] = int((splits != own).sum())
        own = splits
    for part in parts:
        part.split = np.zeros(len(part.row), np.uint8)
        if len(prompts):
            part.split = _in_blocks(lambda some: own[_nearest(prompts, some)], part.prompt)
    return counts


def _nearest(prompts: Keys, some: Keys) -> npt.NDArray[np.int64]:
    """Return the index of each prompt; any index for a missing prompt, which no used unit has."""
    return np.minimum(np.searchsorted(prompts, some), len(prompts) - 1)


def _in_blocks(function: Callable[[Keys], npt.NDArray[np.uint8]], keys: Keys) -> npt.NDArray[np.uint8]:
    """Return a number for each key, computed in blocks."""
    values = np.zeros(len(keys), np.uint8)
    for start in range(0, len(keys), _AT_ONCE):
        values[start : start + _AT_ONCE] = function(keys[start : start + _AT_ONCE])
    return values


def _split_at(places: Keys, fractions: HeldOutConfig) -> npt.NDArray[np.uint8]:
    position = (places >> np.uint64(11)).astype(np.float64) / 2.0**53
    test_or_validation = fractions.test + fractions.validation
    return np.where(position < fractions.test, 2, np.where(position < test_or_validation, 1, 0)).astype(np.uint8)


def split_hash(prompts: Keys, seed: int) -> Keys:
    """Return the position of each prompt in [0, 2^64), which decides its split."""
    return _mixed(prompts, seed, _SPLIT_SALT)


# ------------------------------------------------------------------------------------------------------ drawing


def apply_shares(sources: Sequence[MixtureSourceConfig], total: int | None) -> list[int | None]:
    """Return the training rows requested from each source: its count, its share of `total`, or `None` for all.

    Shares are whole numbers that sum to `total` (largest remainders, ties to the first).
    """
    weights = np.array([source.weight or 0.0 for source in sources])
    counts = [source.count for source in sources]
    if total is None or not weights.any():
        return counts
    exact = weights / weights.sum() * total
    whole = np.floor(exact).astype(int)
    rest = np.argsort(whole - exact, kind="stable")[: total - int(whole.sum())]
    whole[rest] += 1
    return [count if source.weight is None else int(n) for source, count, n in zip(sources, counts, whole, strict=True)]


def _draw(part: Part, count: int | None, *, seed: int) -> None:
    """Draw `count` units of the training split by a hash of seed and content, and the same share of the others.

    Raises `DataError` if there are fewer and `oversample` is off.
    """
    used = part.used
    part.copies = used.astype(np.uint16)
    part.available = {
        split: int(np.count_nonzero(used & (part.split == number))) for number, split in enumerate(SPLITS)
    }
    if count is None:
        return
    there = part.available["train"]
    if count > there and not part.source.oversample:
        raise DataError(
            f"{part.source.name}: {count} rows were requested for its training split in the {part.source.stream} "
            f"stream, but only {there} are left ({_words(part)}); ask for at most {there}, or set oversample: true "
            "to repeat rows"
        )
    if not there:
        raise DataError(f"{part.source.name}: no row is left for its training split ({_words(part)})")
    if count > there * np.iinfo(np.uint16).max:
        raise DataError(f"{part.source.name}: {count} rows of {there} would repeat each more than 65535 times")
    for number, (split, num) in enumerate(part.available.items()):
        if not num:
            continue
        times, rest = divmod(count if split == "train" else min(num, round(num * count / there)), num)
        units = np.flatnonzero(used & (part.split == number))
        order = units[np.argsort(_mixed(part.content[units], seed, _DRAW_SALT), kind="stable")]
        part.copies[order] = times
        part.copies[order[:rest]] += 1
        part.fate[units[part.copies[units] == 0]] = NOT_DRAWN


def _words(part: Part) -> str:
    held_out = part.available["validation"] + part.available["test"]
    lost = {reason: number for reason, number in part.counts().items() if reason != "used"}
    texts = [f"{held_out} more are held out", *(f"{number} {reason}" for reason, number in lost.items())]
    return f"of {len(part.row)}: {', '.join(texts)}"


def sample(part: Part, num: int, *, seed: int) -> npt.NDArray[np.bool_]:
    """Return which units are in a sample of at most `num` of those that are written."""
    written = np.flatnonzero(part.copies)
    chosen = np.zeros(len(part.row), bool)
    order = np.argsort(_mixed(part.content[written], seed, _SAMPLE_SALT), kind="stable")
    chosen[written[order[:num]]] = True
    return chosen


def _mixed(keys: Keys, seed: int, salt: int) -> Keys:
    """Return the keys shuffled over [0, 2^64) by a bijection of seed and salt (splitmix64)."""
    start = (seed * 0x9E3779B97F4A7C15 + salt * 0xD1B54A32D192ED03) % 2**64
    mixed: Keys = keys + np.uint64(start)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed

"""Which split a unit is in and whether it is drawn, by hashes: no order of rows and no other row decides."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from bfpo.core.errors import DataError
from bfpo.preparation.parts import NOT_DRAWN, SPLITS, Keys, Part, Policy

__all__ = ["apply_shares", "assign_splits", "draw", "sample", "split_hash"]

_KEYS_AT_ONCE = 1 << 16
_SPLIT_SALT, _DRAW_SALT, _SAMPLE_SALT = 1, 2, 3


def split_hash(prompts: Keys, seed: int) -> Keys:
    """Return the place of each prompt in [0, 2^64), which decides its split."""
    return _mixed(prompts, seed, _SPLIT_SALT)


def assign_splits(
    parts: Sequence[Part],
    *,
    fractions: Mapping[str, float],
    seed: int,
    prompts: Keys,
    groups: npt.NDArray[np.int32] | None,
) -> dict[str, int]:
    """Set the split of every unit by a hash of its prompt, and return how many prompts their group moved.

    `prompts` (N,) are the different prompts in ascending order and `groups` (N,) the group of near-duplicates that each
    is in: it goes where the smallest hash of the group would. No prompt moves because rows are added, unless one that
    nearly repeats it is among them.
    """
    own = _in_blocks(lambda some: _split_at(split_hash(some, seed), fractions), prompts)
    counts = {"prompts": len(prompts), "prompts_in_groups": 0, "groups": 0, "prompts_moved": 0}
    if groups is not None and len(prompts):
        # The smallest hashes are those of the test split, then come those of validation: the largest number.
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
    """Return the place of each prompt; of one that is not there, which no used unit has, any."""
    return np.minimum(np.searchsorted(prompts, some), len(prompts) - 1)


def _in_blocks(function: Callable[[Keys], npt.NDArray[np.uint8]], keys: Keys) -> npt.NDArray[np.uint8]:
    """Return a number for each key, computed of some at a time."""
    values = np.zeros(len(keys), np.uint8)
    for start in range(0, len(keys), _KEYS_AT_ONCE):
        values[start : start + _KEYS_AT_ONCE] = function(keys[start : start + _KEYS_AT_ONCE])
    return values


def _split_at(places: Keys, fractions: Mapping[str, float]) -> npt.NDArray[np.uint8]:
    position = (places >> np.uint64(11)).astype(np.float64) / 2.0**53
    test, validation = fractions["test"], fractions["validation"]
    return np.where(position < test, 2, np.where(position < test + validation, 1, 0)).astype(np.uint8)


def apply_shares(policies: Sequence[Policy], total: int | None) -> list[int | None]:
    """Return the training rows asked of each source: its count, its share of `total`, or `None` for all.

    Shares are whole numbers that sum to `total` (largest remainders, ties to the first).
    """
    weights = np.array([policy.weight or 0.0 for policy in policies])
    counts = [policy.count for policy in policies]
    if total is None or not weights.any():
        return counts
    exact = weights / weights.sum() * total
    whole = np.floor(exact).astype(int)
    rest = np.argsort(whole - exact, kind="stable")[: total - int(whole.sum())]
    whole[rest] += 1
    return [
        count if policy.weight is None else int(n) for policy, count, n in zip(policies, counts, whole, strict=True)
    ]


def draw(part: Part, count: int | None, *, seed: int) -> None:
    """Draw `count` units of the training split by a hash of seed and content, and of the others as large a share.

    Raises `DataError` where there are fewer and the source is not to be oversampled.
    """
    used = part.used
    part.copies = used.astype(np.uint16)
    part.available = {
        split: int(np.count_nonzero(used & (part.split == number))) for number, split in enumerate(SPLITS)
    }
    if count is None:
        return
    there = part.available["train"]
    if count > there and not part.policy.oversample:
        raise DataError(
            f"{part.policy.name}: {count} rows were asked for its training split in the {part.policy.stream} stream, "
            f"and there are {there} ({_words(part)}); ask for at most {there}, or set oversample: true to repeat rows"
        )
    if not there:
        raise DataError(f"{part.policy.name}: no row is left for its training split ({_words(part)})")
    if count > there * np.iinfo(np.uint16).max:
        raise DataError(f"{part.policy.name}: {count} rows of {there} would repeat each more than 65535 times")
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

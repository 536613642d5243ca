"""Prompts as sets of character n-grams, and MinHash sketches of them, with the bands that find similar ones."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from bfpo.config.prepare import NearDuplicatesConfig

__all__ = ["bands_and_rows", "bands_of", "estimated_similarity", "group_similar", "ngrams", "similarity", "sketches_of"]

_RECALL = 0.99  # of pairs exactly at the threshold
_MINHASH_SEED = 1
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_COMPARED_AT_ONCE = 1 << 14
_HASHED_AT_ONCE = 1 << 14

Indices = npt.NDArray[np.int64]


def bands_and_rows(near: NearDuplicatesConfig) -> tuple[int, int]:
    """Return the number of bands of a sketch, and the rows of each.

    The most rows with which two prompts at the threshold still share a band with a probability of 99%.
    """
    fits = [
        rows
        for rows in range(1, 17)
        if 1 - (1 - near.threshold**rows) ** (near.permutations // rows) >= _RECALL or rows == 1
    ]
    return near.permutations // max(fits), max(fits)


def ngrams(texts: Sequence[str], characters: int) -> list[npt.NDArray[np.uint64]]:
    """Return hashes of the n-grams of each normalised text, in order; a shorter text has one, itself."""
    if not texts:
        return []
    padded = [text.ljust(characters, "\0") for text in texts]
    codes = np.frombuffer("".join(padded).encode("utf-32-le", "surrogatepass"), "<u4")
    hashes = np.zeros(len(codes) - characters + 1, np.uint64)
    high = np.empty(_HASHED_AT_ONCE, np.uint64)
    for start in range(0, len(hashes), _HASHED_AT_ONCE):  # so few at a time that they stay in the cache
        some = hashes[start : start + _HASHED_AT_ONCE]
        for place in range(start, start + characters):  # the overflow is intended
            some += codes[place : place + len(some)]
            some *= _MULTIPLIER
            some ^= np.right_shift(some, np.uint64(32), out=high[: len(some)])
    ends = np.cumsum([len(text) for text in padded])
    return [hashes[end - len(text) : end - characters + 1] for text, end in zip(padded, ends.tolist(), strict=True)]


def similarity(first: npt.NDArray[np.uint64], second: npt.NDArray[np.uint64]) -> float:
    """Return the Jaccard similarity of two texts' sets of n-grams."""
    shared = len(np.intersect1d(first, second))
    return shared / max(1, len(np.union1d(first, second)))


def sketches_of(grams: Sequence[npt.NDArray[np.uint64]], near: NearDuplicatesConfig) -> npt.NDArray[np.uint32]:
    """Return MinHash sketches from the n-grams of texts, (N, permutations); order and repetition do not matter."""
    from rensa import RMinHash

    offsets = np.concatenate([[0], np.cumsum([len(some) for some in grams])]).astype(np.uint64)
    flat = np.concatenate([*grams, np.zeros(0, np.uint64)])
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(flat, offsets, near.permutations, _MINHASH_SEED)
    rows = np.empty((len(grams), near.permutations), np.uint32)
    for row, values in zip(rows, matrix.to_rows(), strict=True):
        row[:] = array("I", values)  # numpy alone takes longer over a list of numbers
    return rows


def bands_of(sketches: npt.NDArray[np.uint32], near: NearDuplicatesConfig) -> npt.NDArray[np.uint32]:
    """Return a hash of each band of each sketch, (N, num_bands)."""
    num_bands, rows = bands_and_rows(near)
    parts = sketches[:, : rows * num_bands].reshape(-1, num_bands, rows).astype(np.uint64)
    mixed = np.zeros(parts.shape[:2], np.uint64)
    for row in range(rows):  # the overflow is intended
        mixed = (mixed ^ parts[:, :, row]) * _MULTIPLIER
        mixed ^= mixed >> np.uint64(29)
    bands: npt.NDArray[np.uint32] = (mixed >> np.uint64(32)).astype(np.uint32)
    return bands


def estimated_similarity(first: npt.NDArray[np.uint8], second: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """Return the estimated similarity of sets from the low bytes of their sketches, (N, permutations) each.

    Different minima share their low byte once in 256 times, which is corrected (b-bit MinHash, Li and König 2010).
    """
    same = (first == second).mean(axis=1)
    chance = 1 / 256
    estimate: npt.NDArray[np.float64] = (same - chance) / (1 - chance)
    return estimate


def group_similar(
    num: int,
    *,
    num_bands: int,
    band: Callable[[int], npt.NDArray[np.uint32]],
    sketches: Callable[[Indices], npt.NDArray[np.uint8]],
    threshold: float,
) -> npt.NDArray[np.int32]:
    """Return the group of each of `num` prompts, (num,): two are in one group if a chain of similar ones joins them.

    `band(number)` gives a hash for each prompt, `sketches(indices)` the low bytes of sketches. Prompts that share a
    hash are compared with the first of those that share it and with the one before, by the estimated similarity. One
    band at a time is in memory, with its order: tens of bytes per prompt.
    """
    groups = np.arange(num, dtype=np.int32)
    for number in range(num_bands):
        _join(groups, _similar_pairs(band(number), groups, sketches, threshold))
    return groups


def _join(groups: npt.NDArray[np.int32], pairs: Indices) -> None:
    """Make one group of the groups of each pair. A group has the number of its first member."""
    while len(pairs := pairs[groups[pairs[:, 0]] != groups[pairs[:, 1]]]):
        np.minimum.at(groups, groups[pairs].max(axis=1), groups[pairs].min(axis=1))
        while not np.array_equal(first := groups[groups], groups):
            groups[:] = first


def _similar_pairs(
    hashes: npt.NDArray[np.uint32],
    groups: npt.NDArray[np.int32],
    sketches: Callable[[Indices], npt.NDArray[np.uint8]],
    threshold: float,
) -> Indices:
    """Return pairs of similar prompts that share a hash and are not in one group yet, (N, 2)."""
    order = np.argsort(hashes, kind="stable")
    in_order = hashes[order]
    repeats = np.flatnonzero(in_order[1:] == in_order[:-1]) + 1  # places whose hash the place before has too
    if not len(repeats):
        return np.zeros((0, 2), np.int64)
    begins = np.flatnonzero(np.diff(repeats, prepend=-1) != 1)
    firsts = np.repeat(repeats[begins] - 1, np.diff(np.append(begins, len(repeats))))
    both = np.concatenate([repeats - 1, firsts]) * len(hashes) + np.concatenate([repeats, repeats])  # each as a number
    pairs = order[np.stack(np.divmod(np.unique(both), len(hashes)), 1)]
    pairs = pairs[groups[pairs[:, 0]] != groups[pairs[:, 1]]]
    similar = [
        estimated_similarity(sketches(some[:, 0]), sketches(some[:, 1])) >= threshold
        for some in (pairs[start : start + _COMPARED_AT_ONCE] for start in range(0, len(pairs), _COMPARED_AT_ONCE))
    ]
    kept: Indices = pairs[np.concatenate(similar)] if similar else pairs
    return kept

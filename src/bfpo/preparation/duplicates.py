"""Groups of prompts that nearly repeat each other, from sketches on disk, in a few numbers for each prompt."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from bfpo.preparation.sketches import estimated_similarity

__all__ = ["group_similar"]

_COMPARED_AT_ONCE = 1 << 14

Indices = npt.NDArray[np.int64]


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
    band at a time is held, with its order: some tens of bytes a prompt.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    groups = np.arange(num, dtype=np.int32)
    for number in range(num_bands):
        pairs = _similar_pairs(band(number), groups, sketches, threshold)
        if len(pairs):
            names, ends = np.unique(groups[pairs], return_inverse=True)
            # Its shape differs between versions of numpy, and older ones of scipy take no other integers.
            ends = ends.reshape(-1, 2).astype(np.int32)
            graph = coo_array((np.ones(len(ends), np.int8), (ends[:, 0], ends[:, 1])), shape=(len(names),) * 2)
            _, joined = connected_components(graph, directed=False)
            first_of = np.zeros(joined.max() + 1, np.int32)
            first_of[joined[::-1]] = names[::-1]  # the first name of each component
            renamed = np.arange(num, dtype=np.int32)
            renamed[names] = first_of[joined]
            groups = renamed[groups]
    return groups


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
    places = np.unique(np.stack([np.concatenate([repeats - 1, firsts]), np.concatenate([repeats, repeats])], 1), axis=0)
    pairs = order[places]
    pairs = pairs[groups[pairs[:, 0]] != groups[pairs[:, 1]]]
    similar = [
        estimated_similarity(sketches(some[:, 0]), sketches(some[:, 1])) >= threshold
        for some in (pairs[start : start + _COMPARED_AT_ONCE] for start in range(0, len(pairs), _COMPARED_AT_ONCE))
    ]
    kept: Indices = pairs[np.concatenate(similar)] if similar else pairs
    return kept

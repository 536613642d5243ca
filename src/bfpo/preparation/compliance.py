"""Pairs in which an answer that complies with a harmful prompt is preferred to a refusal, and whom that concerns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from bfpo.data.load import merged_hashes
from bfpo.preparation.deep import declines
from bfpo.preparation.parts import Part

__all__ = ["OTHER", "UNSAFE", "compliance_warnings", "count_compliances", "pairs_to_read", "unsafe_prompts"]

UNSAFE, OTHER = "unsafe", "not labelled unsafe"
"""Kinds of pairs, by the preferred answer."""
_FEWEST = 10  # pairs that a warning needs: so many of a helpful answer over a refusal undid large models


def unsafe_prompts(parts: Sequence[Part]) -> npt.NDArray[np.uint64]:
    """Return the hashes of the prompts that have an answer labelled unsafe in some row, ascending."""
    found = [part.prompt[(part.shard.key("labels")[part.row] <= 0.5).any(axis=1)] for part in parts]
    return merged_hashes(found)


def pairs_to_read(
    parts: Sequence[Part], unsafe: npt.NDArray[np.uint64], most: int
) -> tuple[list[npt.NDArray[np.bool_]], int]:
    """Return which rows of the pairs to read, `most` at most and drawn by their hashes, and how many there are.

    Training pairs whose other answer is not unsafe, and whose preferred one is, or whose prompt has an unsafe answer in
    some row (`unsafe`, sorted hashes). Reading a text takes milliseconds.
    """
    masks = []
    for part in parts:
        chosen, rejected = part.shard.key("labels")[part.row].T
        harmful = (chosen <= 0.5) | np.isin(part.prompt, unsafe)
        masks.append((part.copies > 0) & (part.split == 0) & harmful & ~(rejected <= 0.5))
    keys = np.concatenate([part.content[mask] for part, mask in zip(parts, masks, strict=True)])
    if len(keys) > most:
        last = np.partition(keys, most)[most] if most else 0
        masks = [mask & (part.content < last) for part, mask in zip(parts, masks, strict=True)]
    return masks, len(keys)


def count_compliances(rows: Sequence[Mapping[str, Any]], copies: Sequence[int]) -> Counter[str]:
    """Count the pairs, each as often as it is written, whose preferred answer complies and whose other one declines."""
    counts: Counter[str] = Counter()
    for row, number in zip(rows, copies, strict=True):
        question = next((turn["content"] for turn in reversed(row["prompt"]) if turn["role"] == "user"), "")
        if declines(row["rejected"], question) and declines(row["chosen"], question) is False:
            label = row["chosen_is_safe"]
            counts[OTHER if label is None or label > 0.5 else UNSAFE] += number
    return counts


def compliance_warnings(stream: str, counts: Mapping[str, int]) -> list[str]:
    """Return what the pairs that were counted teach, and to which methods; of a sample the counts are scaled up."""
    scale = counts["candidates"] / max(1, counts["read"])
    unsafe, other = (round(scale * counts.get(kind, 0)) for kind in (UNSAFE, OTHER))
    about = f" (estimated: {counts['read']} of {counts['candidates']} were read)" if scale > 1 else ""
    found = []
    if unsafe >= _FEWEST:
        found.append(
            f"{stream}: {unsafe} training pairs{about} prefer an unsafe answer that complies to a refusal: methods "
            "that read only the order of a pair (dpo_h, ipo) learn to comply from them, and ten pairs of a helpful "
            "answer over a refusal undid large models (arXiv 2605.10998); leave them out for such methods. bfpo and "
            "dpo_safe_first turn them round by their labels"
        )
    if other >= _FEWEST:
        found.append(
            f"{stream}: {other} training pairs{about} prefer an answer that complies, and is not labelled unsafe, to a "
            "refusal, on prompts that have an unsafe answer in another row: where such a label is wrong every method "
            "learns to comply, bfpo too (arXiv 2605.10998); have these labels checked"
        )
    return found

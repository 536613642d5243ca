"""What is asked of all pairs at once, as vectors: the same for a list of pairs and for a store on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from bfpo.core.errors import DataError
from bfpo.data.store import TokenStore
from bfpo.data.tokenize import TokenPair

__all__ = ["reference_logps", "safety_labels", "text_lengths", "token_lengths", "with_reference"]

Floats = npt.NDArray[np.float64]


def token_lengths(pairs: Sequence[TokenPair]) -> npt.NDArray[np.int32]:
    """Return the tokens of prompt, chosen and rejected of each pair, (P, 3)."""
    if isinstance(pairs, TokenStore):
        return pairs.lengths
    lengths = [(len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs]
    return np.array(lengths, np.int32).reshape(-1, 3)


def text_lengths(pairs: Sequence[TokenPair]) -> npt.NDArray[np.int32]:
    """Return the tokens of the prompt with the longer completion of each pair, (P,)."""
    lengths = token_lengths(pairs)
    longest: npt.NDArray[np.int32] = lengths[:, 0] + lengths[:, 1:].max(axis=1)
    return longest


def safety_labels(pairs: Sequence[TokenPair]) -> tuple[Floats, Floats]:
    """Return the safety labels of the chosen and of the rejected completions, (P,) each."""
    if isinstance(pairs, TokenStore):
        return pairs.labels
    chosen, rejected = ([pair.chosen_is_safe for pair in pairs], [pair.rejected_is_safe for pair in pairs])
    return np.array(chosen, np.float64), np.array(rejected, np.float64)


def reference_logps(pairs: Sequence[TokenPair]) -> tuple[Floats, Floats] | None:
    """Return the reference's summed log-probs of chosen and rejected, (P,) each in nats; `None` if any is missing."""
    if isinstance(pairs, TokenStore):
        return pairs.reference
    chosen, rejected = [pair.ref_chosen_logps for pair in pairs], [pair.ref_rejected_logps for pair in pairs]
    if None in chosen or None in rejected:
        return None
    return np.array(chosen, np.float64), np.array(rejected, np.float64)


def with_reference(pairs: Sequence[TokenPair], chosen: npt.ArrayLike, rejected: npt.ArrayLike) -> Sequence[TokenPair]:
    """Return the pairs with these reference log-probs, (P,) each in nats: copies of a list, a view of a store.

    Raises `DataError` for another number of them.
    """
    if isinstance(pairs, TokenStore):
        return pairs.with_reference(chosen, rejected)
    columns = np.asarray(chosen, np.float64), np.asarray(rejected, np.float64)
    for column in columns:
        if column.shape != (len(pairs),):
            raise DataError(f"reference log-probs: got shape {column.shape} for {len(pairs)} pairs")
    return [
        replace(pair, ref_chosen_logps=first, ref_rejected_logps=second)
        for pair, first, second in zip(pairs, *(column.tolist() for column in columns), strict=True)
    ]

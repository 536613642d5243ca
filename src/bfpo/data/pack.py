"""Pairs to one padded batch: chosen rows, then rejected rows; main pairs, then buffer pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bfpo.data.streams import PairItem
from bfpo.data.tokenize import TokenPair
from bfpo.errors import DataError, SettingError

__all__ = ["PairCollator"]


@dataclass(frozen=True, slots=True)
class PairCollator:
    """Collate pairs into one batch.

    With M items and a buffer there are P = 2M pairs, the main ones first; without, P = M. N = 2P sequences: row p is
    the chosen completion of pair p after its prompt, row P + p its rejected one; T is the longest, in tokens.

    Two items `(prompt a b, chosen x, rejected y z)` and `(prompt c, chosen u, rejected v)`, no buffer, give `input_ids`
    ```
    a b x 0      completion_mask  . . X .
    c u 0 0                       . X . .
    a b y z                       . . X X
    c v 0 0                       . X . .
    ```

    Returned: `input_ids` (N, T) int64; `attention_mask` (N, T) int64; `completion_mask` (N, T) bool, True on completion
    tokens with their end token; `chosen_is_safe`, `rejected_is_safe` (P,) float64; `is_buffer` (P,) bool; `pair_index`
    (P,) int64, the position in its stream; `ref_logps` (N,) float64 where they are precomputed.

    Raises `DataError` where only some items hold a buffer pair or reference log-probs.
    """

    pad_token_id: int

    def __post_init__(self) -> None:
        if self.pad_token_id < 0:
            raise SettingError(f"pad_token_id: got {self.pad_token_id}; a token id of at least 0 is needed")

    def __call__(self, items: Sequence[PairItem]) -> dict[str, Tensor]:
        """Return the batch as a plain dict of tensors on the CPU."""
        if not items:
            raise DataError("a batch of no items cannot be collated")
        buffer = [item.buffer for item in items if item.buffer is not None]
        if len(buffer) not in (0, len(items)):
            raise DataError(f"{len(buffer)} of {len(items)} items hold a buffer pair; all or none must")
        pairs = [*(item.main for item in items), *buffer]
        indices = [item.main_index for item in items]
        indices += [item.buffer_index for item in items] if buffer else []
        batch = self._sequences(pairs)
        batch["chosen_is_safe"] = torch.tensor([pair.chosen_is_safe for pair in pairs], dtype=torch.float64)
        batch["rejected_is_safe"] = torch.tensor([pair.rejected_is_safe for pair in pairs], dtype=torch.float64)
        batch["is_buffer"] = torch.arange(len(pairs)) >= len(items)
        batch["pair_index"] = torch.tensor(indices, dtype=torch.int64)
        ref_logps = _ref_logps(pairs)
        if ref_logps is not None:
            batch["ref_logps"] = ref_logps
        return batch

    def _sequences(self, pairs: Sequence[TokenPair]) -> dict[str, Tensor]:
        rows = [(pair.prompt_ids, pair.chosen_ids) for pair in pairs]
        rows += [(pair.prompt_ids, pair.rejected_ids) for pair in pairs]
        shape = (len(rows), max(len(prompt) + len(completion) for prompt, completion in rows))
        input_ids = np.full(shape, self.pad_token_id, np.int64)
        attention_mask = np.zeros(shape, np.int64)
        completion_mask = np.zeros(shape, np.bool_)
        for n, (prompt, completion) in enumerate(rows):
            start, stop = len(prompt), len(prompt) + len(completion)
            input_ids[n, :start] = prompt
            input_ids[n, start:stop] = completion
            attention_mask[n, :stop] = 1
            completion_mask[n, start:stop] = True
        return {
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy(attention_mask),
            "completion_mask": torch.from_numpy(completion_mask),
        }


def _ref_logps(pairs: Sequence[TokenPair]) -> Tensor | None:
    values = [pair.ref_chosen_logps for pair in pairs] + [pair.ref_rejected_logps for pair in pairs]
    known = [value for value in values if value is not None]
    if not known:
        return None
    if len(known) != len(values):
        lacking = next(
            pair.pair_id for pair in pairs if pair.ref_chosen_logps is None or pair.ref_rejected_logps is None
        )
        raise DataError(f"pair {lacking}: has no reference log-probs, others of the batch have; precompute all streams")
    return torch.tensor(known, dtype=torch.float64)

"""Rows of tokens in batches: longest first, as many as a number of tokens allows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

__all__ = ["BATCH_TOKENS", "batches_by_length"]

BATCH_TOKENS = 8192
"""Tokens of a batch, padding included, where no number of rows is given."""


def batches_by_length(
    lengths: Sequence[int], batch_size: int | None = None, *, more: int = 0, max_tokens: int = BATCH_TOKENS
) -> Iterator[list[int]]:
    """Yield the indices of rows in batches, longest first, so that memory runs out in the first batch or never.

    A batch has `batch_size` rows. Without it, it has as many as hold `max_tokens` tokens together when each is padded
    to the longest and gets `more` tokens, and at least one.
    """
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    start = 0
    while start < len(order):
        num = batch_size or max(1, max_tokens // max(1, lengths[order[start]] + more))
        yield order[start : start + num]
        start += num

from __future__ import annotations

import pytest

from bfpo.policy.batches import batches_by_length

LENGTHS = [3, 9, 1, 4, 4, 2]


def test_batches_hold_so_many_rows_longest_first() -> None:
    assert list(batches_by_length(LENGTHS, 4)) == [[1, 3, 4, 0], [5, 2]]
    assert list(batches_by_length([], 4)) == []


@pytest.mark.parametrize(("more", "max_tokens"), [(0, 12), (3, 12), (0, 1), (5, 10_000)])
def test_batches_hold_as_many_padded_tokens_as_are_allowed(more: int, max_tokens: int) -> None:
    found = list(batches_by_length(LENGTHS, more=more, max_tokens=max_tokens))
    assert sorted(place for batch in found for place in batch) == list(range(len(LENGTHS)))
    for batch, following in zip(found, [*found[1:], []], strict=True):
        width = LENGTHS[batch[0]] + more
        assert len(batch) == 1 or len(batch) * width <= max_tokens
        assert not following or (len(batch) + 1) * width > max_tokens  # no row less than fits

"""The batch: rows, masks and orders by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from bfpo.data.pack import PairCollator
from bfpo.data.streams import PairItem, TwoStreamDataset
from bfpo.data.tokenize import TokenPair
from bfpo.errors import DataError, SettingError


def pair(prompt: list[int], chosen: list[int], rejected: list[int], *rest: float) -> TokenPair:
    arrays = (np.asarray(ids, np.int32) for ids in (prompt, chosen, rejected))
    labels = rest[:2] or (1.0, 0.0)
    return TokenPair("p", *arrays, *labels, *rest[2:])


FIRST = pair([1, 2], [3], [4, 5], 1.0, 0.25, -1.5, -2.5)
SECOND = pair([6], [7], [8], 0.0, 1.0, -3.5, -4.5)
BUFFER = pair([9], [10, 11, 12, 13], [14], 0.5, 0.75, -5.5, -6.5)


def bare(*pairs: TokenPair) -> list[TokenPair]:
    return [dataclasses.replace(p, ref_chosen_logps=None, ref_rejected_logps=None) for p in pairs]


def test_main_pairs_alone_by_hand() -> None:
    first, second = bare(FIRST, SECOND)
    batch = PairCollator(0)([PairItem(first, 4), PairItem(second, 2)])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 0], [6, 7, 0, 0], [1, 2, 4, 5], [6, 8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["completion_mask"].int().tolist() == [[0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 1, 1], [0, 1, 0, 0]]
    assert batch["chosen_is_safe"].tolist() == [1.0, 0.0]
    assert batch["rejected_is_safe"].tolist() == [0.25, 1.0]
    assert batch["is_buffer"].tolist() == [False, False]
    assert batch["pair_index"].tolist() == [4, 2]
    assert "ref_logps" not in batch
    assert {name: value.dtype for name, value in batch.items()} == {
        "input_ids": torch.int64,
        "attention_mask": torch.int64,
        "completion_mask": torch.bool,
        "chosen_is_safe": torch.float64,
        "rejected_is_safe": torch.float64,
        "is_buffer": torch.bool,
        "pair_index": torch.int64,
    }


def test_buffer_pairs_follow_the_main_pairs_in_each_half() -> None:
    batch = PairCollator(99)([PairItem(FIRST, 0, BUFFER, 7), PairItem(SECOND, 1, BUFFER, 8)])
    assert batch["input_ids"].tolist() == [
        [1, 2, 3, 99, 99],
        [6, 7, 99, 99, 99],
        [9, 10, 11, 12, 13],
        [9, 10, 11, 12, 13],
        [1, 2, 4, 5, 99],
        [6, 8, 99, 99, 99],
        [9, 14, 99, 99, 99],
        [9, 14, 99, 99, 99],
    ]
    assert batch["attention_mask"].sum(1).tolist() == [3, 2, 5, 5, 4, 2, 2, 2]
    assert batch["completion_mask"].sum(1).tolist() == [1, 1, 4, 4, 2, 1, 1, 1]
    assert batch["is_buffer"].tolist() == [False, False, True, True]
    assert batch["pair_index"].tolist() == [0, 1, 7, 8]
    assert batch["chosen_is_safe"].tolist() == [1.0, 0.0, 0.5, 0.5]
    assert batch["rejected_is_safe"].tolist() == [0.25, 1.0, 0.75, 0.75]
    assert batch["ref_logps"].tolist() == [-1.5, -3.5, -5.5, -5.5, -2.5, -4.5, -6.5, -6.5]
    assert batch["ref_logps"].dtype == torch.float64


def test_a_pad_id_that_is_also_a_token_is_told_apart_by_the_masks() -> None:
    (padded,) = bare(pair([2], [2, 2], [2]))
    batch = PairCollator(2)([PairItem(padded, 0)])
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["completion_mask"].tolist() == [[False, True, True], [False, True, False]]


def test_what_cannot_be_collated() -> None:
    collate = PairCollator(0)
    with pytest.raises(DataError, match="no items"):
        collate([])
    with pytest.raises(DataError, match="1 of 2 items hold a buffer pair"):
        collate([PairItem(FIRST, 0, BUFFER, 0), PairItem(SECOND, 1)])
    with pytest.raises(DataError, match="pair p: has no reference log-probs"):
        collate([PairItem(FIRST, 0), PairItem(*bare(SECOND), 1)])
    with pytest.raises(SettingError, match="pad_token_id: got -1"):
        PairCollator(-1)


def test_items_of_a_data_set_go_straight_in() -> None:
    data = TwoStreamDataset([FIRST, SECOND], [BUFFER])
    assert PairCollator(0)([data[0], data[1]])["input_ids"].shape == (8, 5)

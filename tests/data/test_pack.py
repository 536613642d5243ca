"""Micro-batches: rows, places and orders by hand."""

from __future__ import annotations

import dataclasses
import itertools
import pickle

import numpy as np
import pytest
import torch

from bfpo.core.errors import DataError, SettingError
from bfpo.data.pack import (
    CHOSEN,
    PROMPT,
    REJECTED,
    Form,
    PackedLayout,
    PairCollator,
    collate_pairs,
    deal,
    longest_text,
    pair_sizes,
    split_by_tokens,
)
from bfpo.data.streams import PairItem, TwoStreamDataset
from bfpo.data.tokenize import TokenPair
from messages import raises


def pair(prompt: list[int], chosen: list[int], rejected: list[int], *rest: float) -> TokenPair:
    arrays = (np.asarray(ids, np.int32) for ids in (prompt, chosen, rejected))
    labels = rest[:2] or (1.0, 0.0)
    return TokenPair("p", *arrays, *labels, *rest[2:])


FIRST = pair([1, 2], [3], [4, 5], 1.0, 0.25, -1.5, -2.5)
SECOND = pair([6], [7], [8], 0.0, 1.0, -3.5, -4.5)
BUFFER = pair([9], [10, 11, 12, 13], [14], 0.5, 0.75, -5.5, -6.5)


def bare(*pairs: TokenPair) -> list[TokenPair]:
    return [dataclasses.replace(p, ref_chosen_logps=None, ref_rejected_logps=None) for p in pairs]


def test_packed_rows_by_hand() -> None:
    batch = collate_pairs(bare(FIRST, SECOND))
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 2, 3, 0, 1, 1]]
    assert batch["source"].tolist() == [1, 1, 3, 5, 5]
    assert batch["targets"].tolist() == [3, 4, 5, 7, 8]
    assert batch["sequence"].tolist() == [0, 2, 2, 1, 3]
    assert batch["layout"].lengths == [(2, 1, 2), (1, 1, 1)]
    assert "ref_logps" not in batch
    assert all(batch[name].dtype == torch.int64 for name in ("input_ids", "position_ids", "source", "targets"))


def test_padded_rows_by_hand() -> None:
    batch = collate_pairs(bare(FIRST, SECOND), pad_token_id=99, form="padded")
    assert batch["input_ids"].tolist() == [[1, 2, 3, 99], [6, 7, 99, 99], [1, 2, 4, 5], [6, 8, 99, 99]]
    assert batch["source"].tolist() == [1, 4, 9, 10, 12]
    assert batch["targets"].tolist() == [3, 7, 4, 5, 8]
    assert batch["sequence"].tolist() == [0, 1, 2, 2, 3]
    assert "layout" not in batch


@pytest.mark.parametrize("form", ["packed", "padded"])
def test_buffer_pairs_follow_the_main_pairs(form: Form) -> None:
    batch = PairCollator(0, form)([PairItem(FIRST, 0, BUFFER, 7), PairItem(SECOND, 1, BUFFER, 8)])
    assert batch["pair_index"].tolist() == [0, 1, 7, 8]
    (microbatch,) = batch["microbatches"]
    assert microbatch["pair_index"].tolist() == [0, 1, 7, 8]
    assert microbatch["place"].tolist() == [0, 1, 2, 3]
    assert microbatch["is_buffer"].tolist() == [False, False, True, True]
    assert microbatch["chosen_is_safe"].tolist() == [1.0, 0.0, 0.5, 0.5]
    assert microbatch["rejected_is_safe"].tolist() == [0.25, 1.0, 0.75, 0.75]
    assert microbatch["ref_logps"].tolist() == [-1.5, -3.5, -5.5, -5.5, -2.5, -4.5, -6.5, -6.5]
    assert microbatch["ref_logps"].dtype == torch.float64


def test_micro_batches_keep_to_the_tokens() -> None:
    lengths = [
        (1, 1, 1),
        (3, 4, 2),
        (2, 2, 2),
        (10, 20, 30),
        (1, 2, 1),
    ]  # packed 3, 9, 6, 60, 4; padded rows 2, 7, 4, 40, 3
    assert split_by_tokens(lengths, form="packed", max_tokens=None) == [[0, 1, 2, 3, 4]]
    assert split_by_tokens(lengths, form="packed", max_tokens=13) == [[3], [1, 4], [0, 2]]
    assert split_by_tokens(lengths, form="packed", max_tokens=1) == [[3], [1], [2], [4], [0]]
    assert split_by_tokens(lengths, form="padded", max_tokens=16) == [[3], [1], [2, 4], [0]]
    assert split_by_tokens(lengths, form="padded", max_tokens=28) == [[3], [1, 2], [0, 4]]


def test_every_item_is_in_one_micro_batch_with_its_stream() -> None:
    batch = PairCollator(0, "packed", 8)([PairItem(FIRST, 4, BUFFER, 7), PairItem(SECOND, 2, BUFFER, 8)])
    assert [microbatch["place"].tolist() for microbatch in batch["microbatches"]] == [[2], [3], [0, 1]]
    assert [microbatch["is_buffer"].tolist() for microbatch in batch["microbatches"]] == [[True], [True], [False] * 2]
    assert [microbatch["pair_index"].tolist() for microbatch in batch["microbatches"]] == [[7], [8], [4, 2]]


def test_what_cannot_be_collated() -> None:
    collate = PairCollator(0)
    with raises(DataError):
        collate([])
    with raises(DataError):
        collate([PairItem(FIRST, 0, BUFFER, 0), PairItem(SECOND, 1)])
    with raises(DataError, "pair p"):
        collate([PairItem(FIRST, 0), PairItem(*bare(SECOND), 1)])
    with raises(DataError, "pair p"):
        collate([PairItem(pair([], [1], []), 0)])
    with raises(SettingError, "pad_token_id"):
        PairCollator(-1)
    with raises(SettingError):
        PairCollator(0, "ragged")  # type: ignore[arg-type]
    with raises(SettingError, "max_tokens"):
        PairCollator(0, "packed", 0)


def test_items_of_a_data_set_go_straight_in() -> None:
    data = TwoStreamDataset([FIRST, SECOND], [BUFFER])
    (microbatch,) = PairCollator(0)([data[0], data[1]])["microbatches"]
    assert microbatch["input_ids"].shape == (1, 5 + 3 + 6 + 6)
    assert longest_text([FIRST, SECOND, BUFFER]) == 5


LAYOUT = PackedLayout([(2, 1, 2), (1, 1, 1)])


def test_segments_and_roles() -> None:
    assert [(s.start, s.rejected_start, s.stop) for s in LAYOUT] == [(0, 3, 5), (5, 7, 8)]
    assert (LAYOUT.num_tokens, LAYOUT.longest_text) == (8, 4)
    roles = LAYOUT.roles(torch.device("cpu"))
    assert roles.pair.tolist() == [0, 0, 0, 0, 0, 1, 1, 1]
    assert roles.part.tolist() == [PROMPT, PROMPT, CHOSEN, REJECTED, REJECTED, PROMPT, CHOSEN, REJECTED]
    assert roles.position.tolist() == [0, 1, 2, 2, 3, 0, 1, 1]


def test_the_row_as_problems_of_different_length() -> None:
    index = LAYOUT.varlen(torch.device("cpu"))
    assert index.keys.tolist() == [0, 1, 2, 0, 1, 3, 4, 5, 6, 5, 7]
    assert index.query_starts.tolist() == [0, 3, 5, 7, 8]
    assert index.key_starts.tolist() == [0, 3, 7, 9, 11]
    assert (index.longest_query, index.longest_key) == (3, 4)


def test_a_pickled_layout_leaves_its_tensors_behind() -> None:
    LAYOUT.roles(torch.device("cpu"))
    copy = pickle.loads(pickle.dumps(LAYOUT))
    assert copy.lengths == LAYOUT.lengths
    assert copy._made == {}


def test_pairs_are_dealt_by_length() -> None:
    assert deal([5, 9, 1, 4, 8], 2) == [[1, 2, 3], [0, 4]]  # 9 + 4 + 1 and 8 + 5
    assert deal([3, 1], 4) == [[0], [1], [], []]
    generator = np.random.default_rng(0)
    for num in (1, 5, 9):
        sizes: list[int] = generator.integers(1, 60, num).tolist()
        shares = deal(sizes, 3)
        assert sorted(itertools.chain(*shares)) == list(range(num))
        best = min(
            max(sum(size for size, owner in zip(sizes, owners, strict=True) if owner == k) for k in range(3))
            for owners in itertools.product(range(3), repeat=num)
        )
        assert max(sum(sizes[place] for place in share) for share in shares) <= (4 / 3 - 1 / 9) * best


def test_sizes_of_pairs_by_form() -> None:
    lengths = np.array([[2, 1, 2], [5, 7, 3]])
    assert pair_sizes(lengths, form="packed").tolist() == [5, 15]
    assert pair_sizes(lengths, form="padded").tolist() == [4, 12]

"""The two streams: which buffer pair goes where, in every epoch, in any order of asking."""

from __future__ import annotations

import pickle

import numpy as np
from torch.utils.data import DataLoader

from bfpo.core.errors import DataError, SettingError
from bfpo.data.streams import PairItem, TwoStreamDataset, buffer_order
from bfpo.data.tokenize import TokenPair
from messages import raises


def token_pairs(name: str, count: int) -> list[TokenPair]:
    ids = np.asarray([1], np.int32)
    return [TokenPair(f"{name}{k}", ids, ids, ids, 1.0, 1.0) for k in range(count)]


def first_item(items: list[PairItem]) -> tuple[int, int]:
    return items[0].main_index, items[0].buffer_index


def test_by_hand_from_the_permutations_of_the_cycles() -> None:
    cycles = [np.random.default_rng((7, cycle)).permutation(3).tolist() for cycle in range(4)]
    flat = [index for cycle in cycles for index in cycle]
    main, buffer = token_pairs("m", 5), token_pairs("b", 3)
    data = TwoStreamDataset(main, buffer, seed=7)
    for epoch in (0, 1, 0):
        data.set_epoch(epoch)
        items = [data[k] for k in range(5)]
        assert [item.buffer_index for item in items] == flat[5 * epoch : 5 * epoch + 5]
        assert all(item.buffer is buffer[item.buffer_index] for item in items)
        assert all(item.main is main[k] and item.main_index == k for k, item in enumerate(items))


def test_a_fixed_order_so_that_runs_of_other_versions_resume() -> None:
    order = [buffer_order(num_main=6, num_buffer=4, seed=0, epoch=epoch).tolist() for epoch in (0, 1)]
    assert order == [[2, 0, 1, 3, 3, 0], [2, 1, 2, 1, 0, 3]]


def test_items_do_not_depend_on_what_was_asked_before() -> None:
    one, two = (TwoStreamDataset(token_pairs("m", 20), token_pairs("b", 7), seed=3) for _ in range(2))
    for epoch in (0, 1, 2):
        one.set_epoch(epoch)
        straight = [one[k].buffer_index for k in range(20)]
    two.set_epoch(2)
    assert [two[k].buffer_index for k in reversed(range(20))] == straight[::-1]
    assert [pickle.loads(pickle.dumps(two))[k].buffer_index for k in range(20)] == straight


def test_epochs_and_seeds_change_the_partners() -> None:
    orders = {tuple(buffer_order(num_main=9, num_buffer=9, seed=s, epoch=e)) for s in (0, 1) for e in (0, 1)}
    assert len(orders) == 4


def test_without_a_buffer() -> None:
    data = TwoStreamDataset(token_pairs("m", 2))
    assert (len(data), data.has_buffer, data.epoch) == (2, False, 0)
    assert (data[1].buffer, data[1].buffer_index) == (None, -1)
    with raises(IndexError, "2"):
        data[2]


def test_loader_processes_that_outlive_an_epoch_see_the_next() -> None:
    data = TwoStreamDataset(token_pairs("m", 6), token_pairs("b", 5), seed=1)
    loader = DataLoader(data, batch_size=1, num_workers=1, persistent_workers=True, collate_fn=first_item)
    for epoch in (0, 1):
        data.set_epoch(epoch)
        order = buffer_order(num_main=6, num_buffer=5, seed=1, epoch=epoch)
        assert list(loader) == list(enumerate(order.tolist()))


def test_bad_settings() -> None:
    with raises(DataError):
        TwoStreamDataset([], token_pairs("b", 1))
    with raises(DataError, "buffer"):
        TwoStreamDataset(token_pairs("m", 1), [])
    with raises(SettingError, "seed"):
        TwoStreamDataset(token_pairs("m", 1), seed=-1)
    with raises(SettingError, "epoch"):
        TwoStreamDataset(token_pairs("m", 1)).set_epoch(-1)

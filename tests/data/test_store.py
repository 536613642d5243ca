"""Pairs on disk: the same as in a list, whole or not at all, and vectors that both give."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from torch.utils.data import DataLoader

import bfpo.data.store as store_module
from bfpo.core.errors import DataError, RunError
from bfpo.data.store import TokenStore, reference_logps, safety_labels, token_lengths, with_reference, write_tokens
from bfpo.data.streams import TwoStreamDataset
from bfpo.data.tokenize import TokenPair
from messages import raises
from tiny import tiny_pairs

PAIRS = [*tiny_pairs(10, 3), TokenPair("naïve ☃", *(np.arange(n, dtype=np.int32) for n in (2, 0, 300)), 0.25, 1.0)]


@pytest.fixture(params=[1, 4, 4096])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TokenStore:
    monkeypatch.setattr(store_module, "_PAIRS_PER_BLOCK", request.param)
    return write_tokens(tmp_path / "tokens" / "data.arrow", iter(PAIRS), {"num": 11})


def same(one: TokenPair, other: TokenPair) -> bool:
    def values(pair: TokenPair) -> list[object]:
        ids = [ids.tolist() for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)]
        labels = [pair.chosen_is_safe, pair.rejected_is_safe]
        return [pair.pair_id, *ids, *labels, pair.ref_chosen_logps, pair.ref_rejected_logps]

    return values(one) == values(other)


def test_a_store_is_the_list_that_was_written(store: TokenStore) -> None:
    assert len(store) == len(PAIRS)
    assert all(map(same, store, PAIRS))
    assert all(same(store[i], PAIRS[i]) for i in (-1, -11, 0, 10, np.int64(5)))
    assert all(map(same, store[2:9:3], PAIRS[2:9:3]))
    assert store[0].prompt_ids.dtype == np.int32
    assert isinstance(store[0].chosen_is_safe, float)
    assert store.facts == {"num": 11}
    for index in (11, -12):
        with raises(IndexError, str(index)):
            store[index]


def test_ids_are_views_of_the_file(store: TokenStore) -> None:
    one, again = store[10].rejected_ids, store[10].rejected_ids
    assert np.shares_memory(one, again)
    assert not one.flags.writeable


def test_vectors_are_those_of_the_list(store: TokenStore) -> None:
    for of in (token_lengths, safety_labels):
        np.testing.assert_array_equal(of(store), of(PAIRS))  # type: ignore[operator]
    assert token_lengths(store)[10].tolist() == [2, 0, 300]
    assert safety_labels(store)[0][10] == 0.25
    assert token_lengths([]).shape == (0, 3)


def test_reference_log_probs_are_given_to_both(store: TokenStore) -> None:
    chosen, rejected = -np.arange(11.0), -np.arange(11.0) / 3
    with_both = [with_reference(pairs, chosen, rejected) for pairs in (store, PAIRS)]
    assert all(map(same, *with_both))
    assert with_both[0][4].ref_rejected_logps == -4 / 3
    for pairs in with_both:
        np.testing.assert_array_equal(reference_logps(pairs), (chosen, rejected))
    assert reference_logps(store) is None
    assert reference_logps(PAIRS) is None
    assert store[4].ref_chosen_logps is None
    for pairs in (store, PAIRS):
        with raises(DataError):
            with_reference(pairs, chosen, rejected[:10])


def test_a_pickled_store_opens_its_file_again(store: TokenStore) -> None:
    view = store.with_reference(np.ones(11), np.zeros(11))
    sent = pickle.dumps(view)
    assert len(sent) < 1000  # the path and the log-probs, not the pairs
    assert all(map(same, pickle.loads(sent), view))
    write_tokens(store.path, PAIRS[:3])
    with raises(DataError):
        pickle.loads(sent)
    assert same(store[10], PAIRS[10])  # what is open stays as it was


def test_loader_processes_read_a_store(tmp_path: Path) -> None:
    store = write_tokens(tmp_path / "data.arrow", PAIRS)
    loader = DataLoader(TwoStreamDataset(store), batch_size=None, num_workers=1)
    assert all(same(item.main, pair) for item, pair in zip(loader, PAIRS, strict=True))


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "data.arrow"

    def broken() -> Iterator[TokenPair]:
        yield from PAIRS
        raise DataError("pair 12: broken")

    with raises(DataError, "pair 12"):
        write_tokens(path, broken())
    assert list(tmp_path.iterdir()) == []
    write_tokens(path, PAIRS)
    with raises(DataError, "pair 12"):
        write_tokens(path, broken())
    assert len(TokenStore(path)) == 11
    (tmp_path / "file").touch()
    with raises(RunError):
        write_tokens(tmp_path / "file" / "data.arrow", PAIRS)


def test_facts_may_be_filled_while_pairs_are_taken(tmp_path: Path) -> None:
    facts: dict[str, int] = {}

    def pairs() -> Iterator[TokenPair]:
        yield from PAIRS
        facts["seen"] = len(PAIRS)

    assert write_tokens(tmp_path / "data.arrow", pairs(), facts).facts == {"seen": 11}


def test_no_pairs_are_a_store_too(tmp_path: Path) -> None:
    store = write_tokens(tmp_path / "none.arrow", [])
    assert (len(store), list(store), store.lengths.shape, store.labels[0].shape) == (0, [], (0, 3), (0,))


def test_another_file_is_an_error_with_its_name(tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "data.arrow", PAIRS).path
    whole = path.read_bytes()
    for content in (b"", b"no Arrow file", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with raises(DataError, "data.arrow"):
            TokenStore(path)
    foreign = pyarrow.table({"a": [1]})
    with pyarrow.ipc.new_file(str(path), foreign.schema) as writer:
        writer.write_table(foreign)
    with raises(DataError):
        TokenStore(path)
    with raises(DataError):
        TokenStore(tmp_path / "absent.arrow")

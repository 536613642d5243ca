"""Splits by prompt, samples, unknown labels, cells, completions to imitate."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from bfpo.core.errors import LabelError, SettingError
from bfpo.core.schema import Message
from bfpo.data.labels import CELLS, cell_counts, cell_of, completions_of_pairs, resolve_labels
from bfpo.data.read import read_pairs
from bfpo.data.split import normalised_prompt
from helpers import limit_pairs, make_pair, split_pairs
from messages import raises


def test_prompts_that_read_the_same_are_the_same() -> None:
    ways = ["How  Do I\nfix it? ", "how do i fix it?", "\uff28ow do I \ufb01x it?", "HOW DO I FIX IT?"]
    assert len({normalised_prompt((Message("user", way),)) for way in ways}) == 1
    others = [(Message("user", "how do i fix it"),), (Message("system", ways[0]),), ()]
    assert len({normalised_prompt(other) for other in others} | {normalised_prompt((Message("user", ways[0]),))}) == 4


def test_a_split_shares_no_prompt_and_loses_no_pair() -> None:
    pairs = [make_pair(prompt=f"Prompt {k % 10}" if k % 2 else f"prompt  {k % 10}", id=str(k)) for k in range(40)]
    train, test = split_pairs(pairs, held_out=3, seed=0)
    prompts = [{normalised_prompt(pair.prompt) for pair in side} for side in (train, test)]
    assert (len(prompts[0]), len(prompts[1])) == (7, 3)
    assert not prompts[0] & prompts[1]
    assert sorted([*train, *test], key=lambda pair: int(pair.id)) == pairs
    assert [int(pair.id) for pair in train] == sorted(int(pair.id) for pair in train)


def test_a_split_is_stable_under_order_and_nearly_under_growth() -> None:
    pairs = [make_pair(prompt=f"prompt {k}", id=str(k)) for k in range(50)]
    held = {pair.id for pair in split_pairs(pairs, held_out=10, seed=1)[1]}
    shuffled = random.Random(0).sample(pairs, len(pairs))
    assert {pair.id for pair in split_pairs(shuffled, held_out=10, seed=1)[1]} == held
    for k in range(50, 70):
        more = [*pairs, make_pair(prompt=f"prompt {k}", id=str(k))]
        assert len(held & {pair.id for pair in split_pairs(more, held_out=10, seed=1)[1]}) >= 9
    assert {pair.id for pair in split_pairs(pairs, held_out=10, seed=2)[1]} != held


@pytest.mark.parametrize("held_out", [-1, 0, 2, 3])
def test_a_split_that_leaves_a_side_empty_is_an_error(held_out: int) -> None:
    pairs = [make_pair(prompt=name, id=name) for name in ("a", "b")]
    with raises(SettingError, "held_out"):
        split_pairs(pairs, held_out=held_out, seed=0)


def test_a_limit_draws_and_keeps_the_order() -> None:
    pairs = [make_pair(id=str(k)) for k in range(100)]
    drawn = [int(pair.id) for pair in limit_pairs(pairs, 10, seed=0)]
    assert len(drawn) == 10
    assert drawn == sorted(drawn) != list(range(10))
    assert limit_pairs(pairs, 1000, seed=0) == pairs
    assert {pair.id for pair in limit_pairs(pairs[::-1], 10, seed=0)} == {str(k) for k in drawn}
    with raises(SettingError, "limit"):
        limit_pairs(pairs, 0, seed=0)


def test_unknown_labels_are_resolved_only_as_told() -> None:
    known = make_pair(labels=(0, 0.3), id="a")
    half, none = make_pair(labels=(0, None), id="b"), make_pair(labels=(None, None), id="c")
    pairs = [known, half, none]
    kept, counts = resolve_labels(pairs, unknown="drop")
    assert (kept, counts) == ([known], {"known": 1, "set_safe": 0, "dropped": 2})
    kept, counts = resolve_labels(pairs, unknown="safe")
    assert counts == {"known": 1, "set_safe": 2, "dropped": 0}
    assert [(pair.chosen_is_safe, pair.rejected_is_safe) for pair in kept] == [(0, 0.3), (0, 1), (1, 1)]
    with raises(LabelError):
        resolve_labels(pairs, unknown="error")
    assert resolve_labels([known], unknown="error") == ([known], {"known": 1, "set_safe": 0, "dropped": 0})
    with raises(SettingError, "unknown"):
        resolve_labels(pairs, unknown="guess")  # type: ignore[arg-type]


def test_cells() -> None:
    assert [cell_of(c, r) for c in (1, 0) for r in (1, 0)] == list(CELLS)
    assert [cell_of(c, 0.5) for c in (0.51, 0.5)] == ["safe-unsafe", "unsafe-unsafe"]
    labels = [(1, 1), (1, 0), (0, 1), (0, 0), (0.6, 0.4), (1, None)]
    assert cell_counts(make_pair(labels=pair) for pair in labels) == {
        "safe-safe": 1,
        "safe-unsafe": 2,
        "unsafe-safe": 1,
        "unsafe-unsafe": 1,
        "unknown": 1,
    }
    assert cell_counts([]) == dict.fromkeys(CELLS, 0)


def test_completions_to_imitate_come_once_each() -> None:
    pairs = [
        make_pair(chosen="good", rejected="bad", labels=(1, 0), id="a"),
        make_pair(chosen="good", rejected="unknown", labels=(0, None), id="b"),
        make_pair(prompt="other", chosen="good", rejected="fine", labels=(0.5, 0.9), id="c"),
    ]
    assert [made.id for made in completions_of_pairs(pairs)] == [
        "a:chosen",
        "a:rejected",
        "b:rejected",
        "c:chosen",
        "c:rejected",
    ]
    assert [made.id for made in completions_of_pairs(pairs, "chosen")] == ["a:chosen", "c:chosen"]
    assert [made.id for made in completions_of_pairs(pairs, "safe")] == ["a:chosen", "c:rejected"]
    with raises(SettingError, "use"):
        completions_of_pairs(pairs, "best")  # type: ignore[arg-type]


def test_real_pairs_split_by_prompt(shared_data: Path) -> None:
    pairs = read_pairs([shared_data / "preferences" / "xstest_bfpo_pairs.jsonl"]).pairs
    assert cell_counts(pairs) == {"safe-safe": 456, "safe-unsafe": 0, "unsafe-safe": 520, "unsafe-unsafe": 0}
    train, test = split_pairs(pairs, held_out=60, seed=0)
    assert len({pair.prompt for pair in test}) == 60
    assert not {pair.prompt for pair in test} & {pair.prompt for pair in train}
